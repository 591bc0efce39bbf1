"""Rows of every part: complete, and in every state in which a suite may stop."""

from typing import Any

Row = dict[str, Any]


def accuracy(key: str, right: bool, **changes: Any) -> Row:
    check, backend, dtype = key.rsplit("/", 2)
    return {
        "key": key,
        "check": check,
        "backend": backend,
        "dtype": dtype,
        "error": 2e-6 if right else 0.25,
        "gradient_error": 5e-6,
        "worst_gradient": "dt",
        "tolerance": 1e-4,
        "right": right,
        "summary": "right" if right else "WRONG",
    } | changes


def labels(key: str) -> Row:
    """Return the labels of a row with the key SIZE/MODEL."""
    size, _, model = key.partition("/")
    return {"key": key, "size": size, "model": model}


def described(key: str) -> Row:
    """Return a training row before anything is timed."""
    return labels(key) | {
        "parameters": 132_396_448,
        "batch_size": 32,
        "batch_limit": "memory",
        "context": 1024,
        "dtype": "bfloat16",
        "kernels": "selective_scan triton",
        "memory_bytes": 40 * 2**30,
        "compile_seconds": 12.5,
        "bound_seconds": 0.0625,
        "programs_compiled": 2,
        "partial": True,
    }


def training(key: str, tokens_per_second: float, **changes: Any) -> Row:
    row = described(key) | {
        "step_seconds": 32768 / tokens_per_second,
        "step_seconds_min": 0.9 * 32768 / tokens_per_second,
        "step_seconds_max": 1.1 * 32768 / tokens_per_second,
        "steps": 6,
        "tokens_per_second": tokens_per_second,
        "train_tflops_per_second_per_device": 123.4,
        "train_mfu": 0.25,
        "train_mfu_palm": 0.3,
        "summary": f"{tokens_per_second:,.0f} tokens/s",
    }
    del row["partial"]
    return row | changes


def measurement(backend: str, both_ms: float, operation: str = "selective_scan") -> Row:
    return {
        "operation": operation,
        "size": "135m",
        "shape": "[32, 1024, 1536]",
        "backend": backend,
        "forward_ms": both_ms / 3,
        "forward_ratio": 2.5,
        "both_ms": both_ms,
        "both_ratio": both_ms / 2,
        "temporary_mib": 12.0,
        "forward_error": 1e-6,
        "both_error": 2e-6,
    }


def failed_measurement(backend: str = "peer") -> Row:
    row = measurement(backend, 1.0)
    labels = {name: row[name] for name in ("operation", "size", "shape", "backend")}
    return labels | {"failed": "OutOfMemoryError: 12 GiB"}


def timed(seconds: float, authors_seconds: float) -> Row:
    ratio = authors_seconds / seconds
    return {"seconds": seconds, "authors_seconds": authors_seconds, "ratio": ratio}


def authors() -> Row:
    return {
        "key": "authors/135m/ae_split",
        "strategy": "ae_split",
        "size": "135m",
        "batch_size": 8,
        "context": 1024,
        "dtype": "bfloat16",
        "authors_kernels": "scan: a loop over tokens, convolution: torch conv1d",
        "block": timed(0.01, 0.35),
        "train step": timed(0.1, 3.0),
    }


def costs(key: str, count: int = 3) -> Row:
    each = [
        {
            "name": f"fusion.{i}",
            "seconds": 0.01 / (i + 1),
            "share": 0.3 / (i + 1),
            "count": 12,
            "source": f"flowhn_jax/layers/mamba1.py:{80 + i}",
            "operation": "forward/dot_general",
        }
        for i in range(count)
    ]
    return {"key": key, "batch_size": 32, "costs": each, "seconds": 0.05}


def inference(key: str, prefill: float = 9e5, decode: float = 4e3) -> Row:
    return labels(key) | {
        "batch_size": 8,
        "context": 1024,
        "prefill_tokens_per_second": prefill,
        "decode_tokens_per_second": decode,
        "first_token_seconds": 0.0123,
        "decode_one_tokens_per_second": 321.0,
        "decode_bandwidth_utilisation": None,
        "summary": "fast",
    }


def learning(dtype: str, steps: int = 200, offset: float = 0.0) -> Row:
    losses = [6.0 - 4.0 * i / 200 + offset for i in range(steps)]
    row = {"key": dtype, "model": "flowhn", "steps": 200, "losses": losses}
    return row if steps == 200 else row | {"partial": True}


def every_part() -> dict[str, list[Row]]:
    """Return complete rows of each part by its name."""
    return {
        "machine": [
            {
                "key": "device",
                "device": "NVIDIA H100",
                "devices": 1,
                "platform": "gpu",
                "python": "3.11.7",
                "packages": {"jax": "0.10.2", "flax": "0.12.0"},
                "summary": "NVIDIA H100",
                "memory_bytes": 78 * 2**30,
                "peak_bf16_flops_per_second": 989e12,
                "peak_bytes_per_second": 3.35e12,
                "runtime": "CUDA 13",
                "driver": None,
                "host": "Linux",
                "processor": "a processor",
                "cores": 16,
                "host_memory_bytes": 128 * 2**30,
            },
            {
                "key": "rates/bfloat16",
                "dtype": "bfloat16",
                "bytes_per_second": 2.9e12,
                "matmul_flops_per_second": 701e12,
                "exps_per_second": 3.1e12,
                "summary": "fast",
            },
        ],
        "accuracy": [
            accuracy("selective_scan/plain/triton/float32", True),
            accuracy("attention/plain/cudnn/bfloat16", False),
            accuracy("ssd_step/plain/xla/float32", True, gradient_error=None, worst_gradient=None),
        ],
        "compilation": [{"key": "135m/no_split", "compile_seconds": 10.4, "summary": "10.4 s"}],
        "training": [
            training("135m/no_split", 100_000.0),
            training("135m/fac_split", 125_000.0),
            training("135m/llama", 150_000.0),
            training("1b/fac_split", 20_000.0, train_mfu=None),
        ],
        "kernel_speed": [
            {
                "key": "selective_scan/135m/1024",
                "measurements": [
                    measurement("triton", 3.0),
                    measurement("mambapy pscan", 60.0),
                    failed_measurement(),
                ],
            },
            authors(),
        ],
        "step_costs": [costs("135m/fac_split"), costs("1b/fac_split", 1)],
        "inference": [inference("135m/fac_split")],
        "tiles": [
            {
                "key": "selective_scan/135m/1024",
                "shape": "[16, 1024, 1536]",
                "seconds": {"16 x 32 x 4": 0.003, "16 x 32 x 2": 0.002},
                "default": "16 x 32 x 4",
            },
            {
                "key": "ssd/135m/1024",
                "shape": "[16, 1024, 24, 64]",
                "seconds": {"64 x 8": 0.004},
                "default": "64 x 8",
            },
        ],
        "learning": [learning("bfloat16", offset=0.125), learning("float32")],
    }


def unfinished() -> dict[str, list[Row]]:
    """Return rows of each part as an interruption or a failure leaves them."""
    death = "the worker process died (SIGKILL)"
    return {
        "machine": [{"key": "device", "failed": "OSError: no /proc"}],
        "accuracy": [{"key": "attention/plain/cudnn/float32", "failed": death}],
        "compilation": [{"key": "135m/no_split", "failed": death}],
        "training": [
            described("135m/no_split"),
            described("135m/fac_split") | {"failed": "XlaRuntimeError: RESOURCE_EXHAUSTED"},
            {"key": "135m/llama", "size": "135m", "model": "llama", "failed": "TooLargeError: no"},
            {"key": "1b/no_split", "failed": death},
        ],
        "kernel_speed": [
            {"key": "ssd/135m/1024", "measurements": [failed_measurement()], "partial": True},
            {"key": "attention/135m/1024", "measurements": [], "partial": True},
            {"key": "authors/135m/ae_split", "failed": "ImportError: torch"},
        ],
        "step_costs": [{"key": "135m/fac_split", "batch_size": 8, "failed": "ValueError: no"}],
        "inference": [{"key": "135m/llama", "size": "135m", "model": "llama", "failed": death}],
        "tiles": [{"key": "ssd/135m/1024", "failed": "RuntimeError: no tile runs"}],
        "learning": [learning("bfloat16", 20), {"key": "float32", "failed": death}],
    }
