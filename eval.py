"""Measures a model: python eval.py --config=... --workdir=... --mode=perplexity|throughput."""

from absl import flags

from flowhn_jax import cli

_CONFIG = cli.define_config()
_join_processes = cli.define_processes()
_WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the trained run.")
_MODE = flags.DEFINE_enum("mode", None, ["perplexity", "throughput"], "What to do.", required=True)
_DATA = flags.DEFINE_string(
    "data", None, "perplexity: text file to score; the validation set without it."
)
_STRIDE = flags.DEFINE_integer(
    "stride", None, "perplexity of a text: tokens between windows; the context without it."
)
_REPEATS = flags.DEFINE_integer("repeats", 10, "throughput: timed repeats.", lower_bound=1)


def main() -> None:
    """Runs the mode by the flags and prints its table and its JSON line."""
    from flowhn_jax.evaluation import run

    _join_processes()
    run.evaluate(
        cli.parse_config(_CONFIG),
        _WORKDIR.value,
        _MODE.value,
        data=_DATA.value,
        stride=_STRIDE.value,
        repeats=_REPEATS.value,
    )


if __name__ == "__main__":
    cli.run(main)
