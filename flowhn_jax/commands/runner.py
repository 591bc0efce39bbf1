"""Running a command: its flags, its help, and an error of the user as one clear message."""

import contextlib
import functools
import inspect
import logging
import os
import pathlib
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence

import absl.logging

from flowhn_jax.checkpoints import free_space
from flowhn_jax.commands import help_text
from flowhn_jax.commands.flags import Flags
from flowhn_jax.utils.memory import is_out_of_memory
from flowhn_jax.utils.sources import ROOT
from flowhn_jax.utils.text import one_line, short_repr

# Errors that are the user's to solve; any other is a fault of this code and shows its traceback.
_OF_A_USER = (MemoryError, ValueError, OSError, ImportError)
_OUR_CODE = ("flowhn_jax", "kernels", "configs")
_HELP = ("--help", "-help", "-h", "--helpfull", "--helpshort")

Main = Callable[..., None] | Mapping[str, Callable[..., None]]


@contextlib.contextmanager
def command(
    name: str,
    define: Callable[[Flags], Main],
    argv: Sequence[str] | None = None,
    *,
    shows_tracebacks: bool = True,
    interrupted: str = "interrupted",
) -> Iterator[Callable[[], None]]:
    """Parse the flags of a command, and report the errors of the function that runs it.

    The context gives that function, with its arguments. A user's error ends the process with its
    message and status 1. An error that a library raises has its traceback as well, because its
    message alone may not be enough. --help prints the help and ends the process.

    Args:
      name: the name of the command in `main.COMMANDS`.
      define: defines the flags; returns what runs the command, with its arguments that are not
        flags, or by name what runs each of its subcommands, with the arguments after the name.
      argv: the arguments; None: those of the process.
      shows_tracebacks: whether to show the traceback of an error from inside a library. A command
        without JAX, whose own messages name the cause of all such errors, does not.
      interrupted: what Ctrl-C prints, if the interrupted work has no message of its own.
    """
    with replacing_arguments(argv):
        flags = Flags()
        main = define(flags)
        if any(argument in _HELP for argument in sys.argv[1:]):
            _print_help(help_text.text(name, flags))
            sys.exit()
        try:
            function = _parse(name, flags, main)
        except ValueError as error:
            sys.exit(f"error: {one_line(error)}")
        _set_up_logging()
        try:
            yield function
        except Exception as error:
            _end_all_processes(error)
            if not isinstance(error, _OF_A_USER) and not is_out_of_memory(error):
                raise
            sys.exit(_message(error, shows_tracebacks))
        except KeyboardInterrupt as error:
            sys.exit(str(error) or interrupted)
        _end_without_compilation()


@contextlib.contextmanager
def replacing_arguments(argv: Sequence[str] | None) -> Iterator[None]:
    """Make `argv` the arguments of the process, where ml_collections looks for keys.

    None leaves them unchanged.
    """
    before = sys.argv
    if argv is not None:
        sys.argv = [sys.argv[0], *argv]
    try:
        yield
    finally:
        sys.argv = before


def _print_help(text: str) -> None:
    """Print a text that a pager or `head` may not read to its end."""
    try:
        print(text, flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _parse(command: str, flags: Flags, main: Main) -> Callable[[], None]:
    """Parse the flags; return the function that runs the command, or the named subcommand.

    Raises:
      ValueError: a flag or an argument is unknown, missing or has a value that it cannot have.
    """
    arguments = flags.parse(sys.argv)
    if isinstance(main, Mapping):
        if not arguments or arguments[0] not in main:
            got = short_repr(arguments[0]) if arguments else "nothing"
            raise ValueError(
                f"the word after flowhn {command} must be one of {', '.join(main)}; got {got}."
            )
        function, expected = main[arguments[0]], 1
    else:
        function, expected = main, 0
    parameters = inspect.signature(function).parameters.values()
    takes_any = any(each.kind is inspect.Parameter.VAR_POSITIONAL for each in parameters)
    if len(arguments) > expected + len(parameters) and not takes_any:
        raise ValueError(
            f"unexpected argument {short_repr(arguments[-1])}; flags are written --name=value."
        )
    return functools.partial(function, *arguments[expected:])


class _WarningHandler(logging.Handler):
    """Prints "warning: ..." to standard error, above the progress bars if there are any."""

    def emit(self, record: logging.LogRecord) -> None:
        """Print a record."""
        text = f"{record.levelname.lower()}: {record.getMessage()}"
        bars = sys.modules.get("tqdm")
        if bars is None:
            print(text, file=sys.stderr, flush=True)
        else:
            bars.tqdm.write(text, file=sys.stderr)


def _is_for_absl(record: logging.LogRecord) -> bool:
    """Return whether absl's handler prints a record."""
    # Orbax, itself or by asyncio, also logs what it raises, with the whole stack.
    is_ours = record.name.partition(".")[0] in _OUR_CODE
    return not is_ours and "/orbax/" not in record.pathname


def _set_up_logging() -> None:
    """Print warnings of this package as plain lines, and quieten libraries' progress."""
    absl.logging.use_absl_handler()
    absl.logging.set_verbosity(absl.logging.WARNING)
    absl.logging.get_absl_handler().addFilter(_is_for_absl)
    for name in _OUR_CODE:
        logger = logging.getLogger(name)
        if not logger.handlers:
            logger.addHandler(_WarningHandler(logging.WARNING))


def _end_all_processes(error: Exception) -> None:
    """End the other processes of a run of several, with the error's message; else do nothing."""
    if "jax" not in sys.modules:
        return
    import jax

    from flowhn_jax.parallel import distributed

    if distributed.is_one_of_several():
        message = _message(error)
        if isinstance(error, jax.errors.JaxRuntimeError):  # as of a collective
            message += "\nerror: perhaps another task died; its output may say why"
        distributed.end_all(message, error)


def _end_without_compilation() -> None:
    """End the process at once if a compilation that nobody needs any more is still running."""
    compilation = sys.modules.get("flowhn_jax.parallel.compilation")
    if compilation is not None and compilation.is_compiling():
        from flowhn_jax.parallel import distributed

        distributed.shutdown()
        sys.stdout.flush()
        os._exit(0)


def _message(error: Exception, shows_tracebacks: bool = True) -> str:
    """Return what to print of an error: one line, after the traceback if it may not be enough.

    Lines that were added as notes follow it.
    """
    if isinstance(error, MemoryError):
        return f"error: there is not enough memory for this: {one_line(error)}"
    if is_out_of_memory(error):
        first = one_line(str(error).partition("\n")[0]).rstrip(".")
        return (
            f"error: the device has too little memory: {first}. Lower train.batch_size, raise "
            "train.accumulate, or set --config.train.remat=full."
        )
    if not isinstance(error, _OF_A_USER):
        return traceback.format_exc()
    is_enough = not shows_tracebacks or _is_clear(error) or free_space.is_full(error)
    stack = "" if is_enough else traceback.format_exc()
    if isinstance(error, OSError) and error.filename is not None and error.strerror:
        error_line = one_line(f"{error.strerror}: {error.filename!r}")  # without its number
    else:
        error_line = one_line(error)
    notes = [note for note in getattr(error, "__notes__", ()) if "\n" not in note]  # JAX's are long
    return "\n".join([f"{stack}error: {error_line}", *notes])


def _is_clear(error: BaseException) -> bool:
    """Return whether the message alone is enough: this code wrote it, or the system did."""
    if isinstance(error, OSError) and error.filename is not None:
        return True
    innermost = pathlib.Path(traceback.extract_tb(error.__traceback__)[-1].filename)
    return any(ROOT / name in innermost.parents for name in _OUR_CODE)
