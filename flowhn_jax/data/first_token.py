"""The values of --first_token, the token that begins a text, and errors about them."""

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
    """Return the error for 'bos' with a tokenizer that has no beginning-of-text token."""
    if spec == "bytes":
        return ValueError(
            "first_token must be auto, eot or none for the tokenizer 'bytes', which has no "
            "beginning-of-text token; got 'bos'. Type --first_token=eot"
        )
    return ValueError(
        f"Tokenizer {spec} has no beginning-of-text token: its post_processor adds none, and "
        f"{SETTINGS} has no usable bos_token; type --first_token=eot"
    )
