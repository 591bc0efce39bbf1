"""Experiment trackers outside the workdir, Weights & Biases and Trackio, as writers of rows.

Trackers only append, so a row is sent once: a step that is done again after a kill or a rewind
keeps its first row there, while metrics.jsonl has the last one.
"""

import dataclasses
import json
import os
import uuid
from collections.abc import Callable, Mapping
from typing import Any, Protocol

from flowhn_jax.checkpoints.rows import FILE, Row, read_rows
from flowhn_jax.config import Config, to_dict
from flowhn_jax.storage import LocalPlace, Place, place
from flowhn_jax.training.events import tags
from flowhn_jax.utils import json_text, typed
from flowhn_jax.utils.text import one_line

_PROJECT = "flowhn"


@dataclasses.dataclass(frozen=True)
class _Kept:
    """What a workdir keeps about its run in a tracker, in NAME.json.

    Attributes:
      id: the id of the run.
      step: rows up to this step are never sent again.
    """

    id: str
    step: int


class Tracker(Protocol):
    """A run that is open in a tracker."""

    def add(self, step: int, scalars: Mapping[str, float]) -> None:
        """Send the scalars of a step."""
        ...

    def close(self, *, has_failed: bool) -> None:
        """Send what waits, and end the run."""
        ...


class _Wandb:
    def __init__(self, folder: Place, key: str, config: dict[str, Any]):
        import wandb

        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", _PROJECT),
            name=folder.name,
            id=key,
            resume="allow",
            dir=folder.local() if isinstance(folder, LocalPlace) else None,
            config=config,
            settings=wandb.Settings(console="off"),  # the run's own lines and bars stay as they are
        )

    def add(self, step: int, scalars: Mapping[str, float]) -> None:
        self._run.log(dict(scalars), step=step, commit=True)

    def close(self, *, has_failed: bool) -> None:
        self._run.finish(exit_code=int(has_failed))


class _Trackio:
    def __init__(self, folder: Place, key: str, config: dict[str, Any]):
        import trackio

        self._trackio = trackio
        # Trackio finds a run by its name alone, which the id makes unique.
        name = f"{folder.name}-{key}"
        trackio.init(_PROJECT, name=name, resume="allow", config=config, embed=False)

    def add(self, step: int, scalars: Mapping[str, float]) -> None:
        self._trackio.log(dict(scalars), step=step)

    def close(self, *, has_failed: bool) -> None:
        self._trackio.finish()


TRACKERS: Mapping[str, Callable[[Place, str, dict[str, Any]], Tracker]] = {
    "wandb": _Wandb,
    "trackio": _Trackio,
}


class TrackerWriter:
    """Sends the rows of a run to a tracker, under the tags that TensorBoard has.

    A tracker that fails while the run trains is left out from then on, with a message.
    """

    def __init__(
        self, name: str, config: Config, workdir: str, start: int, log: Callable[[str], None]
    ):
        """Continue the run of `workdir` in a tracker, or begin one with the rows so far.

        Args:
          name: the name of the tracker.
          config: the config of the run.
          workdir: its folder, which keeps the id that the tracker knows the run by.
          start: step of the checkpoint that the run continues from.
          log: prints a line for people.

        Raises:
          ValueError: the tracker does not start, or what the workdir keeps is damaged.
        """
        folder = place(workdir).absolute()
        self._name, self._log = name, log
        self._path = folder / f"{name}.json"
        (folder / FILE).check_own_file()
        rows = read_rows(workdir)
        kept = self._read()
        if kept is None:
            self._kept, missing = _Kept(uuid.uuid4().hex[:8], 0), rows
        else:
            # Any row of the file may have been sent before the last start ended.
            last = rows[-1]["step"] if rows else 0
            self._kept, missing = dataclasses.replace(kept, step=max(kept.step, last)), []
        self._sent = self._kept.step
        try:
            self._tracker: Tracker | None = TRACKERS[name](folder, self._kept.id, to_dict(config))
        except Exception as error:  # such as of a network or a login
            hint = "; WANDB_MODE=offline needs no network or login" if name == "wandb" else ""
            raise ValueError(
                f"train.writers has {name}, which does not start: {one_line(error)}{hint}"
            ) from error
        if self._kept != kept:
            self._write_kept()
        for row in missing:
            if row["step"] <= start:
                self.write(row)

    def __enter__(self) -> "TrackerWriter":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if self._tracker is not None:
            try:
                self._tracker.close(has_failed=kind is not None)
            except Exception as error:  # the run itself is complete
                self._log(f"{self._name} lacks the last rows: {one_line(error)}")

    def _read(self) -> _Kept | None:
        if not self._path.is_file():
            return None
        name = repr(str(self._path))
        try:
            return typed.build(_Kept, json_text.loads(self._path.read(), "it"), what="key")
        except ValueError as error:
            raise ValueError(f"{name} is damaged: {error} Remove it to begin a new run.") from error

    def _write_kept(self) -> None:
        self._path.write_whole(json.dumps(dataclasses.asdict(self._kept)) + "\n")

    def drop_rows_after(self, step: int) -> None:
        """Record which rows were sent, so that steps that run again are not sent twice."""
        if self._sent > max(step, self._kept.step):
            self._kept = dataclasses.replace(self._kept, step=self._sent)
            self._write_kept()

    def write(self, row: Row) -> None:
        """Send the row of a step, unless one was sent."""
        if self._tracker is None or row["step"] <= self._sent:
            return
        try:
            self._tracker.add(row["step"], tags(row))
        except Exception as error:  # the rows are safe in metrics.jsonl
            self._log(
                f"{self._name} failed at step {row['step']:,} and gets no more rows: "
                f"{one_line(error)}"
            )
            self._tracker = None
            return
        self._sent = row["step"]

    def flush(self) -> bool:
        """Return True: a resumed run needs nothing of a tracker."""
        return True
