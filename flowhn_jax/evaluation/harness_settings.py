"""The generation settings (`gen_kwargs`) of EleutherAI's harness."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from flowhn_jax.evaluation.sampling import Sampling
from flowhn_jax.utils.text import short_repr

# The harness's names of one number, in its order of preference.
_NEW_TOKENS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
_DEFAULT_NEW_TOKENS = 256
_OTHERS = (
    "until",
    "do_sample",
    "temperature",
    "top_k",
    "top_p",
    "min_p",
    "repetition_penalty",
    "num_beams",
)


@dataclasses.dataclass(frozen=True)
class GenerationSettings:
    """How a request's text is generated; requests with equal settings share batches."""

    max_new_tokens: int
    stop: tuple[str, ...]
    sampling: Sampling

    @classmethod
    def parse(
        cls, settings: Mapping[str, Any], context: int, end: str | None = None
    ) -> "GenerationSettings":
        """Return a request's settings; a setting that would have no effect is refused.

        As in the harness, a text is sampled if `do_sample` is true, or absent with `temperature`
        above 0; otherwise it is greedy. The default temperature of sampling is 1. The default
        number of new tokens is 256, or half of the context if that is less.

        Args:
          settings: from a task or the harness's --gen_kwargs.
          context: number of tokens that the model reads.
          end: text of the end-of-text token; a text that spells it ends there, too.

        Raises:
          ValueError: a setting is unknown, or its value is not supported.
        """
        for name in settings:
            if name not in (*_NEW_TOKENS, *_OTHERS):
                raise ValueError(
                    "A generation setting must be one of "
                    f"{', '.join((*_NEW_TOKENS, *_OTHERS))}; got {short_repr(name)}."
                )
        beams = settings.get("num_beams")
        if beams not in (None, 1):
            raise ValueError(
                f"num_beams must be 1, as there is no beam search; got {short_repr(beams)}."
            )
        stop = _stop(settings.get("until"))
        if end is not None and end not in stop:
            stop = (*stop, end)
        return cls(_new_tokens(settings, context), stop, _sampling(settings))


def _new_tokens(settings: Mapping[str, Any], context: int) -> int:
    given = {name: settings[name] for name in _NEW_TOKENS if settings.get(name) is not None}
    if not given:
        return max(1, min(_DEFAULT_NEW_TOKENS, context // 2))
    name, count = next(iter(given.items()))
    if len(set(given.values())) > 1:
        raise ValueError(
            f"{' and '.join(given)} mean the same and must be equal; got "
            f"{', '.join(map(short_repr, given.values()))}."
        )
    count = _number(name, count)
    if not count.is_integer() or not 1 <= count < context:
        raise ValueError(
            f"{name} must be 1 to {context - 1}, less than the context of {context} tokens; got "
            f"{short_repr(settings[name])}."
        )
    return int(count)


def _stop(until: Any) -> tuple[str, ...]:
    until = [] if until is None else [until] if isinstance(until, str) else until
    if not isinstance(until, list | tuple) or not all(isinstance(each, str) for each in until):
        raise ValueError(f"until must be a text or a list of texts; got {short_repr(until)}.")
    return tuple(each for each in until if each)  # the harness ignores an empty one


def _sampling(settings: Mapping[str, Any]) -> Sampling:
    do_sample = settings.get("do_sample")
    if not isinstance(do_sample, bool | None):
        raise ValueError(f"do_sample must be true or false; got {short_repr(do_sample)}.")
    given = {
        name: _number(name, settings[name])
        for name in ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")
        if settings.get(name) is not None
    }
    temperature = given.setdefault("temperature", 1.0 if do_sample else 0.0)
    if do_sample and temperature == 0:
        raise ValueError("temperature must be above 0 where do_sample is true; got 0.")
    if do_sample is False:
        given["temperature"] = 0.0
    top_k = given.pop("top_k", 0.0)
    if not top_k.is_integer():
        raise ValueError(f"top_k must be an integer; got {short_repr(settings['top_k'])}.")
    return Sampling(**given, top_k=int(top_k) or None)  # 0 keeps all tokens in transformers


def _number(name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"{name} must be a number; got {short_repr(value)}.")
    return float(value)
