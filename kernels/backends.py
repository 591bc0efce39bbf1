"""Choose the backend of an operation by the platform it is compiled for, or as the user asks.

The user asks with one string, in the environment variable FLOWHN_KERNELS_BACKEND or, if that is not
set, in the config key kernels.backend (`use`):

  auto                                 the best backend of each operation for the platform
  xla                                  no hand-written kernels: plain XLA
  selective_scan=triton,attention=xla  these backends for these operations, 'auto' for the others

Both are read when a function is traced. `use` is part of the cache key of `jax.jit`, so a function
is traced again for another string; the environment variable must be set before the program starts.

If a backend cannot run an operation, the next best runs it, and the reason is logged once.
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

# Compute capabilities by name, for programs compiled ahead of time without such a GPU.
_CAPABILITIES = {"A100": 80, "H100": 90, "H200": 90, "B200": 100}

_log = logging.getLogger(__name__)

# Part of the cache key of jax.jit: a function is traced again when another backend is requested.
_requested = jax.make_user_context(AUTO)
# Per thread, so that programs traced at the same time are recorded separately.
_recorders: contextvars.ContextVar[tuple[dict[str, set[str]], ...]] = contextvars.ContextVar(
    "recorders", default=()
)


class CannotServeError(ValueError):
    """The requested backend does not take these arguments."""


def _runs_everything(*_: Any) -> None:
    return None


@dataclasses.dataclass(frozen=True)
class Backend:
    """One way to run an operation.

    Attributes:
      run: runs the operation on its inputs, for which `unsupported` returns None.
      platforms: those of 'cpu', 'gpu', 'tpu' that it runs on.
      unsupported: takes the same inputs, of which it may read shapes and dtypes; returns why it
        cannot run them on one of its platforms (a package may be missing), or None if it can.
    """

    run: Callable[..., Any]
    platforms: tuple[str, ...] = ("cpu", "gpu", "tpu")
    unsupported: Callable[..., str | None] = _runs_everything


@dataclasses.dataclass(frozen=True)
class Operation:
    """An operation's backends by name, and their order of preference by platform.

    The last of each order is plain XLA, which runs everything.
    """

    name: str
    backends: Mapping[str, Backend]
    preference: Mapping[str, tuple[str, ...]]

    def choose(self, *inputs: Any, backend: str | None = None) -> Callable[..., Any]:
        """Return the function to call with `inputs`.

        Args:
          *inputs: those of the operation's backends.
          backend: name of the backend; None: as the user asks, or the best that can run them.

        Raises:
          ValueError: `backend`, or the user, names a backend that does not exist; or `backend`
            cannot run the inputs.
        """
        platform = target_platform()
        if backend is not None:
            self.check_name(backend)
            if reason := self._refusal(backend, platform, inputs):
                raise CannotServeError(f"{self.name}: cannot run on backend {backend!r}: {reason}")
            return self._record(backend)
        order = self.preference[platform]
        requested = _requested_for(self.name)
        if requested == XLA:
            order = order[-1:]
        elif requested != AUTO:
            self.check_name(requested)
            order = (requested, *(name for name in order if name != requested))
        refused = []
        *others, name = order
        for other in others:
            reason = self._refusal(other, platform, inputs)
            if reason is None:
                name = other
                break
            refused.append(f"cannot run on {other} ({reason})")
        if refused:
            _log_once(f"{self.name}: {', '.join(refused)}; running on {name} instead")
        return self._record(name)

    def check_name(self, backend: str) -> None:
        """Raise a ValueError if the operation has no backend of this name."""
        if backend not in self.backends:
            names = ", ".join(map(repr, sorted(self.backends)))
            raise ValueError(f"{self.name}: backend must be one of {names}; got {backend!r:.80}")

    def _refusal(self, name: str, platform: str, inputs: tuple[Any, ...]) -> str | None:
        backend = self.backends[name]
        if platform not in backend.platforms:
            return f"it needs platform {' or '.join(backend.platforms)}, this is {platform}"
        return backend.unsupported(*inputs)

    def _record(self, name: str) -> Callable[..., Any]:
        """Record the choice of a backend and return its function."""
        for recorder in _recorders.get():
            recorder.setdefault(self.name, set()).add(name)
        return self.backends[name].run


def parse(requested: str) -> dict[str, str]:
    """Return the backend requested for each operation, by name; '*' stands for all others.

    Raises:
      ValueError: the string has not the form in the module's docstring. Names are not looked up.
    """
    if requested in (AUTO, XLA):
        return {"*": requested}
    items = [item.strip().partition("=") for item in requested.split(",")]
    operations = {operation for operation, _, _ in items}
    named_once = len(operations) == len(items) and "*" not in operations
    if not named_once or not all(operation and backend for operation, _, backend in items):
        raise ValueError(
            "the value must be 'auto', 'xla' or OPERATION=BACKEND,... with each operation once, "
            f"e.g. 'selective_scan=xla_associative,attention=xla'; got {requested!r:.80}"
        )
    return {operation: backend for operation, _, backend in items} | {"*": AUTO}


@contextlib.contextmanager
def use(requested: str) -> Iterator[None]:
    """Request backends, in the form of the module's docstring, for what is traced inside."""
    parse(requested)
    with _requested(requested):
        yield


@contextlib.contextmanager
def record() -> Iterator[dict[str, set[str]]]:
    """Record the backends that this thread chooses inside, by operation.

    A function that jax.jit has cached is not traced again and records nothing.
    """
    chosen: dict[str, set[str]] = {}
    token = _recorders.set((*_recorders.get(), chosen))
    try:
        yield chosen
    finally:
        _recorders.reset(token)


def describe(chosen: Mapping[str, set[str]]) -> str:
    """Return what `record` recorded, in one line."""
    return ", ".join(f"{name} {'/'.join(sorted(chosen[name]))}" for name in sorted(chosen))


def target_platform() -> str:
    """Return 'cpu', 'gpu' or 'tpu': that of the mesh that is set (maybe abstract), else JAX's."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return jax.default_backend() if device is None else device.platform


def target_device_kind() -> str:
    """Return the kind of the device that is compiled for, such as 'NVIDIA H100 80GB HBM3'."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return jax.devices()[0].device_kind if device is None else device.device_kind


def target_capability() -> int | None:
    """Return the compute capability, as 90, of the NVIDIA GPU compiled for; None if not known."""
    if jax.default_backend() == "gpu":
        found = str(jax.local_devices()[0].compute_capability)  # of an AMD GPU a name, 'gfx942'
        return round(10 * float(found)) if re.fullmatch(r"\d+\.\d", found) else None
    kind = target_device_kind()
    return next((value for name, value in _CAPABILITIES.items() if name in kind), None)


def _requested_for(operation: str) -> str:
    """Return the backend that the user requests for an operation."""
    requested = parse(os.environ.get(ENVIRONMENT_VARIABLE) or _requested.value)
    return requested.get(operation, requested["*"])


@functools.cache
def _log_once(message: str) -> None:
    _log.warning(message)
