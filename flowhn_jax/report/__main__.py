"""`python -m flowhn_jax.report`: the command `flowhn report`."""

from flowhn_jax.commands import report

if __name__ == "__main__":
    report.run()
