"""The model card of an export: README.md, as the Hugging Face hub shows it."""

from collections.abc import Sequence
from typing import Any

from flowhn_jax import models
from flowhn_jax.checkpoints.rows import Row
from flowhn_jax.config import Config, FlowHNConfig
from flowhn_jax.report.table import markdown
from flowhn_jax.utils.version import __version__

FILE = "README.md"
_MARK = "<!-- written by `flowhn export` -->"
_NAMES = {
    "flowhn": "FlowHN",
    "falcon_h1": "Falcon-H1",
    "hymba": "Hymba",
    "jamba": "Jamba",
    "llama": "Llama",
    "mamba1": "Mamba",
    "mamba2": "Mamba-2",
    "shm": "SHM",
}
_SIZES = (
    ("width", "width"),
    ("blocks", "blocks"),
    ("mlp_width", "hidden units of an MLP"),
    ("heads", "query heads"),
    ("kv_heads", "key-value heads"),
    ("ssm_state", "states per channel"),
    ("vocab_size", "vocabulary"),
    ("context", "context in training"),
)


def is_ours(text: str) -> bool:
    """Return whether a README.md was written by `render`."""
    return _MARK in text


def render(
    config: Config,
    step: int,
    rows: Sequence[Row],
    *,
    has_code: bool,
    ema: bool = False,
    commands: Sequence[str] = (),
) -> str:
    """Return the text of a card.

    Args:
      config: the config of the run.
      step: the step of the exported checkpoint.
      rows: the run's metrics; empty if it was trained elsewhere.
      has_code: whether the export contains code that transformers must be allowed to run.
      ema: whether the export is of the average of the parameters.
      commands: the command lines that trained the run.
    """
    name = _NAMES.get(config.model.kind, config.model.kind)
    parts = [
        "---\nlibrary_name: transformers\npipeline_tag: text-generation\n---",
        _MARK,
        f"# {name}, {models.param_count(config.model):,} parameters",
        f"A language model exported by flowhn-jax {__version__}.",
        _usage(has_code),
        "## Model",
        markdown(["", ""], _model_rows(config)),
    ]
    if trained := _training_rows(config, step, rows, ema):
        parts += ["## Training", markdown(["", ""], trained)]
        if commands:
            parts.append("\n".join(("```", *commands, "```")))
    return "\n\n".join(parts) + "\n"


def _usage(has_code: bool) -> str:
    trust = ", trust_remote_code=True" if has_code else ""
    return (
        "```python\n"
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
        'tokenizer = AutoTokenizer.from_pretrained("FOLDER")\n'
        f'model = AutoModelForCausalLM.from_pretrained("FOLDER"{trust})\n'
        'inputs = tokenizer("The", return_tensors="pt")\n'
        "print(tokenizer.decode(model.generate(**inputs, max_new_tokens=50)[0]))\n"
        "```\n"
        "With flowhn-jax:\n"
        "```\n"
        "flowhn import --source=FOLDER --workdir=runs/imported\n"
        "flowhn eval --workdir=runs/imported --mode=generate --prompt=The\n"
        "```"
    )


def _model_rows(config: Config) -> list[list[str]]:
    model = config.model
    rows = [["kind", model.kind]]
    if isinstance(model, FlowHNConfig):
        rows += [["split strategy", model.split.strategy], ["SSM branch", model.ssm]]
    found: list[tuple[str, Any]] = [(text, getattr(model, key, None)) for key, text in _SIZES]
    return rows + [[text, f"{value:,}"] for text, value in found if value is not None]


def _training_rows(config: Config, step: int, rows: Sequence[Row], ema: bool) -> list[list[str]]:
    """Return what the rows say of the checkpoint's step; nothing without a row of it."""
    until = [row for row in rows if row["step"] <= step]
    if not until or until[-1]["step"] != step:
        return []
    found = [
        ["data", config.data.path or "Python's own sources and documentation"],
        *([["initial parameters", start]] if (start := config.train.init_from) else []),
        ["steps", f"{step:,}"],
        ["tokens", f"{until[-1]['tokens']:,}"],
        ["peak learning rate", f"{config.train.learning_rate:g}"],
    ]
    key = "validation_bits_per_byte"
    if ema:
        key = "validation_ema_bits_per_byte"
        found.append(["parameters", f"averaged, with train.ema={config.train.ema:g}"])
    scored = [row for row in until if row.get(key) is not None]
    if scored:
        bits = scored[-1][key]
        found.append([f"validation, step {scored[-1]['step']:,}", f"{bits:.4f} bits per byte"])
    return found
