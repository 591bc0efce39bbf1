"""Export a run as a folder of safetensors or as the authors' state dict; import such a folder."""

import dataclasses

from flowhn_jax import models
from flowhn_jax.checkpoints import workdir as workdir_lib
from flowhn_jax.checkpoints.parameters import LATEST, find_step, load_params, save_params
from flowhn_jax.checkpoints.rows import read_rows
from flowhn_jax.config import Config, MeshConfig, ModelConfig
from flowhn_jax.data.open import open_tokenizer
from flowhn_jax.data.prepared import TOKENIZER
from flowhn_jax.interop import huggingface, model_card, own_format, reference, tokenizer_files
from flowhn_jax.interop import source as source_lib
from flowhn_jax.parallel.mesh import make_mesh
from flowhn_jax.storage import Place, place, readable_place


def export_run(workdir: str, out: str, checkpoint: str = LATEST, ema: bool = False) -> str:
    """Export a run's model and tokenizer; return a line that describes the export.

    Args:
      workdir: folder of the run.
      out: receives config.json, the safetensors, the model's code where transformers has none, the
        files of the tokenizer (tokenizer.json, tokenizer_config.json and others that the run was
        imported with), and a model card, unless `out` has a README.md of someone else.
      checkpoint: as in `load_params`.
      ema: whether to export the average of the parameters, as in `load_params`.

    Raises:
      FileNotFoundError: `workdir` holds no run or no checkpoint.
      ValueError: as in `huggingface.save`; a file of the tokenizer is damaged; or `out` holds a
        run, or a tokenizer file of another model that would stay.
    """
    if (place(out) / "checkpoints").is_dir():
        raise ValueError(f"--out must not be the workdir of a run; {out!r} is one.")
    config = workdir_lib.read_config(workdir)
    mesh = make_mesh(MeshConfig(data=1), 1)
    step = find_step(workdir, checkpoint, ema)
    params = load_params(workdir, config.model, mesh, str(step), ema)
    tokenizer = open_tokenizer(config, workdir)
    texts = tokenizer_files.read(workdir, tokenizer_files.CONFIG_KEYS)
    texts = tokenizer_files.files_for(texts, tokenizer)
    keys = tokenizer_files.config_keys(texts, tokenizer)
    texts.pop(tokenizer_files.CONFIG_KEYS, None)
    tokenizer_files.check_replaces_all(out, texts)
    huggingface.save(out, config.model, params, keys)
    tokenizer_files.write(out, texts)
    card = place(out) / model_card.FILE
    if not card.is_file() or model_card.is_ours(card.read_text()):
        has_code = (place(out) / own_format.CODE).is_file()
        rows, commands = read_rows(workdir), workdir_lib.read_commands(workdir)
        text = model_card.render(config, step, rows, has_code=has_code, ema=ema, commands=commands)
        card.write_whole(text)
    return f"wrote {config.model.name}, {models.param_count(config.model):,} parameters, to {out}"


def export_reference(workdir: str, out: str, checkpoint: str = LATEST, ema: bool = False) -> str:
    """Export a run's model as the authors' state dict; return a line that describes the export.

    Args:
      workdir: folder of the run.
      out: a .pth or an .npz file.
      checkpoint: as in `load_params`.
      ema: whether to export the average of the parameters, as in `load_params`.

    Raises:
      FileNotFoundError: `workdir` holds no run or no checkpoint.
      ValueError, ImportError: as in `reference.save`.
    """
    config = workdir_lib.read_config(workdir)
    params = load_params(workdir, config.model, make_mesh(MeshConfig(data=1), 1), checkpoint, ema)
    mode = reference.save(out, config.model, params)
    return f"wrote {config.model.name}, Parallel_Mode {mode} of the authors' code, to {out}"


def import_run(source: str, workdir: str) -> str:
    """Import a model saved by `export_run` or transformers; return a line that describes it.

    Args:
      source: folder of the model.
      workdir: a new or empty folder.

    Raises:
      FileNotFoundError, ValueError: as in `huggingface.load`, or `workdir` is not empty.
    """
    path = place(workdir)
    if path.exists() and (not path.is_dir() or path.children()):
        raise ValueError(f"--workdir must be a new or empty folder; {workdir!r} is not.")
    model, params = huggingface.load(source)
    texts = _read_texts(readable_place(source), model)
    workdir_lib.make(workdir)
    tokenizer_files.write(path, texts)
    workdir_lib.write_config(workdir, dataclasses.replace(Config(), model=model))
    save_params(workdir, model, params)
    count = models.param_count(model)
    return f"read {model.name}, {count:,} parameters, from {source} into {workdir}; " + (
        "with its tokenizer"
        if tokenizer_files.SETTINGS in texts
        else f"no {TOKENIZER}, so texts are read as bytes"
    )


def _read_texts(source: Place, model: ModelConfig) -> dict[str, str]:
    """Return the texts of the files besides the model that the workdir keeps, by name.

    Raises:
      ValueError: as in `tokenizer_files.read`, or the tokenizer has more tokens than the model.
    """
    texts = source_lib.read_texts(source)
    tokenizer = tokenizer_files.read_tokenizer(source, texts)
    if tokenizer is None:
        return tokenizer_files.without_tokenizer(texts)
    if tokenizer.vocab_size > model.vocab_size:
        raise ValueError(
            f"config.json: vocab_size must be at least the {tokenizer.vocab_size} tokens of "
            f"{str(source / TOKENIZER)!r}; got {model.vocab_size}. In transformers, "
            f"model.resize_token_embeddings({tokenizer.vocab_size}) adds the missing ones."
        )
    return tokenizer_files.files_to_keep(texts, tokenizer)
