"""The token that begins a text: the choices a user has, and their errors."""

from flowhn_jax.data.tokenizer_config import SETTINGS
from flowhn_jax.utils.text import short_repr

FIRST_TOKENS = ("auto", "bos", "eot", "none")  # 'auto': the tokenizer's own rule


def check_first_token(first_token: str) -> None:
    """Raise ValueError if `first_token` is not one of `FIRST_TOKENS`."""
    if first_token not in FIRST_TOKENS:
        raise ValueError(
            f"first_token must be one of {', '.join(FIRST_TOKENS)}; got {short_repr(first_token)}."
        )


def missing_bos_error(spec: str) -> ValueError:
    """Return the error for a tokenizer that is asked for a BOS token and has none."""
    return ValueError(
        f"Tokenizer {spec} has no beginning-of-text token: its post_processor adds none, and "
        f"{SETTINGS} has no usable bos_token; type --first_token=eot"
    )
