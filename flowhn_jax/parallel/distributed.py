"""Several processes of one run: who they are, and what the first one does before the others."""

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

_SECONDS_TO_BE_DEAD = 30  # of no heartbeat; then the other processes end, too


def initialize(
    coordinator_address: str | None, num_processes: int | None, process_id: int | None
) -> None:
    """Joins this process to the others of its run; before anything else of JAX.

    The others are those that the arguments name, else the tasks of a SLURM step of several, else
    the hosts of a Cloud TPU, else none.

    Args:
      coordinator_address: host:port of process 0, the same in all processes.
      num_processes: how many there are.
      process_id: which one this is, 0 to num_processes - 1.

    Raises:
      ValueError: some arguments are given and some are not, or they do not fit each other.
    """
    arguments = coordinator_address, num_processes, process_id
    # Signals are noted by `training.preemption`, in Python.
    jax.config.update("jax_enable_preemption_service", False)
    dead_after = {"heartbeat_timeout_seconds": _SECONDS_TO_BE_DEAD}
    if all(argument is None for argument in arguments):
        if int(os.environ.get("SLURM_NTASKS", 1)) > 1 or on_cloud_tpu():
            jax.distributed.initialize(**dead_after)
            _end_with_the_others()
        return
    if any(argument is None for argument in arguments):
        raise ValueError(
            "--coordinator_address, --num_processes and --process_id go together; found "
            f"{short_repr(coordinator_address)}, {num_processes} and {process_id}."
        )
    if not 0 <= process_id < num_processes:
        raise ValueError(f"--process_id is {process_id}; accepted is 0 to {num_processes - 1}.")
    jax.distributed.initialize(coordinator_address, num_processes, process_id, **dead_after)
    _end_with_the_others()


# In the coordinator's store: written by a process that ends with an error, and by each that has
# seen it and leaves.
_FAILED, _LEFT = "flowhn/failed", "flowhn/left"
_SECONDS_BETWEEN_LOOKS = 0.5
_MILLISECONDS_OF_A_LOOK = 500
_SECONDS_FOR_THE_OTHERS, _SECONDS_TO_LEAVE = 10.0, 2.0


def _state() -> Any:
    """Return JAX's state of this run: `process_id`, `num_processes` and the coordinator's `client`.

    JAX has no public name for it. Unlike `jax.process_index` it needs no device.
    """
    from jax._src import distributed

    return distributed.global_state


def _end_with_the_others() -> None:
    """Look in the background for another process's error, and end with status 1 when there is one.

    Without it the others would wait in a collective for the one that is gone, until the coordinator
    misses its heartbeat and aborts them.
    """
    state, is_over = _state(), threading.Event()

    def look() -> None:
        while not is_over.wait(_SECONDS_BETWEEN_LOOKS):
            if _has_failed(state):
                _leave(state)

    if state.num_processes > 1:
        threading.Thread(target=look, name="errors of others", daemon=True).start()
        atexit.register(is_over.set)  # before JAX's own end, which was registered earlier


class FailedElsewhere(OSError):
    """Another process of the run has an error, whose message is the one to print."""

    def __init__(self):
        super().__init__("another process of the run has failed; its output says why")


def _has_failed(state: Any) -> bool:
    """Return whether a process has recorded an error."""
    try:
        state.client.key_value_try_get(_FAILED)
    except Exception:  # not there; or the coordinator is gone, which it reports itself
        return False
    return True


def _leave(state: Any) -> NoReturn:
    """End this process with status 1, that of the coordinator after the others."""
    sys.stdout.flush()
    with contextlib.suppress(Exception):
        state.client.key_value_set(f"{_LEFT}/{state.process_id}", "", allow_overwrite=True)
        if state.process_id == 0:
            deadline = time.monotonic() + _SECONDS_FOR_THE_OTHERS
            while time.monotonic() < deadline:
                if len(state.client.key_value_dir_get(_LEFT)) == state.num_processes:
                    break
                time.sleep(_SECONDS_BETWEEN_LOOKS)
            time.sleep(_SECONDS_TO_LEAVE)  # one that still runs when the store goes is aborted
    os._exit(1)


def end_all(message: str, error: BaseException) -> NoReturn:
    """Print an error and end all processes of the run with status 1, within seconds.

    The message appears once, in the process that has the error first: what the others raise when it
    is gone is of no interest. Call it in runs of several processes.
    """
    state = _state()
    if isinstance(error, FailedElsewhere):
        deadline = time.monotonic() + _SECONDS_FOR_THE_OTHERS
        while not _has_failed(state) and time.monotonic() < deadline:
            time.sleep(_SECONDS_BETWEEN_LOOKS)
    if _is_first_to_fail(state):
        print(message, file=sys.stderr, flush=True)
    _leave(state)


def _is_first_to_fail(state: Any) -> bool:
    """Record that this process has an error; return whether no other one did so before."""
    try:
        state.client.key_value_set(_FAILED, str(state.process_id))
    except Exception as error:  # if the coordinator is gone, the others know
        return "ALREADY_EXISTS" not in str(error)
    return True


class Meeting:
    """Barriers of work in background threads, which end where a process has given up."""

    def __init__(self, name: str):
        """`name` is the same in all processes, and of one piece of work alone."""
        state = _state()
        self._client = state.client if is_one_of_several() else None
        self._processes = state.num_processes
        self._name = f"flowhn/{name}"
        self._lock = threading.Lock()
        self._uses: collections.Counter[str] = collections.Counter()  # of barriers, by their keys
        self._failure: str | None = None

    def wait(self, key: str, seconds: float) -> None:
        """Wait until all processes have come to the barrier `key`, in whichever thread.

        Raises:
          FailedElsewhere: one of them has given up.
          TimeoutError: they have not come within so many seconds.
        """
        if self._client is None:
            return
        with self._lock:
            barrier = f"{self._name}/{key}/{self._uses[key]}"
            self._uses[key] += 1
        if self._client.key_value_increment(f"{barrier}/count", 1) == self._processes:
            self._client.key_value_set(f"{barrier}/all", "")
        self.wait_for_value(f"{barrier}/all", seconds)

    def wait_for_value(self, key: str, seconds: float) -> str:
        """Return what some process writes under a key of the coordinator's; raise as `wait`."""
        deadline = time.monotonic() + seconds
        while True:
            try:
                return self._client.blocking_key_value_get(key, _MILLISECONDS_OF_A_LOOK)
            except jax.errors.JaxRuntimeError as error:  # it is not there yet
                if self.failure() is not None:
                    raise FailedElsewhere from None
                if "DEADLINE_EXCEEDED" not in str(error):
                    raise
                if time.monotonic() > deadline:
                    raise TimeoutError(f"not all processes have come to {key!r}") from error

    def fail(self, reason: str) -> None:
        """Give up; of several processes that do, the reason of the first one counts."""
        if self._client is None:
            self._failure = self._failure or reason
            return
        with contextlib.suppress(Exception):  # there is one already
            self._client.key_value_set(f"{self._name}/failure", reason)

    def failure(self) -> str | None:
        """Return the reason for which a process has given up."""
        if self._failure is None and self._client is not None:
            with contextlib.suppress(Exception):  # there is none
                self._failure = self._client.key_value_try_get(f"{self._name}/failure")
        return self._failure

    def forget(self) -> None:
        """Remove what the coordinator keeps of it, when no process needs it any more."""
        if self._client is not None and _state().process_id == 0:
            with contextlib.suppress(Exception):
                self._client.key_value_delete(self._name)


def is_one_of_several() -> bool:
    """Return whether this process has joined others."""
    state = _state()
    return state.client is not None and state.num_processes > 1


def shutdown() -> None:
    """Leaves the run, as do the other processes; what an orderly end of the process does itself."""
    if jax.process_count() > 1:
        jax.distributed.shutdown()


def on_cloud_tpu() -> bool:
    """Whether this host has TPU chips and their library; one host alone may initialize, too."""
    chips = glob.glob("/dev/accel*") + glob.glob("/dev/vfio/[0-9]*")
    asked = os.environ.get("JAX_PLATFORMS", "tpu")
    return bool(chips) and "tpu" in asked and importlib.util.find_spec("libtpu") is not None


def is_first() -> bool:
    """Whether this process writes the logs and small files of the run."""
    return jax.process_index() == 0


@contextlib.contextmanager
def first_before_others(name: str) -> Iterator[None]:
    """What is inside is run by the first process, and only then by the others, which find it done.

    Args:
      name: of the step, for the message where a process does not come by.
    """
    if not is_first():
        multihost_utils.sync_global_devices(name)
    yield
    if is_first() and jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)


def any_process(flag: bool) -> bool:
    """Whether the flag is set in any process; all must call it, and wait for each other."""
    if jax.process_count() == 1:
        return flag
    return bool(np.any(multihost_utils.process_allgather(np.array(flag))))


class AnyProcessBefore:
    """Whether a flag was set in any process at the call before; the same answer in all.

    All processes must call it at the same places. It waits for what the devices were given before
    the call before, not for what they were given since: the devices are never idle for it.
    """

    def __init__(self, mesh: Mesh):
        """`mesh` holds all devices."""
        self._sharding = NamedSharding(mesh, P(mesh.axis_names))
        self._any = jax.jit(jnp.any, out_shardings=NamedSharding(mesh, P()))
        self._before: jax.Array | None = None
        self.delay = min(jax.process_count() - 1, 1)  # calls until a flag is known to all

    def __call__(self, flag: bool) -> bool:
        """The flags of the call before; of this one in a run of one process."""
        if jax.process_count() == 1:
            return flag
        flags = jax.make_array_from_callback(
            (self._sharding.mesh.size,), self._sharding, lambda _: np.array([flag])
        )
        before, self._before = self._before, self._any(flags)
        return before is not None and bool(before)


def broadcast_from_first(value: Value) -> Value:
    """Return the value that the first process has, bit for bit: any that JSON can hold.

    All processes must call it. As text, since JAX without x64 would round a float64.
    """
    if jax.process_count() == 1:
        return value
    text = json.dumps(value).encode()
    size = int(multihost_utils.broadcast_one_to_all(np.int32(len(text))))
    data = np.frombuffer(text.ljust(size)[:size], np.uint8)  # of the others only its size counts
    return json.loads(bytes(multihost_utils.broadcast_one_to_all(data)))
