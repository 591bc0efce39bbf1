"""Checks of values that a user gave, with one form of message for all."""

from typing import Any

from flowhn_jax.utils.text import short_repr


def require(ok: bool, key: str, must_be: str, found: Any) -> None:
    """Raise ValueError that says what the value of `key` must be and what was found."""
    if not ok:
        raise ValueError(f"{key} must be {must_be}; got {short_repr(found)}.")


def require_positive(config: Any, prefix: str, *names: str) -> None:
    """Raise ValueError where one of the named attributes of `config` is not above 0."""
    for name in names:
        value = getattr(config, name)
        require(value > 0, f"{prefix}.{name}", "above 0", value)


def require_divisor(total: int, total_name: str, key: str, value: int) -> None:
    """Raise ValueError if `value`, that of `key`, does not divide `total`."""
    require(total % value == 0, key, f"a divisor of {total_name} ({total})", value)


def nearest_multiples(found: int, base: int) -> str:
    """Return the multiples of `base` on both sides of `found`, as text for a message."""
    below, above = found // base * base, (found // base + 1) * base
    return f"e.g. {below} or {above}" if below else f"e.g. {above}"
