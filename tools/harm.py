"""Kinds of harm to a training run, each with the promise that the run must keep."""

import contextlib
import dataclasses
import random
import signal
import socket
from collections.abc import Callable

from flowhn_jax.checkpoints.files import COMMITTED, is_committed
from flowhn_jax.storage import AnyPath, Place, place
from tools.disk import FileLimit, SmallDisk
from tools.faults import FaultyStore
from tools.trainer import Trainer

KILL = "SIGKILL"
PATIENCE = 180.0  # seconds; a process that takes longer to start or end counts as hanging
_MANIFEST = "manifest.json"
_PROCESSES = 4
_CHECKPOINT_BYTES = 2**20  # approximate size of the small run's checkpoints


class Damages:
    """Damages files of checkpoints and remembers which checkpoints are damaged."""

    def __init__(self):
        self._left: dict[Place, bytes | None] = {}  # None: the file was deleted

    def _is_damaged(self, checkpoint: Place) -> bool:
        def still(path: Place, content: bytes | None) -> bool:
            return (path.read() if path.is_file() else None) == content

        return any(
            still(path, content)
            for path, content in self._left.items()
            if str(path).startswith(f"{checkpoint}/")
        )

    def whole(self, workdir: AnyPath) -> list[Place]:
        """Return the finished checkpoints that were not damaged, newest first."""
        found = (
            path
            for path in (place(workdir) / "checkpoints").children()
            if path.name.isdecimal() and is_committed(path) and (path / _MANIFEST).is_file()
        )
        whole = [path for path in found if not self._is_damaged(path)]
        return sorted(whole, key=lambda path: int(path.name), reverse=True)

    def damage(self, workdir: AnyPath, rng: random.Random) -> str | None:
        """Damage a file of the newest checkpoint.

        Returns:
          A description, or None if nothing was damaged because no other checkpoint is whole.
        """
        whole = self.whole(workdir)
        if len(whole) < 2:
            return None
        files = [file for file in whole[0].walk() if file[1].size()]
        name, path = rng.choice(files)
        how, content = rng.choice(("truncated", "flipped", "deleted")), path.read()
        at = rng.randrange(len(content))
        if how == "deleted":
            path.remove()
            self._left[path] = None
        else:
            flipped = bytes([content[at] ^ 1 << rng.randrange(8)])
            rest = flipped + content[at + 1 :] if how == "flipped" else b""
            damaged = content[:at] + rest
            self._left[path] = damaged
            path.write(damaged)
        return f"{how} checkpoints/{whole[0].name}/{name} at byte {at} of {len(content)}"


@dataclasses.dataclass(frozen=True)
class Scene:
    """The run to harm, its disk and its trainer process."""

    rng: random.Random
    workdir: Place
    disk: SmallDisk | FileLimit | FaultyStore
    damages: Damages
    trainer: Trainer  # running, or just ended
    start: Callable[..., Trainer]  # starts another trainer in the same workdir, with extra flags


@dataclasses.dataclass(frozen=True)
class Outcome:
    """The result of harm; the trainer has ended."""

    description: str
    broken: str | None = None  # the broken promise
    harm: str | None = None  # the entry of HARMS that was done instead of the intended one


def _kill(scene: Scene) -> Outcome:
    scene.trainer.send(signal.SIGKILL)
    return Outcome(f"status {scene.trainer.wait(None)}")


def _may_die(trainer: Trainer) -> bool:
    """Return whether a signal may kill Python: no handler is installed, nothing was printed."""
    return not trainer.handles(signal.SIGTERM) and not trainer.lines


def _stop(number: signal.Signals) -> Callable[[Scene], Outcome]:
    def stop(scene: Scene) -> Outcome:
        trainer, may_die = scene.trainer, _may_die(scene.trainer)
        trainer.send(number)
        status = trainer.wait(PATIENCE)
        description = f"status {status}"
        if may_die and status is not None:
            return Outcome(f"{description}, before its handlers were installed")
        if status != 0:
            return Outcome(description, f"after {number.name} the status was {status} and not 0")
        whole = scene.damages.whole(scene.workdir)
        newest = int(whole[0].name) if whole else 0
        if newest < (trainer.step or 0):
            broken = f"the newest checkpoint is of step {newest}, before row {trainer.step}"
            return Outcome(description, broken)
        return Outcome(description)

    return stop


def _stop_then_kill(scene: Scene) -> Outcome:
    scene.trainer.send(signal.SIGTERM)
    seconds = scene.rng.uniform(0, 0.5)
    scene.trainer.wait(seconds)
    scene.trainer.send(signal.SIGKILL)
    return Outcome(f"SIGKILL {seconds:.2f} s later, status {scene.trainer.wait(None)}")


def _fill_disk(scene: Scene) -> Outcome:
    """Fill the disk for a while; kill or stop the run while it is full, or after freeing it."""
    rng, trainer = scene.rng, scene.trainer
    leave = rng.choice((0, rng.randrange(2 * _CHECKPOINT_BYTES)))
    trained = trainer.seconds_to_first_row is not None
    scene.disk.fill(trainer.pid, leave)
    trainer.wait(rng.uniform(0.2, 4))
    frees_first, number = rng.random() < 0.3, rng.choice((signal.SIGKILL, signal.SIGTERM))
    if frees_first:
        scene.disk.free(trainer.pid)
        trainer.wait(rng.uniform(0, 2))
    ended, may_die = trainer.status is not None, _may_die(trainer)
    if not ended:
        trainer.send(number)
    status = trainer.wait(PATIENCE)
    scene.disk.free(trainer.pid)
    what = "the run ended by itself" if ended else number.name
    when = " after freeing it" if frees_first else ""
    description = f"{leave:,} bytes left, {what}{when}, status {status}"
    if ended and status != 0 and trained and not trainer.is_last_step:
        return Outcome(description, "a full disk ended the run before the last step")
    killed = not ended and (may_die or number == signal.SIGKILL) and status == -number
    if status == 0 or killed:
        return Outcome(description)
    errors = [line for line in trainer.lines if line.startswith("error:")]
    if status is None or status < 0 or not errors:
        broken = f"a full disk ended the run with status {status} and {len(errors)} errors"
        return Outcome(description, broken)
    return Outcome(f"{description}, {errors[0]}")


def _damage(scene: Scene) -> Outcome:
    """Kill the run and damage a file of the newest checkpoint, if another one is whole."""
    description = _kill(scene).description
    damaged = scene.damages.damage(scene.workdir, scene.rng)
    if damaged is None:
        return Outcome(f"{description}, and only one checkpoint is whole", harm=KILL)
    return Outcome(f"{description}, {damaged}")


def _kill_deletion(scene: Scene) -> Outcome:
    """Kill the run, and leave the oldest of several checkpoints half deleted."""
    description = _kill(scene).description
    whole = scene.damages.whole(scene.workdir)
    if len(whole) < 2:
        return Outcome(f"{description}, and there are fewer than two checkpoints", harm=KILL)
    oldest = whole[-1]
    aside = oldest.parent / f"deleted.{oldest.name}"
    if aside.exists():  # the kill came during a real deletion
        return Outcome(f"{description}, while {aside.name} was removed")
    if oldest.is_remote:  # nothing is renamed
        aside = oldest
        (oldest / COMMITTED).remove()
    else:
        oldest.rename(aside, COMMITTED)
    files = [path for _, path in aside.walk()]
    removed = scene.rng.sample(files, scene.rng.randrange(len(files)))
    for path in removed:
        path.remove()
    removal = f"{len(removed)} of {len(files)} files of {aside.name} removed"
    return Outcome(f"{description}, {removal}")


def _start_second(removes_lock: bool) -> Callable[[Scene], Outcome]:
    """Return harm that starts a second trainer, which must fail, and then kills the first."""

    def start_second(scene: Scene) -> Outcome:
        first = scene.trainer
        if not first.wait_for_step(PATIENCE):
            return Outcome(_kill(scene).description, harm=KILL)
        if removes_lock:
            (scene.workdir / "lock").remove()
        with scene.start() as second:
            while first.status is None and second.wait(0.1) is None and second.age < PATIENCE:
                pass
            if first.status is not None:  # the second one may then resume it
                broken = (
                    None
                    if first.status == 0
                    else "the first trainer failed while a second one started"
                )
                return Outcome(f"status {first.status} before the second was ready", broken, KILL)
            status, lines = second.status, second.lines
        first.wait(scene.rng.uniform(0, 1))
        description = f"second trainer: status {status}; first: {_kill(scene).description}"
        holder = "another process" if removes_lock else f"process {first.pid} "
        named = any(line.startswith("error:") and holder in line for line in lines)
        if status in (0, None) or not named:
            last = lines[-1] if lines else "nothing"
            broken = f"the second trainer's error should name {holder}; its last line is: {last}"
            return Outcome(description, broken)
        return Outcome(description)

    return start_second


def _fail_one_of_four(scene: Scene) -> Outcome:
    """Kill the run and resume it with four processes, one of which does not find the data."""
    description, failing = _kill(scene).description, scene.rng.randrange(_PROCESSES)
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    flags = [f"--coordinator_address={address}", f"--num_processes={_PROCESSES}"]
    flags.append(f"--config.mesh.data={_PROCESSES}")
    with contextlib.ExitStack() as stack:
        trainers = []
        for number in range(_PROCESSES):
            absent = ["--config.data.path=absent"] if number == failing else []
            one = scene.start(*flags, f"--process_id={number}", *absent)
            trainers.append(stack.enter_context(one))
        statuses = [trainer.wait(PATIENCE) for trainer in trainers]
        lines = [line for trainer in trainers for line in trainer.lines]
    errors = [line for line in lines if line.startswith("error:")]
    description += f", then process {failing} of four failed: statuses {statuses}, {errors}"
    if any(status is None or status <= 0 for status in statuses):
        return Outcome(description, f"an error of one process ended four with statuses {statuses}")
    if len(errors) != 1 or "absent" not in errors[0]:
        broken = f"an error of one of four processes gave {len(errors)} messages"
        return Outcome(description, broken)
    return Outcome(description)


HARMS: dict[str, Callable[[Scene], Outcome]] = {
    KILL: _kill,
    "SIGTERM": _stop(signal.SIGTERM),
    "SIGINT": _stop(signal.SIGINT),
    "SIGTERM_SIGKILL": _stop_then_kill,
    "disk_full": _fill_disk,
    "damage": _damage,
    "killed_deletion": _kill_deletion,
    "one_of_four": _fail_one_of_four,
    "second_trainer": _start_second(removes_lock=False),
    "removed_lock": _start_second(removes_lock=True),
}
# In a bucket the file is the lock, so that removing it is no harm but a permission.
ONLY_LOCAL = ("removed_lock",)
