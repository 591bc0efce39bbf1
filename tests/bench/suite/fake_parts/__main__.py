"""`python -m tests.bench.suite.fake_parts OUT MINUTES NAME=MODULE...`: a suite of fake parts."""

import sys

from flowhn_jax.bench.suite import document
from flowhn_jax.bench.suite.command import run_suite
from flowhn_jax.bench.suite.parts import Part
from tests.bench.suite import fake_parts


def main(out, minutes, *parts):
    named = [part.split("=") for part in parts]
    document.code_hash = lambda: fake_parts.CODE
    package = fake_parts.__name__
    run_suite(
        out,
        float(minutes),
        [Part(name, f"Part {name}", f"{package}.{module}", 1.0) for name, module in named],
        f"{package}.machine",
    )


if __name__ == "__main__":
    main(*sys.argv[1:])
