"""Soak test of a training run: `python -m tools.chaos --minutes=40`.

With --workdir=gs://... the harmed runs are in a bucket, which must be an emulator's: `python -m
tools.emulator python -m tools.chaos --workdir=gs://bucket/soak --minutes=40`. A proxy then refuses
requests, as a full local disk would refuse writes.

train.py trains a small model once without interruption. Then the run is repeated, and kills,
signals, full disks and damaged files end it at random moments; each start resumes the one before.
When all steps are done, state and metrics must equal those of the uninterrupted run.
"""

import argparse
import collections
import contextlib
import os
import pathlib
import random
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import jax

from flowhn_jax.checkpoints.files import is_committed
from flowhn_jax.report.table import print_result
from flowhn_jax.storage import AnyPath, Place, is_remote, place
from flowhn_jax.utils.sources import ROOT
from tools.disk import FileLimit, SmallDisk, open_disk
from tools.emulator import EMULATOR, environment
from tools.faults import FaultyStore
from tools.harm import HARMS, ONLY_LOCAL, PATIENCE, Damages, Outcome, Scene
from tools.same_run import differences
from tools.small_run import as_flags, prepare_text, small_keys
from tools.trainer import Trainer

_STEPS = 15_000  # about a minute
_SHARE_AT_SAVES = 0.3  # of the harms that wait for a checkpoint's folder to appear
_LINES_OF_A_FAILURE = 60
# Share of starts in a bucket before which the lock is removed: otherwise that of a killed run
# delays the next start by a minute.
_SHARE_OF_REMOVED_LOCKS = 0.8
# Entries of the result that must be zero; all others are counts.
FAILURES = (
    "differing_arrays",
    "lost_rows",
    "doubled_rows",
    "changed_rows",
    "tensorboard_differences",
    "unreadable_workdirs",
    "broken_promises",
)


class Soak:
    """Rounds of harm to a run in a folder, with counts of what happened."""

    def __init__(self, folder: pathlib.Path, *, steps: int, seed: int, bucket: Place | None = None):
        """Train the uninterrupted run in `folder`; a later soak in the same folder reuses it.

        Args:
          folder: where all runs and the compilation cache are kept.
          steps: training steps of a run.
          seed: seed of the random choices of harm.
          bucket: folder in a bucket for the harmed runs; None: they are in `folder`.

        Raises:
          ValueError: the uninterrupted run failed.
        """
        self._folder, self._rng, self._bucket = folder, random.Random(seed), bucket
        self._harms = [name for name in HARMS if bucket is None or name not in ONLY_LOCAL]
        self._variables: dict[str, str] = {}  # of the harmed trainers
        self._begun = time.monotonic()
        self._kills: collections.Counter[str] = collections.Counter()
        self._counts: collections.Counter[str] = collections.Counter()
        folder.mkdir(parents=True, exist_ok=True)
        # Rows, validations and checkpoints come dozens of times in a run, at different steps.
        cadence = {"log_every": steps // 300, "eval_every": steps // 30}
        cadence["checkpoint_every"] = steps // 40
        keys = small_keys(
            prepare_text(folder), steps=steps, **{name: max(1, n) for name, n in cadence.items()}
        )
        self._flags = [f"--config={ROOT / 'configs/flowhn_tiny.py'}", *as_flags(keys)]
        self._expected = folder / "uninterrupted"
        with self._start(self._expected) as trainer:
            status = trainer.wait(None)
            if status != 0:
                output = "\n".join(trainer.lines)
                raise ValueError(f"the uninterrupted run ended with status {status}:\n{output}")
            # seconds_to_first_row is None if an earlier soak ran it.
            self._startup = trainer.seconds_to_first_row or trainer.age
            self._patience = PATIENCE + 5 * trainer.age
            self._log(f"uninterrupted run of {steps:,} steps: {trainer.age:.0f} s")

    def _start(self, workdir: AnyPath, *flags: str) -> Trainer:
        flags = (*self._flags, f"--workdir={workdir}", *flags)
        return Trainer(flags, self._folder / "compiled", self._variables)

    def _log(self, text: str) -> None:
        print(f"{time.monotonic() - self._begun:8.1f} s  {text}", flush=True)

    def _fail(self, what: str, why: str, trainer: Trainer) -> None:
        self._counts[what] += 1
        self._log(f"FAILED: {why}; its last lines:")
        print("\n".join(f"    | {line}" for line in trainer.lines[-_LINES_OF_A_FAILURE:]))

    def run(self, *, seconds: float, kills: int | None) -> dict[str, Any]:
        """Run rounds until the time is up or `kills` were done, then finish the last one unharmed.

        Returns:
          Kills by kind, counts, and the entries of FAILURES.
        """
        end = time.monotonic() + seconds

        def continues() -> bool:
            return time.monotonic() < end and (kills is None or sum(self._kills.values()) < kills)

        while continues():
            self._counts["rounds"] += 1
            if not self._round(continues):
                break
        counts = {"restarts": 0, "steps_done": 0, "rows_compared": 0, **self._counts}
        return {
            **{name: self._kills[name] for name in HARMS},
            "kills": sum(self._kills.values()),
            **{name: count for name, count in counts.items() if name not in FAILURES},
            **{name: self._counts[name] for name in FAILURES},
        }

    def _round(self, continues: Callable[[], bool]) -> bool:
        """Take one run from its start to its end; return False if it cannot be finished."""
        with self._open_disk() as (workdir, disk):
            workdir.remove_tree()
            damages, start = Damages(), 0
            while True:
                start += 1
                self._counts["restarts"] += start > 1
                if workdir.is_remote and self._rng.random() < _SHARE_OF_REMOVED_LOCKS:
                    (workdir / "lock").remove()
                with self._start(workdir) as trainer:
                    scene = Scene(
                        self._rng, workdir, disk, damages, trainer, partial(self._start, workdir)
                    )
                    harmed = continues() and self._harm(scene, start)
                    status = trainer.wait(None if harmed else self._patience)
                    self._counts["steps_done"] += trainer.steps_done
                    if harmed:
                        continue
                    if status != 0:
                        why = f"start {start} was not harmed, but ended with status {status}"
                        self._fail("unreadable_workdirs", why, trainer)
                        self._keep(workdir)
                        return False
                    break
            self._compare(workdir, start)
        return True

    @contextlib.contextmanager
    def _open_disk(self) -> Iterator[tuple[Place, SmallDisk | FileLimit | FaultyStore]]:
        """Yield the workdir of a round, and what makes its storage refuse writes."""
        if self._bucket is None:
            folder = self._folder / "disk"
            folder.mkdir(exist_ok=True)
            with open_disk(folder) as disk:
                yield place(folder / "run"), disk
            return
        with FaultyStore(os.environ[EMULATOR]) as store:
            self._variables = environment(store.url)
            yield self._bucket / "run", store

    def _harm(self, scene: Scene, start: int) -> bool:
        """Harm the trainer at a random moment; return False if it ended before that."""
        rng, trainer = self._rng, scene.trainer
        name = rng.choice(self._harms)
        seconds = rng.uniform(0, 3 * self._startup)
        if rng.random() < _SHARE_AT_SAVES:
            trainer.wait_for_new_name(scene.workdir / "checkpoints", 3 * self._startup)
            seconds = rng.uniform(0, 0.2)
        if trainer.wait(seconds) is not None:
            return False
        age, step = trainer.age, trainer.step
        outcome: Outcome = HARMS[name](scene)
        self._startup = min(self._startup, trainer.seconds_to_first_row or self._startup)
        self._kills[outcome.harm or name] += 1
        where = "no row yet" if step is None else f"step {step:,}"
        self._log(
            f"round {self._counts['rounds']}, start {start}: {name} after {age:.2f} s, {where}: "
            f"{outcome.description}"
        )
        if outcome.broken is not None:
            self._fail("broken_promises", outcome.broken, trainer)
        return True

    def _compare(self, workdir: Place, starts: int) -> None:
        found = differences(workdir, self._expected)
        # A resumed run finishes a deletion that was killed and does not treat it as damage.
        names = [*(workdir / "checkpoints").children(), *(workdir / "damaged").children()]
        left = [path for path in names if not (path.name.isdecimal() and is_committed(path))]
        if left:
            self._counts["broken_promises"] += 1
            self._log(f"FAILED: {', '.join(path.name for path in left)} left in checkpoints/")
        self._counts.update(found)
        wrong = {name: found[name] for name in FAILURES if found.get(name)}
        verdict = f"differs: {wrong}" if wrong else "equals the uninterrupted run"
        self._log(f"round {self._counts['rounds']} finished after {starts} starts; it {verdict}")
        if wrong:
            self._keep(workdir)

    def _keep(self, workdir: Place) -> None:
        copy = self._folder / f"failed_{self._counts['rounds']}"
        for name, path in workdir.walk():
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            (copy / name).write_bytes(path.read())
        self._log(f"its workdir was copied to {copy}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m tools.chaos",
        description="Harm a small run at random moments; it must end like an uninterrupted one.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add(
        "--minutes",
        type=float,
        required=True,
        help="how long to harm runs; the last run is then finished",
    )
    add("--kills", type=int, help="stop earlier, after this number of kills")
    add("--seed", type=int, default=0, help="seed of the random harm (default %(default)s)")
    add("--steps", type=int, default=_STEPS, help="training steps of the run (default %(default)s)")
    add(
        "--workdir",
        help="folder to keep (default: a temporary one, kept only if something fails), or one in "
        "an emulator's bucket (gs://), which is removed",
    )
    return parser


def main(argv: list[str] | None = None) -> None:
    """Run the command line; exit with status 1 if any entry of FAILURES is not zero."""
    options = _parser().parse_args(argv)
    jax.config.update("jax_platforms", "cpu")  # like the trainers
    bucket = place(options.workdir) if options.workdir and is_remote(options.workdir) else None
    if bucket is not None and EMULATOR not in os.environ:
        sys.exit(
            "error: gs:// needs an emulator: python -m tools.emulator python -m tools.chaos ..."
        )
    is_kept = options.workdir is not None and bucket is None
    folder = pathlib.Path(options.workdir if is_kept else tempfile.mkdtemp(prefix="chaos_"))
    folder = folder.absolute()
    try:
        soak = Soak(folder, steps=options.steps, seed=options.seed, bucket=bucket)
        result = soak.run(seconds=60 * options.minutes, kills=options.kills)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    print()
    print_result(result)
    if any(result[name] for name in FAILURES):
        sys.exit(f"failed: the runs are kept in {folder}")
    if not is_kept:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
