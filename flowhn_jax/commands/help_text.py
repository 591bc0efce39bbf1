"""The help of a command: its flags under headings, and every config key with its meaning."""

import re
import shutil
import textwrap
from collections.abc import Iterable
from typing import NamedTuple

import absl.flags

from flowhn_jax.commands.flags import Flags
from flowhn_jax.commands.main import COMMANDS

_GENERAL = "flags"
# What absl adds to a help text: the values of an enum before it, a hint for lists after it.
_OF_ABSL = re.compile(r"^<[^>]*>: |;\s+repeat this option to specify a list of values$")
_TYPES = {"string": "TEXT", "int": "INTEGER", "float": "NUMBER"}


class Row(NamedTuple):
    """One flag or config key.

    Attributes:
      spelling: as it is typed, such as --seed=INTEGER.
      description: what it means.
      default: its default, "required", or "" where its absence means something of its own.
    """

    spelling: str
    description: str
    default: str


def flag_rows(flags: Flags) -> dict[str, list[Row]]:
    """Return a command's own flags by their headings, the general ones first."""
    names = [name for name in flags.values if not name.startswith("config.")]
    headings = [_GENERAL, *dict.fromkeys(flags.headings.values())]
    rows: dict[str, list[Row]] = {heading: [] for heading in headings}
    for name in names:
        flag = flags.values[name]
        if name == flag.name:  # absl lists a short name as a flag too
            rows[flags.headings.get(name, _GENERAL)].append(_row(flags, flag))
    for group in rows.values():  # required flags first
        group.sort(key=lambda row: row.default != "required")
    return {heading: group for heading, group in rows.items() if group}


def _row(flags: Flags, flag: absl.flags.Flag) -> Row:
    if flag.boolean:
        spelling = f"--[no]{flag.name}" if flag.default else f"--{flag.name}"
    elif flag.name == "config":
        spelling = "--config=RECIPE"
    elif isinstance(flag.parser, absl.flags.EnumParser):
        spelling = f"--{flag.name}={'|'.join(flag.parser.enum_values)}"
    else:
        spelling = f"--{flag.name}={_TYPES.get(flag.parser.flag_type(), 'TEXT')}"
    if flags.is_required(flag.name):
        default = "required"
    elif flag.default in (None, [], "") or flag.boolean:
        default = ""
    else:
        default = str(flag.default)
    description = _OF_ABSL.sub("", flag.help or "").replace("\n", " ").strip()
    if isinstance(flag, absl.flags.MultiFlag):
        description = description.rstrip(".") + "; may be given several times."
    return Row(spelling, description, default)


def config_rows() -> dict[str, list[Row]]:
    """Return the config keys by their groups, such as "model" and "model.split"."""
    from flowhn_jax import config as config_lib

    rows: dict[str, list[Row]] = {}
    for key, (kind, default, description) in config_lib.describe_keys().items():
        text = "None" if default is None else repr(default)
        row = Row(f"--config.{key}={kind}", description, text)
        rows.setdefault(key.rpartition(".")[0], []).append(row)
    return rows


def text(command: str, flags: Flags) -> str:
    """Return what `flowhn COMMAND --help` prints."""
    about = COMMANDS[command]
    sections = [
        f"{about.summary}\n\n  flowhn {command} {about.example}",
        *(_section(heading, rows) for heading, rows in flag_rows(flags).items()),
    ]
    if flags.takes_config:
        sections.append("Every config key can be set; the defaults are those without a recipe.")
        sections += [_section(f"config, {group}", rows) for group, rows in config_rows().items()]
    return "\n\n".join(sections)


def _section(heading: str, rows: Iterable[Row]) -> str:
    width = min(shutil.get_terminal_size((100, 24)).columns, 120)
    lines = [f"{heading}:"]
    for row in rows:
        note = {"": "", "required": " (required)"}.get(row.default, f" (default: {row.default})")
        described = textwrap.wrap(f"{row.description}{note}", width - 8)
        lines += [f"  {row.spelling}", *(f"      {line}" for line in described)]
    return "\n".join(lines)
