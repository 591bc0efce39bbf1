"""All targets: each makes a command line and damages what the command reads."""

import json
import os
import pathlib
import random
import shutil
from collections.abc import Callable
from functools import partial

from tools.fuzz import measuring_targets, mutations, patch_points, seeds, tokenizer_targets
from tools.fuzz.child import Case, Sandbox
from tools.fuzz.programs import module, script
from tools.fuzz.target import (
    VALID,
    Target,
    any_key,
    any_word,
    damage_files,
    files_of,
    of_files,
    overrides,
)
from tools.fuzz.words import LITERALS, STATEMENTS


def make_case(name: str, rng: random.Random, sandbox: Sandbox, seeds_folder: pathlib.Path) -> Case:
    """Return a case of the target `name`."""
    target = TARGETS[name]
    for seed in target.seeds:
        shutil.copytree(seeds_folder / seed, sandbox.work, dirs_exist_ok=True)
    return target.build(rng, sandbox)


_TRAIN = script("train.py", patch_points.for_train)
_EVAL = script("eval.py", patch_points.for_eval)
_PREPARE = module("flowhn_jax.data.prepare")


def _recipe(rng: random.Random, sandbox: Sandbox) -> Case:
    """Damage a recipe, or let it set random keys to random values."""
    path = sandbox.work / "recipe.py"
    if rng.random() < 0.3:
        note = damage_files(rng, sandbox, "recipe.py")
    else:
        lines = []
        for _ in range(rng.choice((0, 1, 1, 1, 2, 3))):
            new = rng.choice((*LITERALS, repr(mutations.number(rng)).replace("nan", "None")))
            new = new if new.lstrip("-") != "inf" else "1e999"
            lines.append(f"config.{any_key(rng) or 'model'} = {new}")
        lines += [rng.choice(STATEMENTS)] if rng.random() < 0.3 else []
        note = "; ".join(lines)
        body = "".join(f"    {line}\n" for line in lines)
        path.write_text(
            path.read_text().replace("    return config\n", f"{body}    return config\n")
        )
    strategy = rng.choice(("", "", ":fai_split", ":no_split", ":nothing", ":", ":a:b"))
    note = note or strategy.removesuffix(":fai_split").removesuffix(":no_split")
    return Case(module("flowhn_jax.split"), [f"--config=recipe.py{strategy}"], note)


def _split_flags(rng: random.Random, sandbox: Sandbox) -> Case:
    arguments = ["--config=recipe.py", *overrides(rng)]
    if rng.random() < 0.2:
        arguments.append(f"--lengths={any_word(rng)},{any_word(rng)}")
    return Case(module("flowhn_jax.split"), arguments, "flags")


def _train_flags(rng: random.Random, sandbox: Sandbox) -> Case:
    workdir = rng.choice(
        ("new", "new", "run", "recipe.py", "a/b/c", "", "\udcff", "x" * 300, "set")
    )
    arguments = ["--config=recipe.py", f"--workdir={workdir}", *overrides(rng)]
    if rng.random() < 0.3:
        arguments.insert(rng.randrange(3), rng.choice(
            ("again", "--nothing=1", "--config", "--workdir", "--config.model", "-", "--", "---",
             "--config.model=1", "--process_id=0", "--num_processes=-1", "--noconfig", "\udcff=1")
        ))  # fmt: skip
    return Case(_TRAIN, arguments, "flags")


_EVAL_OPTIONS = {
    "perplexity": ("data", "stride", "context", "by_position"),
    "generate": ("prompt", "prompts", "max_new_tokens", "temperature", "top_k", "top_p", "min_p",
                 "repetition_penalty", "stop", "batch_size", "replan", "seed"),
    "tasks": ("tasks", "task_dir"),
    "recall": ("lengths", "items", "seed"),
    "throughput": ("repeats",),
}  # fmt: skip
_EVAL_GIVEN = {
    "perplexity": [],
    "generate": ["--prompt=The door"],
    "tasks": ["--tasks=piqa", "--task_dir=."],
    "recall": ["--lengths=64", "--items=2"],
    "throughput": [],
}
_EVAL_FILES = ("set", "run", ".", "text.txt", "prompts.txt", "nowhere", "piqa.jsonl", "recipe.py")


def _eval_flags(rng: random.Random, sandbox: Sandbox) -> Case:
    mode = rng.choice(list(_EVAL_OPTIONS))
    arguments = [f"--mode={mode}", "--workdir=run", *_EVAL_GIVEN[mode]]
    for _ in range(rng.choice((1, 1, 2))):
        options = _EVAL_OPTIONS[mode if rng.random() < 0.85 else rng.choice(list(_EVAL_OPTIONS))]
        value = any_word(rng) if rng.random() < 0.7 else rng.choice(_EVAL_FILES)
        arguments.append(f"--{rng.choice(options)}={value}")
    return Case(_EVAL, arguments, "flags")


def _eval(*more: str) -> list[str]:
    return ["--workdir=run", *more]


def _tasks(rng: random.Random, sandbox: Sandbox) -> Case:
    task = rng.choice(seeds.TASKS)
    note = damage_files(rng, sandbox, f"{task}*")
    return Case(_EVAL, _eval("--mode=tasks", f"--tasks={task}", "--task_dir=."), note)


def _prompts(rng: random.Random, sandbox: Sandbox) -> Case:
    name = rng.choice(("prompts.txt", "prompts.jsonl"))
    note = damage_files(rng, sandbox, name)
    return Case(_EVAL, _eval("--mode=generate", f"--prompts={name}"), note)


def _run_tokenizer(rng: random.Random, sandbox: Sandbox) -> Case:
    """Damage the tokenizer files of a run made by an import."""
    (sandbox.work / "tokenizer.json").rename(sandbox.work / "run/tokenizer.json")
    settings = json.dumps({"eos_token": "<|endoftext|>"})
    (sandbox.work / "run/tokenizer_config.json").write_text(settings)
    note = damage_files(rng, sandbox, "run/tokenizer*")
    return Case(_EVAL, _eval("--mode=perplexity", "--data=text.txt"), note)


def _prepare(source: str, tokenizer: str) -> Callable[[random.Random, Sandbox], Case]:
    """Return a `build` that damages the tokenizer file, or the source if the tokenizer is bytes."""
    arguments = [f"--source={source}", f"--tokenizer={tokenizer}", "--out=out", "--context=32"]
    damaged = source if tokenizer == "bytes" else tokenizer
    return of_files(_PREPARE, [*arguments, "--workers=1"], damaged)


def _prepare_folder(rng: random.Random, sandbox: Sandbox) -> Case:
    """Damage files in a folder of sources of all kinds."""
    source = sandbox.work / "source"
    source.mkdir()
    for name in ("text.txt", "docs.jsonl", "docs.jsonl.gz", "docs.parquet"):
        (sandbox.work / name).rename(source / name)
    note = damage_files(rng, sandbox, "source/*")
    return Case(_PREPARE, ["--source=source", "--tokenizer=bytes", "--out=out"], note)


def _prepare_flags(rng: random.Random, sandbox: Sandbox) -> Case:
    given = {"source": "docs.jsonl", "tokenizer": "bytes", "out": "out", "workers": "1"}
    names = [
        *given,
        "context",
        "validation_fraction",
        "text_field",
        "eot_token",
        "first_token",
        "another",
    ]
    for _ in range(rng.choice((1, 1, 2))):
        given[rng.choice(names)] = (
            any_word(rng)
            if rng.random() < 0.7
            else rng.choice((*_EVAL_FILES, "n", "tokenizer.json"))
        )
    if given["out"] == ".":  # prepare writes next to --out, which would be outside the sandbox
        given["out"] = "out"
    # The audit hook would not watch worker processes.
    if given["workers"].replace("_", "").isdecimal():
        given["workers"] = rng.choice(("0", "1"))
    return Case(_PREPARE, [f"--{name}={value}" for name, value in given.items()], "flags")


def _prepare_over(rng: random.Random, sandbox: Sandbox) -> Case:
    """Prepare to a name where something exists already."""
    out = sandbox.work / "set"
    note = damage_files(rng, sandbox, "set/*") or "another request"
    must_refuse = False
    kind = rng.randrange(6)
    unfinished, replaced = sandbox.work / ".set.unfinished", sandbox.work / ".set.replaced"
    if kind == 0:
        unfinished.symlink_to(sandbox.neighbour)
        note, must_refuse = f"{note}; .set.unfinished is a link", True
    elif kind == 1:
        unfinished.mkdir()
        (unfinished / "lock").symlink_to(sandbox.neighbour / "precious")
        note, must_refuse = f"{note}; its lock is a link", True
    elif kind == 2:
        replaced.symlink_to(sandbox.neighbour)
        note = f"{note}; .set.replaced is a link"
    elif kind == 3:
        (unfinished / "folder").mkdir(parents=True)
        note = f"{note}; .set.unfinished holds a folder"
    elif kind == 4:
        unfinished.mkdir()
        os.mkfifo(unfinished / "lock")
        note, must_refuse = f"{note}; its lock is a pipe", True
    if rng.random() < 0.3:
        shutil.rmtree(out)
        rng.choice((out.mkdir, out.touch, partial(out.symlink_to, "nowhere")))()
        must_refuse &= not out.is_symlink()  # the link leads to another name
    context = 48 if must_refuse else 32  # a set of the same request is used, and nothing is written
    arguments = ["--source=docs.jsonl", "--tokenizer=bytes", "--out=set", f"--context={context}"]
    arguments += ["--validation_fraction=0.1"] + ["--overwrite"] * rng.randrange(2)
    return Case(_PREPARE, arguments, note, must_refuse)


def _prepared_set(rng: random.Random, sandbox: Sandbox) -> Case:
    note = damage_files(rng, sandbox, "set/*")
    must_refuse = False
    if rng.random() < 0.15:
        note, must_refuse = f"{note}; a shard outside", _set_escapes(rng, sandbox)
    return Case(_TRAIN, ["--config=recipe.py", "--workdir=new"], note, must_refuse)


def _set_escapes(rng: random.Random, sandbox: Sandbox) -> bool:
    """Let the index name a valid shard outside the set; return whether the index was changed."""
    index, name = sandbox.work / "set/index.json", "train-00000.array_record"
    if not (sandbox.work / "set" / name).is_file() or not index.is_file():
        return False
    shutil.copy(sandbox.work / "set" / name, sandbox.neighbour / name)
    other = rng.choice((f"../../neighbour/{name}", str(sandbox.neighbour / name), f"../set/{name}"))
    text = index.read_text(errors="replace")
    index.write_text(text.replace(f'"file": "{name}"', f'"file": "{other}"'))
    return index.read_text() != text


def _set_changes(rng: random.Random, sandbox: Sandbox) -> Case:
    """Damage a prepared set while a job reads it."""
    state = rng.getstate()

    def meanwhile() -> None:
        copy = random.Random()
        copy.setstate(state)
        mutations.damage(copy, copy.choice(files_of(sandbox, "set/*")))

    program = script("train.py", partial(patch_points.for_train, meanwhile))
    return Case(program, ["--config=recipe.py", "--workdir=new"], "while it is read")


def _import(folder: str, *patterns: str) -> Target:
    def build(rng: random.Random, sandbox: Sandbox) -> Case:
        note, must_refuse = damage_files(rng, sandbox, *patterns), False
        index = sandbox.work / "source/model.safetensors.index.json"
        name = "model-0.safetensors"
        if index.is_file() and (sandbox.work / "source" / name).is_file() and rng.random() < 0.15:
            shutil.copy(sandbox.work / "source" / name, sandbox.neighbour / name)
            text = index.read_text(errors="replace")
            other = rng.choice((f"../../neighbour/{name}", f"../source/{name}", ".", "..", "/"))
            index.write_text(text.replace(f'"{name}"', f'"{other}"'))
            note, must_refuse = f"{note}; a shard outside", index.read_text() != text
        arguments = ["import", "--source=source", "--workdir=new"]
        return Case(module("flowhn_jax.interop"), arguments, note, must_refuse)

    return Target((folder,), build, 0.3)


def _synthetic_flags(rng: random.Random, sandbox: Sandbox) -> Case:
    given = {"out": "texts.jsonl", "documents": "3"}
    for _ in range(rng.choice((1, 1, 2))):
        name = rng.choice(("out", "tasks", "size", "seed", "another"))
        given[name] = any_word(rng)
    return Case(
        module("flowhn_jax.data.synthetic"),
        [f"--{name}={value}" for name, value in given.items()],
        "flags",
    )


def _checkpoint(rng: random.Random, sandbox: Sandbox) -> Case:
    found = sorted(path for path in sandbox.work.glob("run/checkpoints/**/*") if path.is_file())
    # Files of a step, not of its arrays.
    few = [path for path in found if path.parent.parent.name == "checkpoints"]
    note = ""
    if rng.random() >= VALID:
        for _ in range(rng.choice((1, 1, 2, 8))):
            path = rng.choice(rng.choice((few, found)))
            if path.is_file() and not path.is_symlink():
                note += f"{path.parent.name}/{mutations.damage(rng, path)}; "
    if rng.random() < 0.2:
        arguments = ["export", "--workdir=run", "--out=out"]
        return Case(module("flowhn_jax.interop"), arguments, note)
    arguments = _eval("--mode=perplexity")
    if rng.random() < 0.2:
        which = rng.choice(("latest", "best", "1", "2", "../1", any_word(rng)))
        arguments.append(f"--checkpoint={which}")
        note = f"{note}; --checkpoint"
    return Case(script("eval.py", patch_points.for_checkpoint), arguments, note)


LAST = "checkpoint"
TARGETS = {
    "recipe": Target(("recipe",), _recipe),
    "split_flags": Target(("recipe",), _split_flags),
    "train_flags": Target(("recipe", "set", "run"), _train_flags),
    "eval_flags": Target(("recipe", "set", "run", "text", "prompts", "tasks"), _eval_flags),
    "run_config": Target(
        ("set", "run"), of_files(_EVAL, _eval("--mode=perplexity"), "run/config.json")
    ),
    "text": Target(
        ("set", "run", "text"),
        of_files(_EVAL, _eval("--mode=perplexity", "--data=text.txt"), "text.txt"),
    ),
    "run_tokenizer": Target(("run", "text", "tokenizer"), _run_tokenizer),
    "prompts": Target(("set", "run", "prompts"), _prompts),
    "tasks": Target(("set", "run", "tasks"), _tasks),
    "prepare_text": Target(("text",), _prepare("text.txt", "bytes")),
    "prepare_jsonl": Target(("jsonl",), _prepare("docs.jsonl", "bytes")),
    "prepare_gzip": Target(("gzip",), _prepare("docs.jsonl.gz", "bytes")),
    "prepare_zstd": Target(("zstd",), _prepare("docs.jsonl.zst", "bytes")),
    "prepare_parquet": Target(("parquet",), _prepare("docs.parquet", "bytes")),
    "prepare_tokenizer": Target(("jsonl", "tokenizer"), _prepare("docs.jsonl", "tokenizer.json")),
    "prepare_folder": Target(("text", "jsonl", "gzip", "parquet"), _prepare_folder),
    "prepare_flags": Target(
        ("jsonl", "text", "tokenizer", "recipe", "set", "run", "prompts"), _prepare_flags
    ),
    "prepare_over": Target(("set",), _prepare_over),
    "set": Target(("recipe", "set"), _prepared_set),
    "bpe_set": Target(("recipe", "bpe_set"), _prepared_set),
    "set_changes": Target(("recipe", "set"), _set_changes),
    "import_ours": _import("ours", "source/*"),
    "import_theirs": _import("theirs", "source/*"),
    "synthetic_flags": Target((), _synthetic_flags),
    **measuring_targets.TARGETS,
    **tokenizer_targets.TARGETS,
    LAST: Target(("set", "trained"), _checkpoint, 0.1),
}
