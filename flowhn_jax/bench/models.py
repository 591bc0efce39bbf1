"""`bench models`: training steps of our Llama and Mamba-1 beside Hugging Face's, in one run."""

import json
import statistics
import time
from typing import Any

import jax
import numpy as np

from flowhn_jax import config as config_lib
from flowhn_jax.bench import pytorch
from flowhn_jax.bench.pytorch import Step
from flowhn_jax.bench.throughput import random_batch
from flowhn_jax.checkpoints.state import init_state
from flowhn_jax.config import Config
from flowhn_jax.interop.families import to_json
from flowhn_jax.interop.layout import to_theirs
from flowhn_jax.parallel.mesh import make_mesh
from flowhn_jax.training.step import make_train_step
from kernels import backends

_SIZES = {"vocab_size": 4096, "context": 512, "width": 256}
_MODELS = {
    "llama": dict(blocks=4, mlp_width=1024, heads=8, kv_heads=8),
    "mamba1": dict(blocks=4),
}


def bench_models(*, repeats: int, out: str) -> list[dict[str, Any]]:
    """Times updates of both in turns, from equal parameters on equal tokens, and prints the ratio.

    Width 256, 4 layers, vocabulary 4096, 4 sequences of 512, float32 matrix products, AdamW with
    clipping. PyTorch runs as it comes, eagerly, with its fused attention; Hugging Face's Mamba-1
    runs mamba-ssm's CUDA kernels, else mambapy's parallel scan, else, where neither is installed, a
    loop over the tokens, whose backward pass takes minutes. Other load on the machine delays
    PyTorch's threads more than ours: measure on an idle one.

    Args:
      repeats: timed updates of each, of which the median counts.
      out: path of the JSON file.

    Raises:
      ImportError: PyTorch or transformers is not installed.
    """
    try:
        import torch
        import transformers
    except ImportError as error:
        raise ImportError(
            "bench models measures Hugging Face's models beside ours, and needs them: "
            "pip install torch transformers."
        ) from error

    on_gpu = torch.cuda.is_available()
    print(
        f"{jax.devices()[0].device_kind}, jax {jax.__version__}; torch {torch.__version__} on "
        f"{'a GPU' if on_gpu else f'{torch.get_num_threads()} threads'}, "
        f"transformers {transformers.__version__}\n"
    )
    print(f"{'model':>8} {'ours tokens/s':>14} {'theirs':>9} {'ratio':>6} {'least':>6} {'most':>6}")
    rows = []
    for kind, sizes in _MODELS.items():
        config = _config(kind, sizes)
        steps = _steps(config)
        losses = [step() for step in steps]
        seconds: list[list[float]] = [[], []]
        for _ in range(repeats):
            for each, step in zip(seconds, steps, strict=True):
                start = time.perf_counter()
                step()
                each.append(time.perf_counter() - start)
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
        print(
            f"{kind:>8} {ours:>14,.0f} {theirs:>9,.0f} {rows[-1]['ratio']:>6.2f} "
            f"{min(ratios):>6.2f} {max(ratios):>6.2f}   first losses {losses[0]:.5f} and "
            f"{losses[1]:.5f}",
            flush=True,
        )
    with open(out, "w") as file:
        versions = {"jax": jax.__version__, "torch": torch.__version__}
        json.dump({"device": jax.devices()[0].device_kind, **versions, "rows": rows}, file)
    print(f"wrote {out}")
    return rows


def _config(kind: str, sizes: dict[str, int]) -> Config:
    model = {"kind": kind, "dtype": "float32"} | _SIZES
    train = {"batch_size": 4, "steps": 1000, "warmup": 0.0, "final_learning_rate": 1.0}
    return config_lib.parse({"model": model | sizes, "train": train, "mesh": {"data": 1}})


def _steps(config: Config) -> tuple[Step, Step]:
    """Ours and theirs, both on one batch and from our initial parameters."""
    mesh = make_mesh(config.mesh, config.train.batch_size)
    with jax.set_mesh(mesh), backends.use(config.kernels.backend):
        batch, state = random_batch(config, mesh), init_state(config, mesh)
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
        settings["use_mambapy"] = True  # where it is installed
    hf = transformers.AutoConfig.for_model(settings.pop("model_type"), **settings)
    model = transformers.AutoModelForCausalLM.from_config(hf)
    ours = flatten_dict(params)
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
