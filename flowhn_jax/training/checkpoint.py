"""Checkpoints of a run: parameters, optimizer, step and the position in the data, with Orbax."""

import pathlib
from typing import Any

from jax.sharding import Mesh
from orbax.checkpoint import v1 as ocp

from flowhn_jax import models
from flowhn_jax.config import ModelConfig
from flowhn_jax.models import Params
from flowhn_jax.parallel.rules import with_shardings
from flowhn_jax.training.state import TrainState


def _directory(workdir: str) -> pathlib.Path:
    return pathlib.Path(workdir).absolute() / "checkpoints"


class Checkpoints:
    """The checkpoints of a workdir; use as a context manager.

    A checkpoint appears under its final name only when it is whole: a killed save leaves a
    temporary folder, which the next run removes.
    """

    def __init__(self, workdir: str, keep: int):
        """`keep` newest checkpoints stay on disk."""
        self._checkpointer = ocp.training.Checkpointer(
            _directory(workdir),
            save_decision_policy=ocp.training.save_decision_policies.FixedIntervalPolicy(1),
            preservation_policy=ocp.training.preservation_policies.LatestN(keep),
            cleanup_tmp_directories=True,
        )

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *_: Any) -> None:
        self._checkpointer.close()

    @property
    def latest_step(self) -> int | None:
        """Step of the newest whole checkpoint."""
        latest = self._checkpointer.latest
        return None if latest is None else latest.step

    def save(self, state: TrainState, data: Any) -> None:
        """Writes the state and the data iterator's position; returns when they are on disk."""
        parts = {
            "params": state.params,
            "optimizer": {"step": state.step, "opt_state": state.opt_state},
            "data": data,
        }
        self._checkpointer.save_checkpointables(int(state.step), parts, force=True)

    def restore(self, abstract: TrainState, data: Any) -> TrainState:
        """The newest checkpoint's state, laid out as `abstract`; moves `data` to its position.

        Raises:
          ValueError: `data` is not what the checkpoint was trained on, or the checkpoint holds
            parameters alone.
        """
        load = self._checkpointer.load_checkpointables
        try:
            load(self.latest_step, {"data": data})
        except KeyError as error:  # how Orbax wraps what a checkpointable raises
            if error.__cause__ is not None:
                raise error.__cause__ from None
            raise ValueError(
                f"The checkpoint of step {self.latest_step} holds parameters alone, as an import "
                "does: eval.py reads it, but no training can go on from it."
            ) from error
        optimizer = {"step": abstract.step, "opt_state": abstract.opt_state}
        parts = load(self.latest_step, {"params": abstract.params, "optimizer": optimizer})
        return TrainState(params=parts["params"], **parts["optimizer"])


def save_params(workdir: str, params: Params) -> None:
    """Writes parameters alone, of a model that was trained elsewhere, as step 0."""
    with ocp.training.Checkpointer(_directory(workdir)) as checkpointer:
        checkpointer.save_checkpointables(0, {"params": params}, force=True)


def latest_step(workdir: str) -> int:
    """Step of the newest whole checkpoint in `workdir`; 0 where there is none."""
    if not _directory(workdir).is_dir():
        return 0
    with ocp.training.Checkpointer(_directory(workdir)) as checkpointer:
        return 0 if checkpointer.latest is None else checkpointer.latest.step


def load_params(workdir: str, config: ModelConfig, mesh: Mesh) -> Params:
    """Parameters of the newest checkpoint in `workdir`, laid over the mesh.

    Raises:
      FileNotFoundError: there is none.
    """
    if not _directory(workdir).is_dir():
        raise FileNotFoundError(f"{workdir!r} holds no checkpoints; train with --workdir first.")
    with ocp.training.Checkpointer(_directory(workdir)) as checkpointer:
        if checkpointer.latest is None:
            raise FileNotFoundError(f"{workdir!r} holds no whole checkpoint yet; let train go on.")
        abstract = with_shardings(models.abstract_params(config), mesh)
        return checkpointer.load_checkpointables(None, {"params": abstract})["params"]
