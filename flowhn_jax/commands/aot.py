"""`python -m flowhn_jax.aot --config=... --topology=v5e:4x4`: compile a train step for a pod."""

import json
import os
import sys

from absl import flags

from flowhn_jax.commands import flags as cli

_CONFIG = cli.define_config()
_TOPOLOGY = flags.DEFINE_string(
    "topology", None, "Machine, such as v5e:4x4 or gpu:h100x8.", required=True
)
_SLICES = flags.DEFINE_integer("num_slices", 1, "Slices of TPUs that the network joins.")
_MFU = flags.DEFINE_float("mfu", 0.5, "MFU assumed of a step that sends nothing.", 0.01, 1.0)
_LARGEST = flags.DEFINE_bool(
    "largest_batch", False, "Find the most sequences a chip, of powers of two, that fit."
)
_PLAN = flags.DEFINE_bool(
    "plan_only", False, "TPUs: end before machine code is made, in a quarter of the time or less."
)
_JSON = flags.DEFINE_bool("json", False, "Print one JSON object instead of a table.")


def main() -> None:
    """Prints what the step needs; the status is 1 where it does not fit."""
    os.environ["JAX_PLATFORMS"] = "cpu"  # nothing runs, here or there
    os.environ.setdefault("JAX_SKIP_CUDA_CONSTRAINTS_CHECK", "1")  # nor is CUDA installed
    from flowhn_jax.aot import step_report, topology

    config = cli.parse_config(_CONFIG)
    machine = topology.describe(_TOPOLOGY.value, _SLICES.value)
    make = step_report.largest_batch if _LARGEST.value else step_report.report
    found = make(config, machine, mfu=_MFU.value, plan_only=_PLAN.value)
    print(json.dumps(found.to_dict()) if _JSON.value else found)
    if not found.fits:
        sys.exit(1)


def run() -> None:
    """Parse the flags and run the command."""
    cli.run(main, compiles_only=True)
