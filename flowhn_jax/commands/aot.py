"""`flowhn aot`: compile a train step for absent hardware, such as a TPU pod."""

import json
import os
import sys
from collections.abc import Callable, Sequence

from flowhn_jax.commands import runner
from flowhn_jax.commands.flags import Flags, define_config


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

    def main() -> None:
        os.environ["JAX_PLATFORMS"] = "cpu"  # nothing runs, here or there
        os.environ.setdefault("JAX_SKIP_CUDA_CONSTRAINTS_CHECK", "1")  # nor is CUDA installed
        from flowhn_jax.aot import step_report
        from flowhn_jax.aot import topology as topology_lib

        config = parse_config()
        machine = topology_lib.describe(topology.value, slices.value)
        make = step_report.largest_batch if largest_batch.value else step_report.report
        found = make(config, machine, mfu=mfu.value, plan_only=plan_only.value)
        print(json.dumps(found.to_dict()) if as_json.value else found)
        if not found.fits:
            sys.exit(1)

    return main


def run(argv: Sequence[str] | None = None) -> None:
    """Parse the flags and compile the step."""
    runner.run("aot", define, argv, keeps_memory=False)
