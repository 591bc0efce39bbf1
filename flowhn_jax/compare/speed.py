"""The speed of several models, measured round-robin: drift of the machine affects all alike."""

import dataclasses
import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import jax

from flowhn_jax import config as config_lib
from flowhn_jax.bench.throughput import Programs, compile_programs, time_programs
from flowhn_jax.config import Config, DataConfig
from flowhn_jax.evaluation.perplexity import eval_batch_size
from flowhn_jax.parallel.mesh import make_mesh
from flowhn_jax.storage import place

Measurement = dict[str, Any]  # of one model in one round: a line of FILE

FILE = "speed.jsonl"
_MAX_NUMBER = 1e30


def config_hash(config: Config) -> str:
    """Return a hash of everything speed depends on: not the data, nor the number of steps."""
    unread = dict(steps=1, log_every=1, eval_every=1, checkpoint_every=1, writers="jsonl")
    train = dataclasses.replace(config.train, **unread)
    config = dataclasses.replace(config, data=DataConfig(), train=train)
    return short_hash(config_lib.to_dict(config))


def short_hash(value: Any) -> str:
    """Return 12 hex digits of the hash of a JSON value."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:12]


def read_measurements(
    workdir: str, configs: Mapping[str, Config], device: str
) -> list[Measurement]:
    """Return the workdir's measurements of these configs on this kind of device, each once.

    Measurements of other configs, such as an older version of a recipe, are left out, and so are
    malformed lines, such as one that a kill truncated.
    """
    path = place(workdir) / FILE
    hashes = {name: config_hash(config) for name, config in configs.items()}
    found: dict[tuple[str, int], Measurement] = {}
    for line in path.read().splitlines() if path.is_file() else ():
        measurement = _parse(line)
        if measurement is None or measurement["device"] != device:
            continue
        if hashes.get(measurement["model"]) == measurement["config_hash"]:
            found.setdefault((measurement["model"], measurement["round"]), measurement)
    return list(found.values())


def _parse(line: bytes) -> Measurement | None:
    """Return the measurement in a line; None if the line is malformed."""
    try:
        measurement = json.loads(line)
        texts = [measurement[name] for name in ("model", "config_hash", "device", "kernels")]
        numbers = [measurement["compile_seconds"], measurement["memory_bytes"]]
        seconds = {name: list(each) for name, each in measurement["seconds"].items()}
        is_complete = (
            all(isinstance(text, str) for text in texts)
            and isinstance(measurement["round"], int)
            and seconds["train"]
            and all(each and all(map(_is_duration, each)) for each in seconds.values())
            and all(map(is_number, numbers))
        )
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return None
    return measurement if is_complete else None


def _is_duration(value: Any) -> bool:
    return is_number(value) and value > 0


def is_number(value: Any) -> bool:
    """Return whether a JSON value is a number that a measurement can have."""
    is_plain = isinstance(value, int | float) and not isinstance(value, bool)
    return is_plain and abs(value) < _MAX_NUMBER  # False for NaN


def missing_measurements(
    names: Iterable[str], rounds: int, done: Iterable[Measurement]
) -> list[tuple[int, str]]:
    """Return (round, model) of what is left to measure; each round starts with another model."""
    names = list(names)
    finished = {(each["round"], each["model"]) for each in done}
    order = [
        (number, names[(offset + number) % len(names)])
        for number in range(rounds)
        for offset in range(len(names))
    ]
    return [each for each in order if each not in finished]


def measure(
    configs: Mapping[str, Config],
    workdir: str,
    missing: Iterable[tuple[int, str]],
    repeats: int,
    describe: Callable[[str], None],
) -> Iterator[Measurement]:
    """Measure what is missing, one model at a time.

    A model is compiled before its first measurement. Its arrays are freed after each one, so that
    only one model occupies the memory.

    Args:
      configs: the compared models, by name.
      workdir: receives each measurement before it is yielded.
      missing: as `missing_measurements` returns it.
      repeats: timed calls of each program per measurement.
      describe: is called with what is measured next.

    Yields:
      The measurements.
    """
    programs: dict[str, Programs] = {}
    path = place(workdir) / FILE
    for number, name in missing:
        config = configs[name]
        describe(f"measuring {name}, round {number + 1}")
        if name not in programs:
            mesh = make_mesh(config.mesh, eval_batch_size(config))
            programs[name] = compile_programs(config, mesh)
        compiled = programs[name]
        measurement = {
            "model": name,
            "round": number,
            "config_hash": config_hash(config),
            "device": jax.devices()[0].device_kind,
            "seconds": time_programs(compiled, repeats),
            "compile_seconds": compiled.compile_seconds,
            "memory_bytes": compiled.memory_bytes,
            "kernels": compiled.kernels,
        }
        before = path.read() if path.is_file() else b""
        if before and not before.endswith(b"\n"):  # a kill truncated the last line
            before += b"\n"
        path.write_whole(before + json.dumps(measurement).encode() + b"\n")
        yield measurement
