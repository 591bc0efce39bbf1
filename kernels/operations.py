"""The operations whose backend can be chosen."""

import os

from kernels import attention, backends, selective_scan, ssd

OPERATIONS = {
    module.OPERATION.name: module.OPERATION for module in (attention, selective_scan, ssd)
}


def check_backends(asked: str, name: str) -> None:
    """Raise a ValueError where what the user asks for, under `name`, does not exist.

    `asked` is as in `kernels.backends`; the environment variable of there is checked as well.
    """
    for source, value in (
        (name, asked),
        (backends.ENVIRONMENT_VARIABLE, os.environ.get(backends.ENVIRONMENT_VARIABLE)),
    ):
        if not value:
            continue
        try:
            for operation, backend in backends.parse(value).items():
                if operation == "*":
                    continue
                if operation not in OPERATIONS:
                    raise ValueError(
                        f"unknown operation {operation!r}; accepted: {', '.join(OPERATIONS)}"
                    )
                if backend not in (backends.AUTO, backends.XLA):
                    OPERATIONS[operation].check_name(backend)
        except ValueError as error:
            raise ValueError(f"{source} is {value!r}: {error}.") from None
