"""The processes of a run: how they join, agree and end together."""

import atexit
import collections
import contextlib
import glob
import importlib.util
import json
import os
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any, NoReturn, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from flowhn_jax.utils.text import short_repr

Value = TypeVar("Value")

_HEARTBEAT_SECONDS = 30  # without one a process counts as dead, and the others end


def initialize(
    coordinator_address: str | None, num_processes: int | None, process_id: int | None
) -> None:
    """Join the other processes of the run; call it before JAX uses any device.

    The processes are those that the arguments name, otherwise the tasks of a SLURM step, otherwise
    the hosts of a Cloud TPU slice, otherwise this one alone.

    Args:
      coordinator_address: host:port of process 0, the same in all processes.
      num_processes: number of processes.
      process_id: number of this process, 0 to num_processes - 1.

    Raises:
      ValueError: only some arguments are given, or process_id is out of range.
    """
    # `training.health.preemption` handles signals, in Python.
    jax.config.update("jax_enable_preemption_service", False)
    if coordinator_address is None and num_processes is None and process_id is None:
        if int(os.environ.get("SLURM_NTASKS", 1)) > 1 or on_cloud_tpu():
            jax.distributed.initialize(heartbeat_timeout_seconds=_HEARTBEAT_SECONDS)
            _end_with_the_others()
        return
    if coordinator_address is None or num_processes is None or process_id is None:
        raise ValueError(
            "--coordinator_address, --num_processes and --process_id must be given together; got "
            f"{short_repr(coordinator_address)}, {num_processes} and {process_id}."
        )
    if not 0 <= process_id < num_processes:
        raise ValueError(
            f"--process_id must be 0 to {num_processes - 1}, below --num_processes; got "
            f"{process_id}."
        )
    jax.distributed.initialize(
        coordinator_address,
        num_processes,
        process_id,
        heartbeat_timeout_seconds=_HEARTBEAT_SECONDS,
    )
    _end_with_the_others()


# Keys in the coordinator's store: the first is written by a process that ends with an error, the
# second by each process that has seen it and leaves.
_FAILED, _LEFT = "flowhn/failed", "flowhn/left"
_SECONDS_BETWEEN_POLLS = 0.5
_POLL_MILLISECONDS = 500
_SECONDS_FOR_THE_OTHERS, _SECONDS_TO_LEAVE = 10.0, 2.0


def _state() -> Any:
    """Return JAX's record of the run: `process_id`, `num_processes` and the coordinator's `client`.

    JAX has no public name for it. Unlike `jax.process_index` it does not initialise devices.
    """
    from jax._src import distributed

    return distributed.global_state


def _end_with_the_others() -> None:
    """Poll in the background for another process's error, and exit with status 1 if there is one.

    Otherwise this process would wait in a collective for the one that has gone, until the
    coordinator misses its heartbeat and aborts the run.
    """
    state, is_over = _state(), threading.Event()

    def poll() -> None:
        while not is_over.wait(_SECONDS_BETWEEN_POLLS):
            if _has_failed(state):
                _leave(state)

    if state.num_processes > 1:
        threading.Thread(target=poll, name="errors of others", daemon=True).start()
        atexit.register(is_over.set)  # runs before JAX's own handler, which was registered earlier


class FailedElsewhereError(OSError):
    """Another process of the run has failed; its message is the one to print."""

    def __init__(self):
        super().__init__("another process of the run has failed; its output says why")


def _has_failed(state: Any) -> bool:
    """Return whether a process has recorded an error."""
    try:
        state.client.key_value_try_get(_FAILED)
    except Exception:  # there is none; or the coordinator is gone, which JAX reports
        return False
    return True


def _leave(state: Any) -> NoReturn:
    """Exit with status 1; process 0, which runs the coordinator, exits after the others."""
    sys.stdout.flush()
    with contextlib.suppress(Exception):
        state.client.key_value_set(f"{_LEFT}/{state.process_id}", "", allow_overwrite=True)
        if state.process_id == 0:
            deadline = time.monotonic() + _SECONDS_FOR_THE_OTHERS
            while time.monotonic() < deadline:
                if len(state.client.key_value_dir_get(_LEFT)) == state.num_processes:
                    break
                time.sleep(_SECONDS_BETWEEN_POLLS)
            time.sleep(_SECONDS_TO_LEAVE)  # a process that outlives the store is aborted
    os._exit(1)


def end_all(message: str, error: BaseException) -> NoReturn:
    """Print an error and end all processes of the run with status 1, within seconds.

    Only the process that fails first prints its message: the errors of the others follow from it.
    Call it in runs of several processes.
    """
    state = _state()
    if isinstance(error, FailedElsewhereError):
        deadline = time.monotonic() + _SECONDS_FOR_THE_OTHERS
        while not _has_failed(state) and time.monotonic() < deadline:
            time.sleep(_SECONDS_BETWEEN_POLLS)
    if _is_first_to_fail(state):
        print(message, file=sys.stderr, flush=True)
    _leave(state)


def _is_first_to_fail(state: Any) -> bool:
    """Record that this process has an error; return whether it is the first to do so."""
    try:
        state.client.key_value_set(_FAILED, str(state.process_id))
    except Exception as error:  # otherwise the coordinator is gone, and the others know
        return "ALREADY_EXISTS" not in str(error)
    return True


class Meeting:
    """Barriers between background threads of all processes, which end when a process gives up."""

    def __init__(self, name: str):
        """Meet under a name that is the same in all processes and unique to a piece of work."""
        state = _state()
        self._client = state.client if is_one_of_several() else None
        self._processes = state.num_processes
        self._name = f"flowhn/{name}"
        self._lock = threading.Lock()
        self._uses: collections.Counter[str] = collections.Counter()  # of each barrier, by key
        self._failure: str | None = None

    def wait(self, key: str, seconds: float) -> None:
        """Wait until all processes have reached the barrier `key`, in whichever thread.

        Raises:
          FailedElsewhereError: one of them has given up.
          TimeoutError: they have not reached it within this many seconds.
        """
        if self._client is None:
            return
        with self._lock:
            barrier = f"{self._name}/{key}/{self._uses[key]}"
            self._uses[key] += 1
        if self._client.key_value_increment(f"{barrier}/count", 1) == self._processes:
            self._client.key_value_set(f"{barrier}/all", "")
        self.wait_for_value(f"{barrier}/all", seconds)

    def wait_for_value(self, key: str, timeout_secs: float) -> str:
        """Return what a process writes under a key of the coordinator's store; raise as `wait`."""
        assert self._client is not None
        deadline = time.monotonic() + timeout_secs
        while True:
            try:
                return self._client.blocking_key_value_get(key, _POLL_MILLISECONDS)
            except jax.errors.JaxRuntimeError as error:  # it is not there yet
                if self.failure() is not None:
                    raise FailedElsewhereError from None
                if "DEADLINE_EXCEEDED" not in str(error):
                    raise
                if time.monotonic() > deadline:
                    raise TimeoutError(f"not all processes have reached {key!r}") from error

    def fail(self, reason: str) -> None:
        """Give up; if several processes do, the reason of the first one counts."""
        if self._client is None:
            self._failure = self._failure or reason
            return
        with contextlib.suppress(Exception):  # another process was first
            self._client.key_value_set(f"{self._name}/failure", reason)

    def failure(self) -> str | None:
        """Return the reason for which a process has given up; None: none has."""
        if self._failure is None and self._client is not None:
            with contextlib.suppress(Exception):  # no process has
                self._failure = self._client.key_value_try_get(f"{self._name}/failure")
        return self._failure

    def forget(self) -> None:
        """Remove its keys from the coordinator's store, when no process needs them any more."""
        if self._client is not None and _state().process_id == 0:
            with contextlib.suppress(Exception):
                self._client.key_value_delete(self._name)


def is_one_of_several() -> bool:
    """Return whether this process has joined others."""
    state = _state()
    return state.client is not None and state.num_processes > 1


def shutdown() -> None:
    """Leave the run together with the other processes, as a process that exits normally does."""
    if jax.process_count() > 1:
        jax.distributed.shutdown()


def on_cloud_tpu() -> bool:
    """Return whether this host has TPU chips and libtpu, and JAX may use them."""
    chips = glob.glob("/dev/accel*") + glob.glob("/dev/vfio/[0-9]*")
    platforms = os.environ.get("JAX_PLATFORMS", "tpu")
    return bool(chips) and "tpu" in platforms and importlib.util.find_spec("libtpu") is not None


def is_first() -> bool:
    """Return whether this is the first process, which writes the run's logs and small files."""
    return jax.process_index() == 0


@contextlib.contextmanager
def first_before_others(name: str) -> Iterator[None]:
    """Run the context in the first process, then in the others, which find its work done.

    Args:
      name: the name of the work, for the message if a process does not arrive.
    """
    if not is_first():
        multihost_utils.sync_global_devices(name)
    yield
    if is_first() and jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)


def any_process(flag: bool) -> bool:
    """Return whether the flag is set in any process; all must call it, and wait for each other."""
    if jax.process_count() == 1:
        return flag
    return bool(np.any(multihost_utils.process_allgather(np.array(flag))))


class AnyProcessBefore:
    """Tells whether a flag was set in any process at the previous call; the same answer in all.

    All processes must call it at the same places. It waits only for work that was dispatched before
    the previous call, so that the devices are never idle for it.
    """

    def __init__(self, mesh: Mesh):
        """Exchange flags over a mesh of all devices."""
        self._sharding = NamedSharding(mesh, P(mesh.axis_names))
        self._any = jax.jit(jnp.any, out_shardings=NamedSharding(mesh, P()))
        self._before: jax.Array | None = None
        self.delay = min(jax.process_count() - 1, 1)  # calls until all know of a flag

    def __call__(self, flag: bool) -> bool:
        """Return whether any flag was set at the previous call; of one process, at this call."""
        if jax.process_count() == 1:
            return flag
        flags = jax.make_array_from_callback(
            (self._sharding.mesh.size,), self._sharding, lambda _: np.array([flag])
        )
        before, self._before = self._before, self._any(flags)
        return before is not None and bool(before)


def broadcast_from_first(value: Value) -> Value:
    """Return the first process's value, bit for bit; it must be representable in JSON.

    All processes must call it. The value is sent as text, because JAX without x64 would round a
    float64.
    """
    if jax.process_count() == 1:
        return value
    text = json.dumps(value).encode()
    size = int(multihost_utils.broadcast_one_to_all(np.int32(len(text))))
    # In the other processes only the size matters.
    data = np.frombuffer(text.ljust(size)[:size], np.uint8)
    return json.loads(bytes(multihost_utils.broadcast_one_to_all(data)))
