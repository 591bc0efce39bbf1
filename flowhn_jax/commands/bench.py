"""`flowhn bench SUBCOMMAND`: measure a machine, or parts of the code."""

import os
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from absl.flags import FlagHolder

from flowhn_jax.commands import runner
from flowhn_jax.commands.flags import Flags, check_local, define_optional_config
from flowhn_jax.utils import cpu
from flowhn_jax.utils.text import short_repr

_MAX_TOKENS = 2**24


def define(flags: Flags) -> Mapping[str, Callable[..., None]]:
    """Define the flags; return the functions that run the subcommands, by name."""
    out = flags.path(
        "out",
        "JSON file to write; default: bench_SUBCOMMAND.json. For suite a folder; default: "
        "runs/suite, with --topology runs/rehearsal, with --compare suite_comparison.",
    )
    repeats = flags.integer(
        "repeats",
        20,
        "timed calls, of which the median is taken; not for suite.",
        minimum=1,
        maximum=10_000,
    )
    parse_config = define_optional_config(flags)
    suite = _define_suite(flags, out)
    kernels = _define_kernels(flags, repeats, out)

    def models() -> None:
        from flowhn_jax.bench.peer_models import bench_models

        bench_models(repeats=repeats.value, out=out.value or "bench_models.json")

    def checkpoint() -> None:
        from flowhn_jax import config as config_lib
        from flowhn_jax import recipes
        from flowhn_jax.bench.checkpoint_cost import bench_checkpoint

        config = parse_config() or config_lib.parse(recipes.load("flowhn_tiny"))
        bench_checkpoint(config, repeats=repeats.value, out=out.value or "bench_checkpoint.json")

    def with_config(name: str, bench: Callable[..., Any]) -> None:
        config = parse_config()
        if config is None:
            raise ValueError(
                f"--config must be given for flowhn bench {name}, e.g. --config=flowhn_135m."
            )
        bench(config, repeats=repeats.value, out=out.value or f"bench_{name}.json")

    def branches() -> None:
        from flowhn_jax.bench.branch_times import bench_branches

        with_config("branches", bench_branches)

    def parallel() -> None:
        from flowhn_jax.bench.branch_parallel import bench_parallel

        with_config("parallel", bench_parallel)

    def decode() -> None:
        from flowhn_jax.bench.decode import bench_decode

        with_config("decode", bench_decode)

    return {
        "suite": suite,
        "kernels": kernels,
        "models": models,
        "checkpoint": checkpoint,
        "branches": branches,
        "parallel": parallel,
        "decode": decode,
    }


def _define_suite(flags: Flags, out: FlagHolder) -> Callable[..., None]:
    """Define the flags of `bench suite`; return the function that runs it."""
    with flags.group("suite"):
        minutes = flags.number("minutes", 8, "longest time to measure.", minimum=0.05, maximum=1440)
        is_comparison = flags.boolean(
            "compare", False, "put the results of two folders side by side: suite --compare A B."
        )
        topology = flags.string(
            "topology",
            None,
            "compile the suite's programs for absent hardware, e.g. gpu:h100x1 or v5e:1x1, and "
            "run none.",
        )

    def suite(first_folder: str = "", second_folder: str = "") -> None:
        from flowhn_jax.aot import topology as topology_lib
        from flowhn_jax.bench.suite import command, rehearsal, side_by_side

        if out.value is not None:
            check_local("out", out.value)
        folders = [each for each in (first_folder, second_folder) if each]
        for folder in folders:
            check_local("compare", folder)
        if folders and not is_comparison.value:
            raise ValueError(
                f"unexpected argument {short_repr(folders[0])}; to compare two folders type "
                "flowhn bench suite --compare A B."
            )
        if is_comparison.value:
            if len(folders) != 2:
                raise ValueError(
                    f"--compare takes two folders, as in --compare A B; got {len(folders)}."
                )
            side_by_side.compare(folders[0], folders[1], out.value or "suite_comparison")
            return
        if topology.value is not None:
            topology_lib.describe(topology.value)  # refuses an unknown one
            parts = (rehearsal.part(topology.value),)
            folder = out.value or "runs/rehearsal"
            ok = command.run_suite(folder, minutes.value, parts, rehearsal.__name__)
        else:
            ok = command.run_suite(out.value or "runs/suite", minutes.value)
        if not ok:
            sys.exit(1)

    return suite


def _define_kernels(flags: Flags, repeats: FlagHolder, out: FlagHolder) -> Callable[[], None]:
    """Define the flags of `bench kernels`; return the function that runs it."""
    from flowhn_jax.bench import cases
    from kernels import backends
    from kernels.operations import OPERATIONS

    names = sorted({backends.XLA, *(name for op in OPERATIONS.values() for name in op.backends)})
    with flags.group("kernels"):
        operations = flags.choices(
            "operation", cases.OPERATION_NAMES, "operation to measure; default: all."
        )
        sizes = flags.choices("size", cases.SIZES, "shapes; default: all, on a CPU small and 135m.")
        only_backends = flags.choices(
            "backend", names, "backend to measure; default: all that the platform has."
        )
        lengths = flags.integers(
            "length",
            [],
            "sequence length; default: 1024, 2048, 8192 and 32768, on a CPU 1024.",
            minimum=1,
            maximum=_MAX_TOKENS,
        )
        tokens = flags.integer(
            "tokens",
            None,
            "tokens per batch; default: 32768, on a CPU 1024.",
            minimum=1,
            maximum=_MAX_TOKENS,
        )
        dtype = flags.choice(
            "dtype", None, ["float32", "bfloat16"], "default: bfloat16, on a CPU float32."
        )
        peers = flags.boolean("peers", False, "measure installed peer libraries as well.")

    def kernels() -> None:
        if peers.value:  # leave them their share of a GPU's memory
            os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
        import jax

        from flowhn_jax.bench.kernel_times import bench_kernels

        is_cpu = jax.default_backend() == "cpu"
        bench_kernels(
            operations.value or cases.OPERATION_NAMES,
            sizes.value or (("small", "135m") if is_cpu else cases.SIZES),
            lengths.value or ((1024,) if is_cpu else (1024, 2048, 8192, 32768)),
            only_backends.value,
            tokens=tokens.value or (1024 if is_cpu else 32768),
            dtype=dtype.value or ("float32" if is_cpu else "bfloat16"),
            repeats=repeats.value,
            with_peers=peers.value,
            out=out.value or "bench_kernels.json",
        )

    return kernels


def run(argv: Sequence[str] | None = None) -> None:
    """Parse the flags and run the subcommand."""
    cpu.prepare_memory()
    with runner.command("bench", define, argv) as main:
        main()
