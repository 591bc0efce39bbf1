"""Train steps that another process has compiled, so that no one traces and compiles them again."""

import hashlib
import json
import pathlib
import pickle
from typing import Any, NamedTuple

import jax
import jaxlib
from jax.experimental import serialize_executable

from flowhn_jax.bench.suite import document
from flowhn_jax.config import Config
from flowhn_jax.evaluation.throughput import Programs
from flowhn_jax.parallel.mesh import make_mesh
from flowhn_jax.whole_file import whole_file

_FOLDER = "train_steps"  # in the compilation cache


class Candidate(NamedTuple):
    """A model's step, compiled at the largest batch."""

    config: Config
    programs: Programs
    limit: str  # what bounds the batch: 'memory' or 'step time'
    attempts: int  # programs that were compiled to find it


def save(asked: dict[str, Any], candidate: Candidate) -> None:
    """Keep a step in the compilation cache, where there is one.

    Args:
      asked: what was compiled; `load` is given the same. For JSON.
      candidate: the step.
    """
    path = _path(asked)
    if path is None:
        return
    programs = candidate.programs
    described = {
        name: getattr(programs, name) for name in ("compile_seconds", "memory_bytes", "kernels")
    }
    step = serialize_executable.serialize(programs.train_step)
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(path) as unfinished:
        unfinished.write_bytes(pickle.dumps((step, described, candidate._replace(programs=None))))


def load(asked: dict[str, Any]) -> Candidate | None:
    """Return the step that `save` kept, of the same code and versions; None: there is none."""
    path = _path(asked)
    if path is None or not path.is_file():
        return None
    try:
        step, described, candidate = pickle.loads(path.read_bytes())
        config = candidate.config
        mesh = make_mesh(config.mesh, config.train.batch_size)
        train_step = serialize_executable.deserialize_and_load(
            *step, execution_devices=list(mesh.devices.flat)
        )
    except Exception:  # another machine's, or damaged: it is compiled again
        return None
    return candidate._replace(programs=Programs(config, mesh, train_step, **described))


def _path(asked: dict[str, Any]) -> pathlib.Path | None:
    cache = jax.config.jax_compilation_cache_dir
    if cache is None:
        return None
    of = [document.code_hash(), jax.__version__, jaxlib.__version__, jax.device_count(), asked]
    name = hashlib.sha256(json.dumps(of, sort_keys=True).encode()).hexdigest()
    return pathlib.Path(cache) / _FOLDER / f"{name}.pickle"
