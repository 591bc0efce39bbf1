"""What the command lines share: the config flag, and a user's error as one clear message."""

import difflib
import math
import os
import pathlib
import sys
import traceback
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
from typing import Any

import jax
import ml_collections
from absl import app, flags, logging
from ml_collections import config_flags

from flowhn_jax import config as config_lib
from flowhn_jax.checkpoints import free_space as disk
from flowhn_jax.parallel import compilation, distributed
from flowhn_jax.utils.memory import keep_freed_memory
from flowhn_jax.utils.sources import ROOT
from flowhn_jax.utils.text import one_line, short_repr

_PREFIX = "--config."
_MAX_INT = 2**32 - 1  # of a flag's integer, either way
_OF_A_USER = (MemoryError, ValueError, OSError, ImportError)  # errors; others are faults of ours


def define_config(required: bool = True) -> flags.FlagHolder:
    """Defines --config=FILE.py[:STRATEGY] and --config.KEY=VALUE for each of its keys."""
    keys = ", ".join(f"{key}={value}" for key, value in _keys(config_lib.default()).items())
    holder = config_flags.DEFINE_config_file(
        "config",
        None,
        "Recipe, such as configs/flowhn_tiny.py:fai_split. --config.KEY=VALUE sets one of its "
        f"keys, of which these are the defaults without a recipe: {keys}.",
    )
    if required:
        flags.mark_flag_as_required("config")
    return holder


def define_processes() -> Callable[[], None]:
    """Defines the flags of a run of several processes; what it returns joins them."""
    coordinator = flags.DEFINE_string(
        "coordinator_address", None, "Several processes: host:port of process 0."
    )
    processes = flags.DEFINE_integer("num_processes", None, "Several processes: their number.")
    process = flags.DEFINE_integer("process_id", None, "Several processes: this one's, from 0.")

    def join() -> None:
        from flowhn_jax.parallel import distributed

        distributed.initialize(coordinator.value, processes.value, process.value)

    return join


def parse_config(holder: flags.FlagHolder) -> config_lib.Config:
    """The validated config of the flag that `define_config` made.

    Raises:
      ValueError: the file cannot be found, or holds what `config.parse` refuses.
    """
    config = holder.value
    if not isinstance(config, ml_collections.ConfigDict):
        try:
            config.model  # noqa: B018  the flag of a missing file raises why when it is used
        except Exception as error:
            raise ValueError(_cannot_load(error.__cause__ or error)) from error
    return config_lib.parse(config)


def _cannot_load(reason: BaseException) -> str:
    return (
        f"--config cannot be loaded: {type(reason).__name__}: {reason}; accepted is a recipe such "
        "as configs/flowhn_tiny.py, or configs/flowhn_tiny.py:fai_split."
    )


def _without_traceback(error: BaseException) -> str:
    """The message; for a recipe's error, which ml_collections puts in with its traceback, why."""
    if "Traceback" not in str(error):
        return str(error)
    while error.__context__ is not None:
        error = error.__context__
    return _cannot_load(error)


def _keys(config: ml_collections.ConfigDict, prefix: str = "") -> dict[str, Any]:
    """Return all dotted keys of a config, and their values."""
    found = {}
    for name, value in config.items():
        nested = isinstance(value, ml_collections.ConfigDict)
        found |= _keys(value, f"{prefix}{name}.") if nested else {prefix + name: value}
    return found


def _check_config_keys(argv: Sequence[str]) -> None:
    known = list(_keys(config_lib.default()))
    groups = {name.rpartition(".")[0] for name in known}
    for argument in argv:
        key = argument.removeprefix(_PREFIX).partition("=")[0]
        if argument.startswith(_PREFIX) and key not in known and key not in groups:
            near = difflib.get_close_matches(key, known, n=1, cutoff=0.0)[0]
            raise ValueError(f"Unknown config key {short_repr(key)}; the nearest is {near!r}.")


def _check_recipe(argv: Sequence[str]) -> None:
    """Raise ValueError where there is no recipe, a folder, or a pipe that would never end."""
    for argument, following in zip(argv, [*argv[1:], ""], strict=False):
        name, equals, value = argument.partition("=")
        value = value if equals else following
        path = pathlib.Path(value.partition(":")[0])
        if name in ("--config", "-config") and value and path.exists() and not path.is_file():
            raise ValueError(f"--config is {short_repr(value)}, which is no file.")
        if name in ("--config", "-config") and value and not path.exists():
            found = sorted(path.name for path in (ROOT / "configs").glob("[a-z]*_*.py"))
            raise ValueError(
                f"--config must be the file of a recipe; there is no {short_repr(str(path))}. "
                f"Recipes in configs/: {', '.join(found)}."
            )


def _check_numbers() -> None:
    """Raises ValueError where a flag's number is not one that any size, count or share can be."""
    own = (name for name in flags.FLAGS if not name.startswith("config."))  # checks its own
    for name in own:
        value = flags.FLAGS[name].value
        for number in value if isinstance(value, list) else [value]:
            if isinstance(number, float) and not math.isfinite(number):
                raise ValueError(f"--{name} is {number}; accepted is a finite number.")
            if isinstance(number, int) and abs(number) > _MAX_INT:
                raise ValueError(
                    f"--{name} is {short_repr(number)}; accepted is at most {_MAX_INT}."
                )


def _parse_flags(
    argv: Sequence[str], commands: Collection[str] = (), most: Mapping[str, int] | None = None
) -> list[str]:
    try:
        _check_config_keys(argv[1:])
        _check_recipe(argv[1:])
        rest = flags.FLAGS(argv)
        _check_numbers()
        if commands and (len(rest) < 2 or rest[1] not in commands):
            found = f"is {short_repr(rest[1])}" if len(rest) > 1 else "is missing"
            raise ValueError(f"The command {found}; accepted are {', '.join(commands)}.")
        expected = 2 + (most or {}).get(rest[1], 0) if commands else 1
        if len(rest) > expected:
            raise ValueError(
                f"Unexpected argument {short_repr(rest[-1])}; flags are written --name=value."
            )
    except (flags.Error, ValueError) as error:
        sys.exit(f"error: {one_line(_without_traceback(error))}")
    except Exception as error:  # whatever running the recipe raised
        sys.exit(f"error: {one_line(_cannot_load(error))}")
    return rest


def _is_clear(error: BaseException) -> bool:
    """Whether the message alone tells enough: our code wrote it, or the system, with the file."""
    if isinstance(error, OSError) and error.filename is not None:
        return True
    innermost = traceback.extract_tb(error.__traceback__)[-1].filename
    return ROOT in pathlib.Path(innermost).parents and "site-packages" not in innermost


def _message(error: Exception) -> str:
    """Return what to print of an error: one line, after its traceback where that may not do.

    Lines that were added as notes follow it.
    """
    if isinstance(error, MemoryError):
        return f"error: there is not enough memory for what is asked for: {one_line(error)}"
    if not isinstance(error, _OF_A_USER):
        return traceback.format_exc()
    before = "" if _is_clear(error) or disk.is_full(error) else traceback.format_exc()
    if isinstance(error, OSError) and error.filename is not None and error.strerror:
        error_line = one_line(f"{error.strerror}: {error.filename!r}")  # without its number
    else:
        error_line = one_line(error)
    notes = [note for note in getattr(error, "__notes__", ()) if "\n" not in note]  # JAX's are long
    return "\n".join([f"{before}error: {error_line}", *notes])


def run(
    main: Callable[[], None] | Mapping[str, Callable[..., None]],
    *,
    compiles_only: bool = False,
    arguments: Mapping[str, int] | None = None,
) -> None:
    """Parse the flags and run `main`, or the one of several that the first argument names.

    With `compiles_only` freed memory is not kept, for which XLA's compiler threads would queue.
    `arguments` has the commands that take more of them, by position, and how many at the most.

    A user's error ends the process with its message and status 1; an error from inside a library,
    where the message alone may not tell enough, with its traceback as well.
    """

    commands = main if isinstance(main, Mapping) else {}

    def guarded(argv: Sequence[str]) -> None:
        if not compiles_only:
            keep_freed_memory()
        logging.set_verbosity(logging.WARNING)  # libraries' progress; ours goes to stdout
        # Orbax, and asyncio for it, log what is raised as well, with all the stack.
        logging.get_absl_handler().addFilter(lambda record: "/orbax/" not in record.pathname)
        try:
            if commands:
                commands[argv[1]](*argv[2:])
            else:
                main()
        except Exception as error:
            message = _message(error)
            if distributed.is_one_of_several():
                if isinstance(error, jax.errors.JaxRuntimeError):  # as of a collective
                    message += "\nerror: perhaps another task died; its output may say why"
                distributed.end_all(message, error)
            if not isinstance(error, _OF_A_USER):
                raise
            sys.exit(message)
        except KeyboardInterrupt:
            sys.exit("interrupted")
        if compilation.is_compiling():  # nobody waits for it any more
            distributed.shutdown()
            sys.stdout.flush()
            os._exit(0)

    for module, defined in flags.FLAGS.flags_by_module_dict().items():
        if module.startswith("flowhn_jax."):  # so that --help shows them
            for flag in defined:
                flags.FLAGS.register_key_flag_for_module(sys.argv[0], flag)
    app.run(guarded, flags_parser=partial(_parse_flags, commands=commands, most=arguments))
