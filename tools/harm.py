"""What can happen to a run that trains, and what it promises for that."""

import contextlib
import dataclasses
import pathlib
import random
import signal
import socket
from collections.abc import Callable

from tools.disk import FileLimit, SmallDisk
from tools.trainer import Trainer

KILL = "SIGKILL"
PATIENCE = 180.0  # seconds until what does not end, or come up, counts as hanging
_MANIFEST = "manifest.json"
_PROCESSES = 4
_CHECKPOINT_BYTES = 2**20  # about that of the small run


class Damages:
    """Damages files of checkpoints, and knows which ones are damaged."""

    def __init__(self):
        self._left: dict[pathlib.Path, bytes | None] = {}  # None: there is no such file

    def _is_damaged(self, checkpoint: pathlib.Path) -> bool:
        def still(path: pathlib.Path, content: bytes | None) -> bool:
            return (path.read_bytes() if path.is_file() else None) == content

        return any(
            still(path, content)
            for path, content in self._left.items()
            if checkpoint in path.parents
        )

    def whole(self, workdir: pathlib.Path) -> list[pathlib.Path]:
        """The finished checkpoints that were not damaged, from the newest on."""
        found = (
            path
            for path in (workdir / "checkpoints").glob("*")
            if path.name.isdecimal() and (path / _MANIFEST).is_file()
        )
        whole = [path for path in found if not self._is_damaged(path)]
        return sorted(whole, key=lambda path: int(path.name), reverse=True)

    def damage(self, workdir: pathlib.Path, rng: random.Random) -> str | None:
        """Damages a file of the newest checkpoint, and says how; None: no other one is whole."""
        whole = self.whole(workdir)
        if len(whole) < 2:
            return None
        files = sorted(path for path in whole[0].rglob("*") if path.is_file())
        path = rng.choice([path for path in files if path.stat().st_size])
        how, content = rng.choice(("truncated", "flipped", "deleted")), path.read_bytes()
        at = rng.randrange(len(content))
        if how == "deleted":
            path.unlink()
            self._left[path] = None
        else:
            flipped = bytes([content[at] ^ 1 << rng.randrange(8)])
            rest = flipped + content[at + 1 :] if how == "flipped" else b""
            self._left[path] = content[:at] + rest
            path.write_bytes(self._left[path])
        return f"{how} {path.relative_to(workdir)} at byte {at} of {len(content)}"


@dataclasses.dataclass(frozen=True)
class Scene:
    """Where harm is done."""

    rng: random.Random
    workdir: pathlib.Path
    disk: SmallDisk | FileLimit
    damages: Damages
    trainer: Trainer  # it runs, or has just ended
    start: Callable[..., Trainer]  # another one in the same workdir, with these flags as well


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What came of it; the trainer has ended."""

    told: str
    broken: str | None = None  # the promise
    harm: str | None = None  # which one of HARMS it came to; None: the one that was meant


def _kill(scene: Scene) -> Outcome:
    scene.trainer.send(signal.SIGKILL)
    return Outcome(f"status {scene.trainer.wait(None)}")


def _may_die(trainer: Trainer) -> bool:
    """Whether Python may die of a signal: our handlers are not there, and nothing was said."""
    return not trainer.handles(signal.SIGTERM) and not trainer.lines


def _stop(number: signal.Signals) -> Callable[[Scene], Outcome]:
    def stop(scene: Scene) -> Outcome:
        trainer, may_die = scene.trainer, _may_die(scene.trainer)
        trainer.send(number)
        status = trainer.wait(PATIENCE)
        told = f"status {status}"
        if may_die and status is not None:
            return Outcome(f"{told}, before its handlers were there")
        if status != 0:
            return Outcome(told, f"{number.name} did not end it with status 0, but {status}")
        whole = scene.damages.whole(scene.workdir)
        newest = int(whole[0].name) if whole else 0
        if newest < (trainer.step or 0):
            return Outcome(told, f"checkpoint of step {newest} behind row {trainer.step}")
        return Outcome(told)

    return stop


def _stop_then_kill(scene: Scene) -> Outcome:
    scene.trainer.send(signal.SIGTERM)
    seconds = scene.rng.uniform(0, 0.5)
    scene.trainer.wait(seconds)
    scene.trainer.send(signal.SIGKILL)
    return Outcome(f"SIGKILL {seconds:.2f} s behind it, status {scene.trainer.wait(None)}")


def _fill_disk(scene: Scene) -> Outcome:
    """A full disk for a while; the run is killed or stopped on it, or when it is freed."""
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
    what = "it ended by itself" if ended else number.name
    when = " when freed" if frees_first else ""
    told = f"{leave:,} bytes left, {what}{when}, status {status}"
    if ended and status != 0 and trained and not trainer.is_last_step:
        return Outcome(told, "a full disk ended it before the last step")
    killed = not ended and (may_die or number == signal.SIGKILL) and status == -number
    if status == 0 or killed:
        return Outcome(told)
    errors = [line for line in trainer.lines if line.startswith("error:")]
    if status is None or status < 0 or not errors:
        return Outcome(told, f"a full disk ended it with status {status} and {len(errors)} errors")
    return Outcome(f"{told}, {errors[0]}")


def _damage(scene: Scene) -> Outcome:
    """A damaged file of the newest checkpoint, where another one is whole."""
    told = _kill(scene).told
    damaged = scene.damages.damage(scene.workdir, scene.rng)
    if damaged is None:
        return Outcome(f"{told}, and only one checkpoint is whole", harm=KILL)
    return Outcome(f"{told}, {damaged}")


def _kill_deletion(scene: Scene) -> Outcome:
    """A kill, while the oldest checkpoint of several was being deleted."""
    told = _kill(scene).told
    whole = scene.damages.whole(scene.workdir)
    if len(whole) < 2:
        return Outcome(f"{told}, and there are not two checkpoints", harm=KILL)
    aside = whole[-1].with_name(f"deleted.{whole[-1].name}")
    if aside.exists():  # the kill did come then
        return Outcome(f"{told}, while {aside.name} was removed")
    whole[-1].rename(aside)
    files = sorted(path for path in aside.rglob("*") if path.is_file())
    removed = scene.rng.sample(files, scene.rng.randrange(len(files)))
    for path in removed:
        path.unlink()
    return Outcome(f"{told}, {len(removed)} of {len(files)} files of {aside.name} removed")


def _start_second(removes_lock: bool) -> Callable[[Scene], Outcome]:
    """A second trainer, which must refuse; the first one is killed a little later."""

    def start_second(scene: Scene) -> Outcome:
        first = scene.trainer
        if not first.wait_for_step(PATIENCE):
            return Outcome(_kill(scene).told, harm=KILL)
        if removes_lock:
            (scene.workdir / "lock").unlink(missing_ok=True)
        with scene.start() as second:
            while first.status is None and second.wait(0.1) is None and second.age < PATIENCE:
                pass
            if first.status is not None:  # the second one may go on from its end
                broken = None if first.status == 0 else "the first trainer ended beside a second"
                return Outcome(f"status {first.status} before the second came up", broken, KILL)
            status, lines = second.status, second.lines
        first.wait(scene.rng.uniform(0, 1))
        told = f"the second's status {status}, the first's {_kill(scene).told}"
        holder = "another process" if removes_lock else f"process {first.pid} "
        named = any(line.startswith("error:") and holder in line for line in lines)
        if status in (0, None) or not named:
            last = lines[-1] if lines else "nothing"
            return Outcome(told, f"a second trainer did not name {holder}, but said: {last}")
        return Outcome(told)

    return start_second


def _fail_one_of_four(scene: Scene) -> Outcome:
    """A kill, then four processes to continue the run, one of which does not find the data."""
    told, failing = _kill(scene).told, scene.rng.randrange(_PROCESSES)
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
    told = f"{told}, then process {failing} of four failed: statuses {statuses}, {errors}"
    if any(status is None or status <= 0 for status in statuses):
        return Outcome(told, f"an error of one process ended four with statuses {statuses}")
    if len(errors) != 1 or "absent" not in errors[0]:
        return Outcome(told, f"an error of one of four processes gave {len(errors)} messages")
    return Outcome(told)


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
