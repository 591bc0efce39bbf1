"""Small valid results of `bench suite` and `compare`, each with a few rows."""

import copy
import json
import pathlib
from typing import Any

from flowhn_jax.bench.suite.document import Document
from flowhn_jax.compare import scores
from flowhn_jax.compare.budget import Budget
from flowhn_jax.compare.comparison import Training
from flowhn_jax.compare.model_configs import model_configs
from flowhn_jax.compare.speed import config_hash
from flowhn_jax.compare.training_plan import plan_steps

Row = dict[str, Any]
COMPARED = ("fac_split", "llama")
CODE = "0123456789ab"  # replaces the hash of the sources, which may be edited during a run

_MACHINE = {
    "device": "cpu",
    "devices": 1,
    "platform": "cpu",
    "python": "3.11.7",
    "packages": {"jax": "0.10.2", "flax": "0.12.8"},
}
_TIMES = {"seconds": 0.01, "authors_seconds": 0.35, "ratio": 35.0}
_ROWS: dict[str, list[Row]] = {
    "machine": [
        {"key": "device", "runtime": "cpu", "host": "Linux", "processor": "one", "cores": 2,
         "host_memory_bytes": 2**34, "memory_bytes": None, "driver": None, **_MACHINE},
        {"key": "rates/float32", "dtype": "float32", "bytes_per_second": 2.8e10,
         "matmul_flops_per_second": 2e11, "exps_per_second": 1.9e9},
    ],
    "accuracy": [
        {"key": "attention/plain/xla/float32", "check": "attention/plain", "backend": "xla",
         "dtype": "float32", "error": 1.5e-7, "gradient_error": None, "worst_gradient": None,
         "tolerance": 1e-4, "right": True},
        {"key": "ssd/plain/xla/float32", "failed": "the worker process died (SIGKILL)"},
    ],
    "compilation": [{"key": "tiny/fac_split", "compile_seconds": 13.6}],
    "training": [
        {"key": "tiny/no_split", "size": "tiny", "model": "no_split", "parameters": 1_746_720,
         "batch_size": 4, "batch_limit": "step time", "kernels": "attention xla",
         "memory_bytes": 226_333_840, "compile_seconds": 11.1, "step_seconds": 0.14,
         "step_seconds_min": 0.13, "step_seconds_max": 0.17, "tokens_per_second": 7139.9,
         "train_tflops_per_second_per_device": 0.08, "train_mfu": None},
        {"key": "tiny/llama", "size": "tiny", "model": "llama", "partial": True},
    ],
    "kernel_speed": [
        {"key": "ssd/135m/256", "measurements": [
            {"operation": "ssd", "size": "135m", "shape": "B=1 L=256", "backend": "xla",
             "forward_ms": 4.3, "forward_ratio": 4.5, "both_ms": 13.6, "both_ratio": 4.7,
             "temporary_mib": 8.5, "forward_error": 3.8e-7, "both_error": 5.6e-7},
            {"operation": "ssd", "size": "135m", "shape": "B=1 L=256", "backend": "peer",
             "failed": "ImportError: no peer"}]},
        {"key": "authors/tiny/ae_split", "strategy": "ae_split", "size": "tiny",
         "authors_kernels": "scan: a loop", "block": _TIMES, "train step": _TIMES},
    ],
    "step_costs": [
        {"key": "tiny/fac_split", "batch_size": 4, "seconds": 0.05, "costs": [
            {"name": "fusion.1", "seconds": 0.01, "share": 0.3, "count": 12,
             "source": "flowhn_jax/layers/mamba1.py:88", "operation": "forward/dot_general"}]},
    ],
    "inference": [
        {"key": "tiny/fac_split", "size": "tiny", "model": "fac_split", "batch_size": 8,
         "prefill_tokens_per_second": 9e5, "decode_tokens_per_second": 4e3,
         "first_token_seconds": 0.01, "decode_one_tokens_per_second": 321.0,
         "decode_bandwidth_utilisation": None},
    ],
    "tiles": [
        {"key": "135m", "shape": "[16, 1024, 1536]", "seconds": {"16 x 32 x 4": 0.003},
         "default": "16 x 32 x 4"},
    ],
    "learning": [{"key": "float32", "losses": [6.0 - 0.02 * step for step in range(40)]}],
}  # fmt: skip


def write_suites(folder: pathlib.Path) -> None:
    """Write two results of `bench suite` to a/ and b/."""
    for name in ("a", "b"):
        (folder / name).mkdir()
        document = Document(folder / name)
        document.content |= {"machine": copy.deepcopy(_MACHINE), "code": CODE}
        for part, rows in _ROWS.items():
            planned = [row["key"] for row in rows]
            document.part(part).update(planned=planned, rows=copy.deepcopy(rows))
        document.save()


def write_comparison(folder: pathlib.Path) -> None:
    """Write a workdir of `compare --size=tiny --models=fac_split,llama` with two rounds."""
    configs = model_configs("tiny", COMPARED)
    lines = [
        {
            "model": name,
            "round": number,
            "config_hash": config_hash(config),
            "device": "cpu",
            "seconds": {"train": [0.1, 0.2], "prefill": [0.1], "decode": [0.3]},
            "compile_seconds": 1.5,
            "memory_bytes": 2**20,
            "kernels": "attention xla",
        }
        for number in range(2)
        for name, config in configs.items()
    ]
    (folder / "speed.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    plan_steps(configs, str(folder), Budget("seconds", 9), lines, Training().data)
    for name in configs:
        (folder / name).mkdir()
        row = {"step": 2, "tokens": 512, "validation_loss": 5.1, "validation_bits_per_byte": 7.4}
        (folder / name / "metrics.jsonl").write_text(json.dumps(row) + "\n")
        (folder / name / scores.FILE).write_text(json.dumps(dict.fromkeys(scores.KEYS, 4.2)))
