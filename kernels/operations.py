"""The operations whose backend can be chosen."""

import os

from kernels import attention, backends, cross_entropy, selective_scan, ssd

OPERATIONS = {
    module.OPERATION.name: module.OPERATION
    for module in (attention, cross_entropy, selective_scan, ssd)
}


def check_backends(requested: str, name: str) -> None:
    """Raise a ValueError if the user asks for an operation or a backend that does not exist.

    Args:
      requested: what the user asks for, as described in `kernels.backends`. The environment
        variable described there is checked as well.
      name: the config key of `requested`, for the message.
    """
    for source, value in (
        (name, requested),
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
                        f"the operation must be one of {', '.join(OPERATIONS)}; "
                        f"got {operation!r:.80}"
                    )
                if backend not in (backends.AUTO, backends.XLA):
                    OPERATIONS[operation].check_name(backend)
        except ValueError as error:
            raise ValueError(f"{source}: {error}.") from None
