"""The profile of some steps of a run, in the form that TensorBoard's profiler reads."""

import contextlib
import pathlib
import tempfile
from collections.abc import Callable
from typing import Any

import jax

from flowhn_jax.storage import place
from flowhn_jax.utils.text import one_line


class Profiler:
    """Traces the steps that `train.profile` names; a context manager.

    Each process writes a file into `tensorboard/plugins/profile/step_START/` of the workdir, when
    the last of the steps is done or the run ends before it. A file that cannot be written is
    logged, and the run continues.
    """

    def __init__(self, steps: range, workdir: str, log: Callable[[str], None]):
        """Profile `steps`, of a run in `workdir`; `log` prints a line for people."""
        self._steps, self._log = steps, log
        name = f"step_{steps.start}"
        self._folder = place(workdir) / "tensorboard" / "plugins" / "profile" / name
        self._temporary: tempfile.TemporaryDirectory | None = None  # of the trace in progress
        self._is_done = not steps

    def __enter__(self) -> "Profiler":
        return self

    def __exit__(self, *_: object) -> None:
        if self._temporary is not None:
            self._write()

    def before(self, step: int, state: Any) -> contextlib.AbstractContextManager[Any]:
        """Return the context in which a step is dispatched; begin the trace if it is the first.

        Args:
          step: its number.
          state: arrays that the previous step returned; the trace begins when they are complete.
        """
        if self._is_done or step not in self._steps:
            return contextlib.nullcontext()
        if self._temporary is None:
            jax.block_until_ready(state)
            self._temporary = tempfile.TemporaryDirectory()
            options = jax.profiler.ProfileOptions()
            options.python_tracer_level = 0  # Python calls would make up most of a CPU's trace
            jax.profiler.start_trace(self._temporary.name, profiler_options=options)
        return jax.profiler.StepTraceAnnotation("train", step_num=step)

    def after(self, step: int, state: Any) -> None:
        """End the trace, and write it, if the step was the last one; `state` is what it made."""
        if self._temporary is not None and step >= self._steps[-1]:
            jax.block_until_ready(state)
            self._write()

    def _write(self) -> None:
        assert self._temporary is not None
        self._is_done = True
        with self._temporary as folder:
            self._temporary = None
            target = self._folder / f"process_{jax.process_index()}.xplane.pb"
            try:
                jax.profiler.stop_trace()
                (source,) = pathlib.Path(folder).rglob("*.xplane.pb")
                self._folder.make_folder()
                target.copy_from(source)
            except Exception as error:  # such as a full disk
                self._log(f"skipped the profile: {one_line(error)}")
                return
        self._log(f"wrote the profile {target}; to view it in TensorBoard: pip install xprof")
