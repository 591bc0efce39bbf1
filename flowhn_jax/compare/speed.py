"""Speed of all models in turns, so that a machine that drifts does it to all alike."""

import dataclasses
import hashlib
import json
import pathlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import jax

from flowhn_jax import config as config_lib
from flowhn_jax.bench.throughput import Programs, compile_programs, time_programs
from flowhn_jax.config import Config, DataConfig
from flowhn_jax.evaluation.perplexity import eval_batch_size
from flowhn_jax.parallel.mesh import make_mesh

Turn = dict[str, Any]

FILE = "speed.jsonl"
_MAX_NUMBER = 1e30


def config_hash(config: Config) -> str:
    """Of all that speed depends on: not the data, nor how many steps are trained."""
    cadence = dict(steps=1, log_every=1, eval_every=1, checkpoint_every=1)
    train = dataclasses.replace(config.train, **cadence)
    config = dataclasses.replace(config, data=DataConfig(), train=train)
    return short_hash(config_lib.to_dict(config))


def short_hash(value: Any) -> str:
    """12 hex digits of what JSON can hold."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:12]


def read_turns(workdir: str, configs: Mapping[str, Config], device: str) -> list[Turn]:
    """The turns of these configs on this kind of device that `workdir` holds, each once.

    Others, as of another version of a recipe, are left out, and so is a line that is no turn, such
    as one cut off by a kill.
    """
    path = pathlib.Path(workdir) / FILE
    hashes = {name: config_hash(config) for name, config in configs.items()}
    turns: dict[tuple[str, int], Turn] = {}
    for line in path.read_bytes().splitlines() if path.is_file() else ():
        turn = _parse_turn(line)
        if turn is None or turn["device"] != device:
            continue
        if hashes.get(turn["model"]) == turn["config_hash"]:
            turns.setdefault((turn["model"], turn["round"]), turn)
    return list(turns.values())


def _parse_turn(line: bytes) -> Turn | None:
    """Return the turn of a line; None where the line does not hold all of one."""
    try:
        turn = json.loads(line)
        texts = [turn[name] for name in ("model", "config_hash", "device", "kernels")]
        numbers = [turn["compile_seconds"], turn["memory_bytes"]]
        seconds = {name: list(each) for name, each in turn["seconds"].items()}
        is_whole = (
            all(isinstance(text, str) for text in texts)
            and isinstance(turn["round"], int)
            and seconds["train"]
            and all(each and all(map(_is_duration, each)) for each in seconds.values())
            and all(map(is_number, numbers))
        )
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return None
    return turn if is_whole else None


def _is_duration(value: Any) -> bool:
    return is_number(value) and value > 0


def is_number(value: Any) -> bool:
    """Return whether a value of a JSON text is a number that a measurement can have."""
    is_plain = isinstance(value, int | float) and not isinstance(value, bool)
    return is_plain and abs(value) < _MAX_NUMBER  # False for NaN


def missing_turns(
    configs: Iterable[str], rounds: int, turns: Iterable[Turn]
) -> list[tuple[int, str]]:
    """(round, model) of what is still to be measured, each round begun by another model."""
    names = list(configs)
    done = {(turn["round"], turn["model"]) for turn in turns}
    order = [
        (number, names[(place + number) % len(names)])
        for number in range(rounds)
        for place in range(len(names))
    ]
    return [each for each in order if each not in done]


def measure_turns(
    configs: Mapping[str, Config],
    workdir: str,
    missing: Iterable[tuple[int, str]],
    repeats: int,
    say: Callable[[str], None],
) -> Iterator[Turn]:
    """Takes the turns that are missing, and writes each to the workdir before it is yielded.

    What a model needs is compiled in its first turn; its arrays are dropped behind each, so that
    models take the memory one after the other.
    """
    programs: dict[str, Programs] = {}
    path = pathlib.Path(workdir) / FILE
    for number, name in missing:
        config = configs[name]
        say(f"{name}, round {number + 1}")
        if name not in programs:
            mesh = make_mesh(config.mesh, eval_batch_size(config))
            programs[name] = compile_programs(config, mesh)
        compiled = programs[name]
        turn = {
            "model": name,
            "round": number,
            "config_hash": config_hash(config),
            "device": jax.devices()[0].device_kind,
            "seconds": time_programs(compiled, repeats),
            "compile_seconds": compiled.compile_seconds,
            "memory_bytes": compiled.memory_bytes,
            "kernels": compiled.kernels,
        }
        with path.open("a") as file:
            # A line that a kill cut off stays alone on its line.
            file.write(("\n" if _is_cut_off(path) else "") + json.dumps(turn) + "\n")
        yield turn


def _is_cut_off(path: pathlib.Path) -> bool:
    content = path.read_bytes()
    return bool(content) and not content.endswith(b"\n")
