"""Which backend runs an operation: by the platform it is compiled for, unless the user names one.

What the user asks for is one string, from the environment variable FLOWHN_KERNELS_BACKEND or from
`use` (the config's kernels.backend), the former first:

  auto                                 the best that each operation has for the platform
  xla                                  no hand-written kernel anywhere: plain XLA
  selective_scan=triton,attention=xla  these operations so, the others 'auto'

Both are read when a function is traced. A function that is jitted already is traced anew where
`use` asks for another backend; the variable is to be set before the program starts.

A backend that cannot serve gives way to the next best, with one logged line that says why.
"""

import contextlib
import contextvars
import dataclasses
import functools
import logging
import os
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax

ENVIRONMENT_VARIABLE = "FLOWHN_KERNELS_BACKEND"
AUTO, XLA = "auto", "xla"

# Of GPUs that programs are compiled for without one being here.
_CAPABILITIES = {"A100": 80, "H100": 90, "H200": 90, "B200": 100}

_log = logging.getLogger(__name__)

# Part of the cache key of jax.jit: a function is traced anew where another backend is asked for.
_asked = jax.make_user_context(AUTO)
# Per thread, so that programs traced side by side are recorded apart.
_recorders: contextvars.ContextVar[tuple[dict[str, set[str]], ...]] = contextvars.ContextVar(
    "recorders", default=()
)


class CannotServeError(ValueError):
    """The backend that is asked for does not take these arguments."""


def _serves_all(*_: Any) -> None:
    return None


@dataclasses.dataclass(frozen=True)
class Backend:
    """One way to run an operation.

    Attributes:
      run: takes the operation's array arguments by position.
      platforms: 'cpu', 'gpu', 'tpu', those it runs on.
      unsupported: takes the same arguments, of which it may read shapes and dtypes; says why they
        cannot be served, or that a package is missing. None where they can.
    """

    run: Callable[..., Any]
    platforms: tuple[str, ...] = ("cpu", "gpu", "tpu")
    unsupported: Callable[..., str | None] = _serves_all


@dataclasses.dataclass(frozen=True)
class Operation:
    """An operation's backends by name, and their order of preference by platform.

    The last of each order is plain XLA and serves everything.
    """

    name: str
    backends: Mapping[str, Backend]
    preference: Mapping[str, tuple[str, ...]]

    def choose(self, *arguments: Any, backend: str | None = None) -> Callable[..., Any]:
        """The function to call with `arguments`.

        Args:
          *arguments: the operation's array arguments.
          backend: the name of the one to take; None: as the user asks, or the best that serves.

        Raises:
          ValueError: `backend`, or the user, names one that does not exist; or `backend` cannot
            serve the arguments.
        """
        platform = target_platform()
        if backend is not None:
            self.check_name(backend)
            if reason := self._refusal(backend, platform, arguments):
                raise CannotServeError(f"{self.name}: backend {backend!r} cannot serve: {reason}")
            return self._take(backend)
        order = self.preference[platform]
        asked = _asked_of(self.name)
        if asked == XLA:
            order = order[-1:]
        elif asked != AUTO:
            self.check_name(asked)
            order = (asked, *(name for name in order if name != asked))
        refused = []
        for name in order:
            reason = self._refusal(name, platform, arguments)
            if reason is None:
                break
            refused.append(f"{name} cannot serve ({reason})")
        if refused:
            _log_once(f"{self.name}: {', '.join(refused)}; it runs on {name}")
        return self._take(name)

    def check_name(self, backend: str) -> None:
        """Raise a ValueError where there is no such backend."""
        if backend not in self.backends:
            accepted = ", ".join(map(repr, sorted(self.backends)))
            raise ValueError(f"{self.name}: unknown backend {backend!r:.80}; accepted: {accepted}")

    def _refusal(self, name: str, platform: str, arguments: tuple[Any, ...]) -> str | None:
        backend = self.backends[name]
        if platform not in backend.platforms:
            return f"it is for {' and '.join(backend.platforms)}, this is {platform}"
        return backend.unsupported(*arguments)

    def _take(self, name: str) -> Callable[..., Any]:
        for recorder in _recorders.get():
            recorder.setdefault(self.name, set()).add(name)
        return self.backends[name].run


def parse(asked: str) -> dict[str, str]:
    """What is asked of each operation, by its name; '*' stands for all others.

    Raises:
      ValueError: the string is not as the module's docstring says. Names are not looked up.
    """
    if asked in (AUTO, XLA):
        return {"*": asked}
    items = [item.strip().partition("=") for item in asked.split(",")]
    operations = {operation for operation, _, _ in items}
    named_once = len(operations) == len(items) and "*" not in operations
    if not named_once or not all(operation and backend for operation, _, backend in items):
        raise ValueError(
            f"{asked!r:.80} names no backends; accepted is 'auto', 'xla' or OPERATION=BACKEND,... "
            "with each operation once, such as 'selective_scan=xla_associative,attention=xla'"
        )
    return {operation: backend for operation, _, backend in items} | {"*": AUTO}


@contextlib.contextmanager
def use(asked: str) -> Iterator[None]:
    """Ask for backends, as the module's docstring says, in what is traced inside."""
    parse(asked)
    with _asked(asked):
        yield


@contextlib.contextmanager
def record() -> Iterator[dict[str, set[str]]]:
    """Record the backends that this thread chooses inside, by operation.

    A function that jax.jit has cached is not traced again, and so chooses none.
    """
    chosen: dict[str, set[str]] = {}
    token = _recorders.set((*_recorders.get(), chosen))
    try:
        yield chosen
    finally:
        _recorders.reset(token)


def describe(chosen: Mapping[str, set[str]]) -> str:
    """What `record` recorded, in one line."""
    return ", ".join(f"{name} {'/'.join(sorted(chosen[name]))}" for name in sorted(chosen))


def target_platform() -> str:
    """'cpu', 'gpu' or 'tpu': of the mesh that is set, be its devices here or not, else of JAX."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return jax.default_backend() if device is None else device.platform


def target_device_kind() -> str:
    """Kind of the device that is compiled for, such as 'NVIDIA H100 80GB HBM3'."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return jax.devices()[0].device_kind if device is None else device.device_kind


def target_capability() -> int | None:
    """Compute capability, as 90, of the NVIDIA GPU that is compiled for; None: not known."""
    if jax.default_backend() == "gpu":
        found = str(jax.local_devices()[0].compute_capability)  # of an AMD GPU a name, 'gfx942'
        return round(10 * float(found)) if re.fullmatch(r"\d+\.\d", found) else None
    kind = target_device_kind()
    return next((value for name, value in _CAPABILITIES.items() if name in kind), None)


def _asked_of(operation: str) -> str:
    """What the user asks of an operation."""
    asked = parse(os.environ.get(ENVIRONMENT_VARIABLE) or _asked.value)
    return asked.get(operation, asked["*"])


@functools.cache
def _log_once(message: str) -> None:
    _log.warning(message)
