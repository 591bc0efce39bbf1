"""`flowhn report WORKDIR...`: one page about one or several runs."""

from collections.abc import Callable, Sequence

from flowhn_jax.commands import runner
from flowhn_jax.commands.flags import Flags


def define(flags: Flags) -> Callable[..., None]:
    """Define the flags; return the function that writes the page of its arguments, the workdirs."""
    out = flags.path("out", "HTML file to write; it needs nothing outside of it.", required=True)

    def main(*workdirs: str) -> None:
        if not workdirs:
            raise ValueError(
                "the folder of a run must be given, e.g. flowhn report runs/tiny --out=report.html."
            )
        import jax

        from flowhn_jax.run_report.page import write

        jax.config.update("jax_platforms", "cpu")  # an accelerator may be in use by these runs
        write(workdirs, out.value)
        print(f"wrote {out.value}")

    return main


def run(argv: Sequence[str] | None = None) -> None:
    """Parse the flags and write the page."""
    with runner.command("report", define, argv) as main:
        main()
