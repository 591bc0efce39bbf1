"""Targets for the measuring commands `bench`, `aot` and `compare`: flags and earlier results."""

import os
import random
import shutil
from functools import partial

from tools.fuzz import measuring_patch_points
from tools.fuzz.child import Case, Sandbox
from tools.fuzz.measured import COMPARED
from tools.fuzz.programs import module
from tools.fuzz.target import Target, any_word, damage_files, files_of, overrides

_BENCH = module("flowhn_jax.bench", measuring_patch_points.for_bench)
_AOT = module("flowhn_jax.aot", measuring_patch_points.for_aot)
_COMPARE = module("flowhn_jax.compare", measuring_patch_points.for_compare)

_FLAGS = {  # valid flags of bench's subcommands
    "suite": ("out=new", "minutes=2", "topology=gpu:h100x1", "topology=v5e:2x2", "compare"),
    "kernels": ("operation=ssd", "size=small", "backend=xla", "length=77", "tokens=64",
                "dtype=float32", "peers", "repeats=2", "out=new"),
    "branches": ("config=recipe.py", "repeats=2", "out=new"),
    "parallel": ("config=recipe.py", "repeats=2", "out=new"),
    "models": ("repeats=2", "out=new"),
    "decode": ("config=recipe.py", "config.model.context=512", "repeats=2", "out=new"),
    "checkpoint": ("config=recipe.py", "repeats=2", "out=new"),
}  # fmt: skip
_NAMES = sorted({flag.partition("=")[0] for flags in _FLAGS.values() for flag in flags})
_TOPOLOGIES = ("gpu:h100x1", "gpu:h100x8", "gpu:h100x16", "gpu:h100x12", "gpu:h100x0", "gpu:",
               "v5e:2x2", "v5p:2x2x1", "v6e:1x1", "v5e:3x3", "v4:2x2x1", "v5e", ":",
               f"gpu:h100x{'9' * 30}")  # fmt: skip


def _bench_flags(rng: random.Random, sandbox: Sandbox) -> Case:
    """Combine flags of a subcommand with wrong ones, those of others, and odd values."""
    command = rng.choice(list(_FLAGS))
    flags = [flag for flag in _FLAGS[command] if "config" in flag or rng.random() < 0.4]
    own = [flag.partition("=")[0] for flag in _FLAGS[command]]
    for _ in range(rng.choice((0, 1, 1, 2))):
        name = rng.choice(own if rng.random() < 0.7 else _NAMES)
        flags.append(f"{name}={_value(rng)}")
    arguments = [command, *(f"--{flag}" for flag in flags)]
    if command in ("branches", "parallel", "decode", "checkpoint") and rng.random() < 0.5:
        arguments += overrides(rng)
    if rng.random() < 0.2:
        arguments.insert(rng.randrange(2), rng.choice(("again", "a", "-", "--nothing=1", "\udcff")))
    return Case(_BENCH, arguments, "flags")


def _value(rng: random.Random) -> str:
    """Return a value for a flag: an odd one in half of the cases, else one that is often valid."""
    return any_word(rng) if rng.random() < 0.5 else rng.choice(("1", "2", "8", "64", "true"))


def _suite(rng: random.Random, sandbox: Sandbox) -> Case:
    """Continue a suite on damaged results, or in a folder where output names are in use."""
    note = damage_files(rng, sandbox, "a/suite.json")
    for name in ("suite.md", "training.png", ".unfinished"):
        note += _occupy(rng, sandbox, sandbox.work / "a" / name)
    return Case(_BENCH, ["suite", "--out=a"], note)


def _suite_compare(rng: random.Random, sandbox: Sandbox) -> Case:
    """Compare two results, one or both of them damaged."""
    note = damage_files(rng, sandbox, "*/suite.json")
    folders = ["a", "b"]
    if rng.random() < 0.2:
        folders[rng.randrange(2)] = rng.choice(("nowhere", "a/suite.json", "", "\udcff", "é" * 90))
        note = f"{note}; {folders}"
    (sandbox.work / "new").mkdir()
    note += _occupy(
        rng, sandbox, sandbox.work / "new" / rng.choice((".unfinished", "comparison.md"))
    )
    return Case(_BENCH, ["suite", "--compare", *folders, "--out=new"], note)


def _occupy(rng: random.Random, sandbox: Sandbox, path: os.PathLike) -> str:
    """Sometimes create something at a path to be written; return a description."""
    how = {
        "a folder": partial(os.mkdir, path),
        "a pipe": partial(os.mkfifo, path),
        "a link outside": partial(os.symlink, sandbox.neighbour / "precious", path),
        "a link to nowhere": partial(os.symlink, sandbox.neighbour / "more", path),
    }
    if rng.random() < 0.85:
        return ""
    name = rng.choice(list(how))
    how[name]()
    return f"; {os.path.basename(path)} is {name}"


def _aot_flags(rng: random.Random, sandbox: Sandbox) -> Case:
    topology = rng.choice(_TOPOLOGIES[:2]) if rng.random() < 0.6 else rng.choice(_TOPOLOGIES)
    flags = {"config": "recipe.py", "topology": topology}
    for _ in range(rng.choice((0, 0, 1, 2))):
        flags[rng.choice(("num_slices", "mfu", "topology", "config", "json"))] = _value(rng)
    arguments = [f"--{name}={value}" for name, value in flags.items()]
    arguments += [flag for flag in ("--largest_batch", "--plan_only", "--json")
                  if rng.random() < 0.2]  # fmt: skip
    if rng.random() < 0.3:
        arguments += overrides(rng)
    return Case(_AOT, arguments, "flags")


def _compare_flags(rng: random.Random, sandbox: Sandbox) -> Case:
    flags = {"size": "tiny", "models": ",".join(COMPARED), "workdir": "new"}
    names = ("size", "models", "budget", "workdir", "rounds", "repeats", "context", "batch_size",
             "match", "seeds", "rates", "corpus", "recall", "report_only", "another")  # fmt: skip
    for _ in range(rng.choice((1, 1, 2))):
        flags[rng.choice(names)] = rng.choice(
            (_value(rng), _value(rng), "llama", "llama,llama", "135m", "recipe.py", "cmp",
             "tokens:1e4", "flops:1e12", "seconds:0", "seconds:9", "1e-3,3e-3", "flops",
             "packages", "0.2")
        )  # fmt: skip
    return Case(_COMPARE, [f"--{name}={value}" for name, value in flags.items()], "flags")


def _compare_results(rng: random.Random, sandbox: Sandbox) -> Case:
    """Continue a comparison, or only report it, from damaged measurements."""
    note = damage_files(rng, sandbox, "cmp/*.json*", "cmp/*/*.json*")
    for name in ("results.json", "results.md", "figure.png"):
        note += _occupy(rng, sandbox, sandbox.work / "cmp" / name)
    if rng.random() < 0.1:
        folder = rng.choice(
            [path.parent for path in files_of(sandbox, "cmp/*/*")] or [sandbox.work]
        )
        if folder != sandbox.work:
            shutil.rmtree(folder)
            folder.symlink_to("nowhere")
            note += f"; {folder.name} is a link"
    arguments = ["--size=tiny", f"--models={','.join(COMPARED)}", "--workdir=cmp", "--rounds=2"]
    if rng.random() < 0.5:
        arguments.append("--report_only")
    if rng.random() < 0.5:
        arguments.append("--budget=seconds:9")
    return Case(_COMPARE, arguments, note)


TARGETS = {
    "bench_flags": Target(("recipe", "suites"), _bench_flags),
    "bench_suite": Target(("suites",), _suite, 0.5),
    "bench_compare": Target(("suites",), _suite_compare, 0.7),
    "aot_flags": Target(("recipe",), _aot_flags),
    "compare_flags": Target(("recipe", "comparison"), _compare_flags, 0.5),
    "compare_results": Target(("comparison",), _compare_results, 0.5),
}
