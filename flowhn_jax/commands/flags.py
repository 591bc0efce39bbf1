"""The flags of a command, --config and its keys included: definition, parsing and checks.

Each command has its own `Flags`, so that all commands can be defined in one process.
"""

import contextlib
import difflib
import math
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import absl.flags
from absl.flags import FlagHolder

from flowhn_jax.storage import check_scheme, is_remote
from flowhn_jax.utils.checks import require
from flowhn_jax.utils.text import one_line, short_path, short_repr

if TYPE_CHECKING:
    from flowhn_jax.config import Config

_PREFIX = "--config."
_CONFIG_FLAGS = ("--config", "-config")
_MAX_INT = 2**32 - 1  # largest absolute value of an integer flag
# What a value must be, by the words with which absl rejects it.
_REASONS = {
    "invalid literal for int()": "an integer",
    "could not convert string to float": "a number",
    "('Non-boolean argument": "true or false",
    "value should be one of": "one of {}",
}
_IS_REQUIRED = "must have a value other than None"  # absl's message of a required flag


class Flags:
    """The flags of one command.

    Attributes:
      values: absl's container of the flags.
      headings: headings in the help, by the names of flags; flags without one are listed first.
      takes_config: whether the command has --config.
      default_recipe: returns, for the arguments of a command line without --config, the recipe to
        load, as PATH:ARGUMENT, or None for none.
      paths: the flags that name a file or a folder, each with its schemes besides gs://.
    """

    def __init__(self):
        self.values = absl.flags.FlagValues()
        self.headings: dict[str, str] = {}
        self.takes_config = False
        self.default_recipe: Callable[[Sequence[str]], str | None] = lambda arguments: None
        self.paths: dict[str, tuple[str, ...]] = {}

    @contextlib.contextmanager
    def group(self, heading: str) -> Iterator[None]:
        """List the flags that are defined within the context under `heading` in the help."""
        before = set(self.values)
        yield
        self.headings |= dict.fromkeys(set(self.values) - before, heading)

    def string(
        self, name: str, default: str | None, meaning: str, *, required: bool = False
    ) -> FlagHolder:
        """Define a flag that takes any text; return its holder."""
        define = absl.flags.DEFINE_string
        return define(name, default, meaning, required=required, flag_values=self.values)

    def path(
        self,
        name: str,
        meaning: str,
        *,
        required: bool = False,
        others: tuple[str, ...] = (),
    ) -> FlagHolder:
        """Define a flag that names a file or a folder, here or in a bucket.

        Args:
          name: the name of the flag.
          meaning: its description.
          required: whether it must be given.
          others: schemes of URLs besides gs:// that it may be.
        """
        self.paths[name] = others
        return self.string(name, None, meaning, required=required)

    def strings(self, name: str, default: list[str] | None, meaning: str) -> FlagHolder:
        """Define a flag that takes any text and may be repeated."""
        return absl.flags.DEFINE_multi_string(name, default, meaning, flag_values=self.values)

    def listing(
        self, name: str, default: list[str] | None, meaning: str, *, required: bool = False
    ) -> FlagHolder:
        """Define a flag that takes texts separated by commas."""
        define = absl.flags.DEFINE_list
        return define(name, default, meaning, required=required, flag_values=self.values)

    def integer(
        self, name: str, default: int | None, meaning: str, *, minimum=None, maximum=None
    ) -> FlagHolder:
        """Define a flag that takes an integer from `minimum` to `maximum`."""
        define = absl.flags.DEFINE_integer
        return define(name, default, meaning, minimum, maximum, flag_values=self.values)

    def integers(
        self, name: str, default: list[int], meaning: str, *, minimum=None, maximum=None
    ) -> FlagHolder:
        """Define a flag that takes an integer and may be repeated."""
        define = absl.flags.DEFINE_multi_integer
        return define(name, default, meaning, minimum, maximum, flag_values=self.values)

    def number(
        self, name: str, default: float | None, meaning: str, *, minimum=None, maximum=None
    ) -> FlagHolder:
        """Define a flag that takes a number from `minimum` to `maximum`."""
        define = absl.flags.DEFINE_float
        return define(name, default, meaning, minimum, maximum, flag_values=self.values)

    def boolean(self, name: str, default: bool | None, meaning: str) -> FlagHolder:
        """Define a flag that takes true or false, or nothing for true."""
        return absl.flags.DEFINE_bool(name, default, meaning, flag_values=self.values)

    def choice(
        self,
        name: str,
        default: str | None,
        values: Sequence[str],
        meaning: str,
        *,
        required: bool = False,
    ) -> FlagHolder:
        """Define a flag that takes one of `values`."""
        define = absl.flags.DEFINE_enum
        return define(name, default, values, meaning, required=required, flag_values=self.values)

    def choices(self, name: str, values: Sequence[str], meaning: str) -> FlagHolder:
        """Define a flag that takes one of `values` and may be repeated; its default is none."""
        return absl.flags.DEFINE_multi_enum(name, [], values, meaning, flag_values=self.values)

    def is_required(self, name: str) -> bool:
        """Return whether a flag must be given."""
        return any(_IS_REQUIRED in each.message for each in self.values[name].validators)

    def parse(self, argv: Sequence[str]) -> list[str]:
        """Parse the arguments and return those that are not flags.

        Args:
          argv: the arguments, the program's name first.

        Raises:
          ValueError: a flag is unknown, missing or invalid; the message names it, what it must be
            and what was found.
        """
        # Libraries read absl's global flags, which must be parsed: all keep their defaults.
        absl.flags.FLAGS(argv[:1])
        if self.takes_config:
            recipe = None if _has_config(argv[1:]) else self.default_recipe(argv[1:])
            if recipe is not None:
                argv = [argv[0], f"--config={recipe}", *argv[1:]]
            _check_config_keys(argv[1:])
            argv = argv if recipe is not None else _with_recipes_found(argv)
        try:
            rest = self.values(argv)
        except absl.flags.UnrecognizedFlagError as error:
            raise ValueError(self._unknown(error.flagname)) from error
        except absl.flags.Error as error:
            raise ValueError(self._reworded(error)) from error
        except Exception as error:  # raised by the recipe, which is run here
            raise ValueError(_load_failure(error)) from error
        self._check_numbers()
        self._check_paths()
        return rest[1:]

    def config_keys(self) -> list[str]:
        """Return the config keys that were given as flags, such as 'model.split.period'."""
        return [name.removeprefix("config.") for name in self.values if name.startswith("config.")]

    def _unknown(self, name: str) -> str:
        """Return the message about a flag that does not exist."""
        keys = [f"config.{key}" for key in _config_keys()] if self.takes_config else []
        known = [each for each in self.values if not each.startswith("config.")] + keys
        same = [each for each in keys if each.rpartition(".")[2] == name]
        near = same or difflib.get_close_matches(name[:100], known, n=1, cutoff=0.6)
        hint = f"perhaps --{near[0]}" if near else "--help lists the flags"
        return f"unknown flag --{one_line(name[:100])}; {hint}."

    def _reworded(self, error: absl.flags.Error) -> str:
        """Return an error of absl in the form of this package's messages."""
        missing = [
            f"--{name}"
            for name in self.values
            if self.is_required(name) and self.values[name].value is None
        ]
        if missing and _IS_REQUIRED in str(error):
            first = self.values[missing[0].removeprefix("--")].help
            return f"{' and '.join(missing)} must be given; {missing[0]} is: {first}"
        if "Traceback" in str(error):
            return _load_failure(error)
        name, _, refused = str(error).removeprefix("flag --").partition("=")
        for reason, must_be in _REASONS.items():
            value, found, allowed = refused.partition(f": {reason}")
            if found:
                allowed = allowed.strip(" <>").replace("|", ", ")
                return f"--{name} must be {must_be.format(allowed)}; got {short_repr(value)}."
        value, found, must_be = refused.partition(" is not ")  # out of range
        if found:
            return f"--{name} must be {must_be}; got {value.rpartition(': ')[2]}."
        return str(error)

    def _check_paths(self) -> None:
        """Raise ValueError if a path is a URL that its flag cannot be."""
        for name, others in self.paths.items():
            path = self.values[name].value
            if path is not None:
                require(path != "", f"--{name}", "a path", path)
                check_path(name, path, others)

    def _check_numbers(self) -> None:
        """Raise ValueError if a float is not finite or an integer exceeds `_MAX_INT`."""
        for name in self.values:
            if name == "config" or name.startswith("config."):  # config.parse checks these
                continue
            value = self.values[name].value
            for number in value if isinstance(value, list) else [value]:
                if isinstance(number, float) and not math.isfinite(number):
                    raise ValueError(f"--{name} must be a finite number; got {number}.")
                if isinstance(number, int) and abs(number) > _MAX_INT:
                    limit = f"at most {_MAX_INT}" if number > 0 else f"at least {-_MAX_INT}"
                    raise ValueError(f"--{name} must be {limit}; got {short_repr(number)}.")


def check_path(name: str, path: str, others: tuple[str, ...] = ()) -> None:
    """Raise ValueError if the path of a flag has a scheme besides gs:// and these."""
    try:
        check_scheme(path, others)
    except ValueError as error:
        raise ValueError(f"--{name}: {error}") from error


def check_local(name: str, path: str) -> None:
    """Raise ValueError if the path of a flag is not local."""
    check_path(name, path)
    if is_remote(path):
        raise ValueError(f"--{name} must be a local path; got {short_path(path)}.")


def define_config(flags: Flags) -> "Callable[[], Config]":
    """Define --config=RECIPE[:ARGUMENT], required, and --config.KEY=VALUE for each of its keys.

    Returns:
      A function that returns the validated config once the flags are parsed. It raises ValueError
      if the config is not valid.
    """
    from flowhn_jax import config as config_lib

    holder = define_recipe(flags, required=True)
    return lambda: config_lib.parse(load_recipe(holder))


def define_optional_config(flags: Flags) -> "Callable[[], Config | None]":
    """Define the flags of `define_config`; without --config the function returns None."""
    from flowhn_jax import config as config_lib

    holder = define_recipe(flags)
    return lambda: None if holder.value is None else config_lib.parse(load_recipe(holder))


def define_recipe(flags: Flags, *, required: bool = False, more: str = "") -> FlagHolder:
    """Define --config and its keys.

    Args:
      flags: receives the definitions.
      required: whether --config must be given.
      more: added to its description.
    """
    from ml_collections import config_flags

    flags.takes_config = True
    holder = config_flags.DEFINE_config_file(
        "config",
        None,
        "recipe: a name such as flowhn_135m or a file such as configs/flowhn_135m.py, with the "
        f"strategy or the baseline after a colon: flowhn_135m:fai_split.{more}",
        flag_values=flags.values,
    )
    if required:
        absl.flags.mark_flag_as_required("config", flag_values=flags.values)
    return holder


def load_recipe(holder: FlagHolder) -> Any:
    """Return the ConfigDict of --config.

    Raises:
      ValueError: running the recipe raised an error.
    """
    config = holder.value
    try:
        config.model  # noqa: B018  raises if the recipe failed
    except Exception as error:
        raise ValueError(_load_failure(error.__cause__ or error)) from error
    return config


def define_ema(flags: Flags) -> FlagHolder:
    """Define --ema and return its holder."""
    meaning = "use the average of the parameters (train.ema); default: the parameters."
    return flags.boolean("ema", False, meaning)


def define_processes(flags: Flags) -> Callable[[], None]:
    """Define the flags of a run of several processes; return a function that joins the run."""
    with flags.group("several processes (Cloud TPU and SLURM set these by themselves)"):
        coordinator = flags.string(
            "coordinator_address", None, "address of process 0, as HOST:PORT."
        )
        processes = flags.integer("num_processes", None, "number of processes.")
        process = flags.integer("process_id", None, "index of this process, from 0.")

    def join() -> None:
        from flowhn_jax.parallel import distributed

        distributed.initialize(coordinator.value, processes.value, process.value)

    return join


def _load_failure(error: BaseException) -> str:
    """Return the message about a recipe that raises an error when it is run."""
    if "Traceback" in str(error):  # ml_collections puts the recipe's traceback into its message
        while error.__context__ is not None:
            error = error.__context__
    elif isinstance(error, absl.flags.Error | ValueError):
        return str(error)
    return (
        f"--config must be a recipe, e.g. flowhn_tiny or configs/flowhn_tiny.py:fai_split; running "
        f"this one raised {type(error).__name__}: {error}"
    )


def _config_keys() -> list[str]:
    """Return the dotted keys of a config, without those of groups."""
    from flowhn_jax import config as config_lib

    return list(config_lib.flat(config_lib.default().to_dict()))


def _has_config(arguments: Sequence[str]) -> bool:
    return any(each.partition("=")[0] in _CONFIG_FLAGS for each in arguments)


def _check_config_keys(arguments: Sequence[str]) -> None:
    """Raise ValueError if a --config.KEY is neither a key nor a group, or precedes --config."""
    given = [each for each in arguments if each.startswith(_PREFIX)]
    if given:
        before = arguments[: arguments.index(given[0])]
        if not _has_config(before):
            raise ValueError(
                "--config must be given before its keys, e.g. --config=flowhn_tiny "
                f"{short_path(given[0])[1:-1]}."
            )
    known = _config_keys() if given else []
    groups = {name.rpartition(".")[0] for name in known}
    for argument in given:
        key = argument.removeprefix(_PREFIX).partition("=")[0]
        if key not in known and key not in groups:
            near = difflib.get_close_matches(key, known, n=1, cutoff=0.0)[0]
            raise ValueError(
                f"unknown config key {short_repr(key)}; the nearest is --config.{near}."
            )


def _with_recipes_found(argv: Sequence[str]) -> list[str]:
    """Return the arguments with the path of the recipe's file in place of its name.

    Raises:
      ValueError: there is no such recipe, or it is not a regular file (a pipe might never end).
    """
    from flowhn_jax import recipes

    def found(value: str) -> str:
        check_local("config", value)
        name, colon, argument = value.partition(":")
        return f"{recipes.find(name)}{colon}{argument}"

    result = list(argv)
    for i, argument in enumerate(argv):
        name, equals, value = argument.partition("=")
        if name in _CONFIG_FLAGS and value:
            result[i] = f"{name}{equals}{found(value)}"
        elif argument in _CONFIG_FLAGS and i + 1 < len(argv):
            result[i + 1] = found(argv[i + 1])
    return result
