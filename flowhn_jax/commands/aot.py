"""`flowhn aot`: compile a train step for absent hardware, such as a TPU pod."""

import json
import os
import sys
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from flowhn_jax.commands import runner
from flowhn_jax.commands.flags import Flags, define_config
from flowhn_jax.storage import place
from flowhn_jax.utils.text import one_line, short_path, short_repr

if TYPE_CHECKING:
    from flowhn_jax.aot.topology import Topology
    from flowhn_jax.config import Config

_DIFF = "--diff must be a file that --roofline --out wrote"


def define(flags: Flags) -> Callable[[], None]:
    """Define the flags; return the function that prints what the step needs.

    The function exits with status 1 if the step does not fit into memory.
    """
    parse_config = define_config(flags)
    topology = flags.string(
        "topology", None, "the hardware, e.g. v5e:4x4 or gpu:h100x8.", required=True
    )
    slices = flags.integer("num_slices", 1, "TPU slices joined by the data-center network.")
    mfu = flags.number(
        "mfu", 0.5, "MFU assumed for a step without communication.", minimum=0.01, maximum=1.0
    )
    largest_batch = flags.boolean(
        "largest_batch", False, "find the largest batch per chip that fits, a power of two."
    )
    plan_only = flags.boolean(
        "plan_only",
        False,
        "TPUs: stop before machine code is generated, in a quarter of the time or less.",
    )
    as_json = flags.boolean("json", False, "print one JSON object instead of a table.")

    print_roofline = _define_roofline(flags)

    def main() -> None:
        os.environ["JAX_PLATFORMS"] = "cpu"  # programs are compiled, never run
        os.environ.setdefault("JAX_SKIP_CUDA_CONSTRAINTS_CHECK", "1")  # CUDA need not be installed
        from flowhn_jax.aot import step_report
        from flowhn_jax.aot import topology as topology_lib

        config = parse_config()
        describe = partial(topology_lib.describe, topology.value, slices.value)
        if print_roofline(config, describe, as_json=as_json.value):
            return
        machine = describe()
        make = step_report.largest_batch if largest_batch.value else step_report.report
        found = make(config, machine, mfu=mfu.value, plan_only=plan_only.value)
        print(json.dumps(found.to_dict()) if as_json.value else found)
        if not found.fits:
            sys.exit(1)

    return main


def _define_roofline(flags: Flags) -> Callable[..., bool]:
    """Define the flags of the roofline; return the function that prints it if it is asked for."""
    with flags.group("With --roofline"):
        roofline = flags.boolean(
            "roofline",
            False,
            "print the least time that the scheduled program can take, by part of the step, and "
            "its heaviest operations.",
        )
        options = flags.strings("xla", [], "XLA's compiler option NAME=VALUE.")
        out = flags.path("out", "JSON file to write.")
        before = flags.path(
            "diff",
            "an earlier --out, of another recipe or with another --xla, to compare with.",
        )
        plot = flags.path("plot", "picture to write: .png, .svg or .pdf.")

    def print_roofline(
        config: "Config", describe: "Callable[[], Topology]", *, as_json: bool
    ) -> bool:
        needs, refuses = ("xla", "out", "diff", "plot"), ("mfu", "largest_batch", "plan_only")
        for name in refuses if roofline.value else needs:
            if flags.values[name].present:
                must = "be left out with" if roofline.value else "be given with"
                raise ValueError(f"--{name} must {must} --roofline.")
        if not roofline.value:
            return False
        from flowhn_jax.aot.roofline import render
        from flowhn_jax.aot.roofline.step_bound import step_bound
        from flowhn_jax.bench.output import check_out, save_results

        chosen = _options(options.value)
        earlier = None if before.value is None else _read_step(before.value)
        if out.value is not None:
            check_out(out.value)
        found = step_bound(config, describe(), chosen).to_dict()
        if as_json:
            print(json.dumps(found if earlier is None else found | {"before": earlier}))
        else:
            print(render.text(found))
            if earlier is not None:
                print(f"\n{render.difference(earlier, found)}")
        if out.value is not None:
            save_results(out.value, found)
        if plot.value is not None:
            render.draw([found] if earlier is None else [earlier, found], plot.value)
        return True

    return print_roofline


def _options(given: Sequence[str]) -> dict[str, str]:
    """Return compiler options by name.

    Raises:
      ValueError: one has no '='.
    """
    for option in given:
        if not option.partition("=")[2]:
            raise ValueError(
                f"--xla must be NAME=VALUE, e.g. xla_tpu_scoped_vmem_limit_kib=65536; got "
                f"{short_repr(option)}."
            )
    return {name: value for name, _, value in (option.partition("=") for option in given)}


def _read_step(path: str) -> dict[str, Any]:
    """Return an earlier result of --roofline.

    Raises:
      ValueError: the file is not one.
    """
    try:
        step = json.loads(place(path).read())
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or one_line(error)
        raise ValueError(f"{_DIFF}; got {short_path(path)}: {reason}.") from error
    if not isinstance(step, dict) or "bound" not in step:
        raise ValueError(f"{_DIFF}; got {short_path(path)}, which is another file.")
    return step


def run(argv: Sequence[str] | None = None) -> None:
    """Parse the flags and compile the step."""
    with runner.command("aot", define, argv) as main:
        main()
