"""Lists of names in a flag, such as --tasks=piqa,boolq."""

from collections.abc import Sequence

from flowhn_jax.utils.text import short_repr


def parse_name_list(
    flag: str, value: str, known: Sequence[str], every: str = ""
) -> tuple[str, ...]:
    """Return the names in a list separated by commas.

    Args:
      flag: name of the flag, for messages.
      value: the list.
      known: the valid names.
      every: a value that stands for all known names; '': there is none.

    Raises:
      ValueError: a name is unknown or given twice.
    """
    if every and value == every:
        return tuple(known)
    names = tuple(name.strip() for name in value.split(","))
    for name in names:
        if name not in known:
            alternative = f"{every} or " if every else ""
            raise ValueError(
                f"--{flag} must be {alternative}names from {', '.join(known)}, separated by "
                f"commas; got {short_repr(name)}."
            )
    if len(set(names)) < len(names):
        raise ValueError(f"--{flag} must have each name once; got {short_repr(value)}.")
    return names
