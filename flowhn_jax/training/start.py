"""The state at step 0: random, or with the parameters of another model."""

import shlex
from collections.abc import Callable

import jax
from jax.sharding import Mesh

from flowhn_jax.checkpoints.state import TrainState, make_init, state_of
from flowhn_jax.config import Config
from flowhn_jax.data.prepared import PreparedSet
from flowhn_jax.interop import source as source_lib
from flowhn_jax.parallel.compilation import compile_unless


def new_state(
    config: Config,
    mesh: Mesh,
    prepared: PreparedSet,
    should_stop: Callable[[], bool],
    log: Callable[[str], None],
) -> TrainState | None:
    """Return the state of a run at step 0; None if a request to stop comes first.

    With `train.init_from` the parameters are those of the source; optimizer and schedule are new.

    Args:
      config: of the run.
      mesh: over which the state is sharded.
      prepared: the run's data.
      should_stop: whether this process is to stop, asked repeatedly while a program compiles.
      log: prints a line for people.

    Raises:
      ValueError, FileNotFoundError: the source is none, or does not fit the model or the data.
    """
    source = config.train.init_from
    if source:
        for change in source_lib.check_fit(source, source_lib.read_model(source), config.model):
            log(f"changed from {source}: {change}")
        _check_tokenizer(source, prepared, log)
        params = source_lib.load_params(source, config.model, mesh)
        log(f"parameters from {source}")
        return state_of(config, mesh, params)
    key = jax.random.key(config.train.seed)
    init = compile_unless(should_stop, make_init(config, mesh).lower(key))
    return None if init is None else init(key)


def _check_tokenizer(source: str, prepared: PreparedSet, log: Callable[[str], None]) -> None:
    """Raise ValueError if the data have another tokenizer than the source."""
    tokenizer = source_lib.read_tokenizer(source)
    if tokenizer is None:
        log(f"{source} has no tokenizer: that of the data is used unchecked")
    elif tokenizer.fingerprint != prepared.tokenizer_fingerprint:
        flags = [f"--tokenizer={tokenizer.spec}"]
        if tokenizer.eot_token is not None:
            flags.append(f"--eot_token={tokenizer.eot_token}")
        raise ValueError(
            f"The data {prepared.folder} must have the tokenizer of train.init_from, "
            f"{tokenizer.spec}; they have {prepared.tokenizer_spec}. Prepare them with "
            f"{shlex.join(flags)}"
        )
