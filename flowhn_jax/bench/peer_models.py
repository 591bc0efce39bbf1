"""`bench models`: train steps of our Llama and Mamba-1 next to Hugging Face's, in one process."""

import statistics
import time
from typing import Any

import jax
import numpy as np

from flowhn_jax import config as config_lib
from flowhn_jax.bench import pytorch
from flowhn_jax.bench.output import check_out, write_results
from flowhn_jax.bench.pytorch import Step
from flowhn_jax.bench.throughput import random_batch
from flowhn_jax.checkpoints.state import init_state
from flowhn_jax.config import Config
from flowhn_jax.interop.families import to_json
from flowhn_jax.interop.layout import to_theirs
from flowhn_jax.parallel.mesh import make_mesh
from flowhn_jax.report.table import markdown
from flowhn_jax.training.step import make_train_step
from flowhn_jax.utils.progress import progress
from kernels import backends

_SIZES = {"vocab_size": 4096, "context": 512, "width": 256}
_MODELS = {
    "llama": dict(blocks=4, mlp_width=1024, heads=8, kv_heads=8),
    "mamba1": dict(blocks=4),
}


def bench_models(*, repeats: int, out: str) -> list[dict[str, Any]]:
    """Time alternating updates of both, from equal parameters on equal tokens; print the ratio.

    Width 256, 4 layers, vocabulary 4096, 4 sequences of 512, float32 matrix products, AdamW with
    clipping. PyTorch runs eagerly, with its fused attention; Hugging Face's Mamba-1 runs
    mamba-ssm's CUDA kernels, else mambapy's parallel scan, else, if neither is installed, a loop
    over the tokens, whose backward pass takes minutes. Other load on the machine delays PyTorch's
    threads more than ours: measure on an idle one.

    Args:
      repeats: timed updates of each; the median counts.
      out: path of the JSON file.

    Returns:
      A row for each model.

    Raises:
      ImportError: PyTorch or transformers is not installed.
      ValueError: `out` cannot be written.
    """
    try:
        import torch
        import transformers
    except ImportError as error:
        raise ImportError(
            "bench models runs Hugging Face's models and needs PyTorch and transformers: "
            "pip install torch transformers."
        ) from error

    check_out(out)
    on_gpu = torch.cuda.is_available()
    print(
        f"{jax.devices()[0].device_kind}, jax {jax.__version__}; torch {torch.__version__} on "
        f"{'a GPU' if on_gpu else f'{torch.get_num_threads()} threads'}, "
        f"transformers {transformers.__version__}\n"
    )
    rows = []
    with progress(len(_MODELS) * (repeats + 1), "timing updates", "pairs of updates") as bar:
        for kind, sizes in _MODELS.items():
            config = _config(kind, sizes)
            steps = _steps(config)
            losses = [step() for step in steps]
            bar.update()
            seconds: list[list[float]] = [[], []]
            for _ in range(repeats):
                for each, step in zip(seconds, steps, strict=True):
                    start = time.perf_counter()
                    step()
                    each.append(time.perf_counter() - start)
                bar.update()
            tokens = config.train.batch_size * config.model.context
            ratios = [theirs / ours for ours, theirs in zip(*seconds, strict=True)]
            ours, theirs = (tokens / statistics.median(each) for each in seconds)
            rows.append(
                {
                    "model": kind,
                    "tokens_per_second": ours,
                    "peer_tokens_per_second": theirs,
                    "ratio": statistics.median(ratios),
                    "ratio_min": min(ratios),
                    "ratio_max": max(ratios),
                    "first_loss": losses[0],
                    "peer_first_loss": losses[1],
                }
            )
    print(_table(rows))
    write_results(out, {"torch": torch.__version__, "rows": rows})
    return rows


def _table(rows: list[dict[str, Any]]) -> str:
    headings = ["model", "ours, tokens/s", "Hugging Face's", "ratio", "min", "max"]
    headings += ["our first loss", "theirs"]
    table = [
        [
            row["model"],
            f"{row['tokens_per_second']:,.0f}",
            f"{row['peer_tokens_per_second']:,.0f}",
            *(f"{row[name]:.2f}" for name in ("ratio", "ratio_min", "ratio_max")),
            *(f"{row[name]:.5f}" for name in ("first_loss", "peer_first_loss")),
        ]
        for row in rows
    ]
    return markdown(headings, table)


def _config(kind: str, sizes: dict[str, int]) -> Config:
    model = {"kind": kind, "dtype": "float32"} | _SIZES
    train = {"batch_size": 4, "steps": 1000, "warmup": 0.0, "final_learning_rate": 1.0}
    return config_lib.parse({"model": model | sizes, "train": train, "mesh": {"data": 1}})


def _steps(config: Config) -> tuple[Step, Step]:
    """Return our update and theirs, on one batch and from our initial parameters."""
    mesh = make_mesh(config.mesh, config.train.batch_size)
    with jax.set_mesh(mesh), backends.use(config.kernels.backend):
        batch = random_batch(config, mesh)
        state = init_state(config, mesh)
        train_step = make_train_step(config, mesh).lower(state, batch).compile()
    theirs = _their_step(config, jax.device_get(state.params), np.asarray(batch["tokens"]))

    def ours() -> float:
        nonlocal state
        state, metrics = train_step(state, batch)
        return float(metrics["loss"])

    return ours, theirs


def _their_step(config: Config, params: Any, tokens: np.ndarray) -> Step:
    import torch
    import transformers
    from flax.traverse_util import flatten_dict

    family, hf_config = to_json(config.model)
    settings = {key: value for key, value in hf_config.items() if key != "architectures"}
    if config.model.kind == "mamba1":
        settings["use_mambapy"] = True  # if it is installed
    hf = transformers.AutoConfig.for_model(settings.pop("model_type"), **settings)
    model = transformers.AutoModelForCausalLM.from_config(hf)
    ours: Any = flatten_dict(params)
    arrays = {
        name: torch.from_numpy(np.array(to_theirs(path, ours[path])))
        for name, path in family.names(config.model).items()
    }
    model.load_state_dict(arrays)
    return pytorch.make_step(
        model,
        lambda inputs: model(input_ids=inputs, use_cache=False).logits,
        config.train,
        tokens,
    )
