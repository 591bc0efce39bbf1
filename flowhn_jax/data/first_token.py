"""The values of --first_token, the token that begins a text."""

from flowhn_jax.utils.text import short_repr

FIRST_TOKENS = ("auto", "bos", "eot", "none")  # 'auto': the tokenizer's own rule


def check_first_token(first_token: str) -> None:
    """Raise ValueError if `first_token` is not one of `FIRST_TOKENS`."""
    if first_token not in FIRST_TOKENS:
        raise ValueError(
            f"first_token must be one of {', '.join(FIRST_TOKENS)}; got {short_repr(first_token)}."
        )
