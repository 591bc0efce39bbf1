"""The types of suite.json's values, as the page, the figures and the comparison read them.

The file may have been edited or damaged, so every value that they read is checked first.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

from flowhn_jax.utils.text import short_repr

_MAX_LABEL = 500  # characters of what labels a row or a bar
_MAX_NUMBER = 1e60  # no measurement is larger, and products of a few do not overflow


class _Kind(NamedTuple):
    """A kind of value and its description in messages."""

    description: str
    accepts: Callable[[Any], bool]


def _is_number(value: Any) -> bool:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return is_number and abs(value) < _MAX_NUMBER  # False for NaN


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and not any("\ud800" <= each <= "\udfff" for each in value)


_LABEL = _Kind(
    f"printable text of at most {_MAX_LABEL} characters",
    lambda value: isinstance(value, str) and value.isprintable() and len(value) <= _MAX_LABEL,
)
_TEXT = _Kind("text in UTF-8", _is_text)
_NUMBER = _Kind("a finite number", _is_number)
_BOOL = _Kind("true or false", lambda value: isinstance(value, bool))
_LIST = _Kind("a list", lambda value: isinstance(value, list))
_GROUP = _Kind("a group of values by name", lambda value: isinstance(value, dict))


class _OrNull(NamedTuple):
    """A kind of value that may be null instead."""

    kind: Any


_MAYBE = _OrNull(_NUMBER)
_TIMES = {"seconds": _NUMBER, "authors_seconds": _NUMBER, "ratio": _NUMBER}
_COST = {
    "name": _TEXT,  # a GPU's kernels have names of any length
    "source": _LABEL,
    "operation": _LABEL,
    **dict.fromkeys(("share", "seconds", "count"), _NUMBER),
}
_MEASUREMENT = {
    **dict.fromkeys(("operation", "size", "shape", "backend"), _LABEL),
    **dict.fromkeys(("forward_ms?", "forward_ratio?", "both_ms?", "both_ratio?"), _MAYBE),
    **dict.fromkeys(("temporary_mib?", "forward_error?", "both_error?"), _MAYBE),
    "failed?": _TEXT,
}
_OF_AUTHORS = {"strategy": _LABEL, "size": _LABEL, "authors_kernels": _LABEL}

# The description of the machine. Here and below a name with '?' is optional.
_MACHINE = {
    **dict.fromkeys(("device?", "platform?", "python?"), _LABEL),
    "devices?": _NUMBER,
    "packages?": {str: _LABEL},
}

_OF_ALL = {"key": _LABEL, "failed?": _TEXT, "unserved?": _TEXT, "partial?": _BOOL}
# The fields of each part's rows: for rows that have the outer name, the names that they need.
_WITH: dict[str, dict[str, dict[str, Any]]] = {
    "machine": {
        "device": {
            **dict.fromkeys(("device", "runtime", "host", "processor", "python"), _LABEL),
            **dict.fromkeys(("devices", "cores", "host_memory_bytes"), _NUMBER),
            "memory_bytes": _MAYBE,
            "driver": _OrNull(_LABEL),
            "packages": {str: _LABEL},
        },
        "bytes_per_second": {
            "dtype": _LABEL,
            **dict.fromkeys(
                ("bytes_per_second", "matmul_flops_per_second", "exps_per_second"), _NUMBER
            ),
        },
    },
    "accuracy": {
        "right": {
            **dict.fromkeys(("check", "backend", "dtype"), _LABEL),
            **dict.fromkeys(("error", "gradient_error"), _MAYBE),
            "worst_gradient": _OrNull(_LABEL),
            "tolerance": _NUMBER,
            "right": _BOOL,
        }
    },
    "compilation": {"compile_seconds": {"compile_seconds": _NUMBER}},
    "training": {
        "tokens_per_second": {
            **dict.fromkeys(("size", "model", "batch_limit", "kernels"), _LABEL),
            **dict.fromkeys(("parameters", "batch_size", "tokens_per_second"), _NUMBER),
            **dict.fromkeys(("step_seconds", "step_seconds_min", "step_seconds_max"), _NUMBER),
            **dict.fromkeys(("memory_bytes", "compile_seconds"), _NUMBER),
            "train_tflops_per_second_per_device": _NUMBER,
            "train_mfu": _MAYBE,
            "bound_seconds?": _MAYBE,
        }
    },
    "kernel_speed": {
        "measurements": {"measurements": [_MEASUREMENT]},
        "block": {"block": _TIMES} | _OF_AUTHORS,
        "train step": {"train step": _TIMES} | _OF_AUTHORS,
    },
    "step_costs": {"costs": {"costs": [_COST], "batch_size": _NUMBER, "seconds": _NUMBER}},
    "inference": {
        "prefill_tokens_per_second": {
            **dict.fromkeys(("size", "model"), _LABEL),
            "batch_size": _NUMBER,
            **dict.fromkeys(("prefill_tokens_per_second", "decode_tokens_per_second"), _MAYBE),
            **dict.fromkeys(("first_token_seconds", "decode_one_tokens_per_second"), _MAYBE),
            "decode_bandwidth_utilisation": _MAYBE,
        }
    },
    "tiles": {"seconds": {"seconds": {str: _NUMBER}, "shape": _LABEL, "default": _LABEL}},
    "learning": {"losses": {"losses": [_MAYBE]}},
    "rehearsal": {
        "seconds": {
            "seconds": _NUMBER,
            "memory_bytes": _NUMBER,
            "batch_size?": _NUMBER,
            "fits?": _BOOL,
            "kernels?": _LABEL,
        }
    },
}
_PART = {
    "planned": _OrNull([_LABEL]),
    "rows": _LIST,
    "postponed": [_LABEL],
    "failed": _OrNull(_TEXT),
    "seconds": _NUMBER,
}
_CONTENT = {
    "format": _NUMBER,
    "code": _LABEL,
    "machine": _OrNull(_MACHINE),
    "seconds": _NUMBER,
    "parts": {str: _PART},
}


def check_content(content: Any, version: int) -> None:
    """Raise ValueError if a value of a suite.json is missing or of the wrong kind."""
    _check(content, _CONTENT, "the top level")
    if content["format"] != version:
        raise ValueError(f"format must be {version}; got {short_repr(content['format'])}")
    for name, part in content["parts"].items():
        for row in part["rows"]:
            _check_row(name, row)


def _check_row(part: str, row: Any) -> None:
    """Raise ValueError if a field of a part's row is missing or of the wrong kind."""
    _check(row, _OF_ALL, f"a row of {part}")
    where = f"row {row['key']!r} of {part}"
    for name, fields in _WITH.get(part, {}).items():
        if name in row:
            _check(row, fields, where)


def _check(value: Any, kind: Any, where: str) -> None:
    """Raise ValueError if a value is not of a kind.

    `kind` is a `_Kind`, an `_OrNull`, [kind] for a list, {str: kind} for a group with any names, or
    a dict of kinds by name for a group that has these names and possibly others.
    """
    if isinstance(kind, _OrNull):
        if value is not None:
            _check(value, kind.kind, where)
        return
    own = _GROUP if isinstance(kind, dict) else _LIST if isinstance(kind, list) else kind
    if not own.accepts(value):
        raise ValueError(f"{where} must be {own.description}; got {short_repr(value)}")
    if isinstance(kind, list):
        for number, each in enumerate(value):
            _check(each, kind[0], f"item {number} of {where}")
    elif isinstance(kind, dict) and str in kind:
        for name, each in value.items():
            _check(name, _LABEL, f"a name in {where}")
            _check(each, kind[str], f"{name} of {where}")
    elif isinstance(kind, dict):
        for field, of_field in kind.items():
            name = field.removesuffix("?")
            if name in value:
                _check(value[name], of_field, f"{name} of {where}")
            elif name == field:
                raise ValueError(f"{where} must have {name}")
