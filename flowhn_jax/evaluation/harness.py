"""Our models in EleutherAI's lm-evaluation-harness (`pip install lm-eval`).

from lm_eval import simple_evaluate
simple_evaluate(model=HarnessLM(scorer, tokenizer, generate), tasks=["piqa"])
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import tqdm

from flowhn_jax.data.tokenizer import Tokenizer
from flowhn_jax.evaluation.generate import Generation
from flowhn_jax.evaluation.sampling import Sampling
from flowhn_jax.evaluation.scoring import Pair, Scorer, encode_pair

try:
    from lm_eval.api.model import TemplateLM
except ImportError as error:
    raise ImportError(
        "evaluation.harness plugs into EleutherAI's harness, which is not installed: "
        "pip install lm-eval."
    ) from error

# Continues prompts, with generate's keyword arguments.
Generate = Callable[..., list[Generation]]


class HarnessLM(TemplateLM):
    """A model as the harness wants it: with the log-likelihoods of `evaluation.tasks`."""

    def __init__(self, scorer: Scorer, tokenizer: Tokenizer, generate: Generate):
        """`generate` is `evaluation.generate.generate`, bound to the same model and tokenizer."""
        super().__init__()
        self._scorer, self._tokenizer, self._generate = scorer, tokenizer, generate

    @property
    def eot_token_id(self) -> int:
        """The end-of-text token, with which every document begins."""
        return self._tokenizer.eot_id

    def tok_encode(self, string: str, **_: Any) -> list[int]:
        """Ids of a text, without the token that begins a document."""
        return list(map(int, self._tokenizer.encode(string)))

    def loglikelihood(
        self, requests: Sequence[Any], disable_tqdm: bool = False
    ) -> list[tuple[float, bool]]:
        """(log-likelihood in nats, whether it is greedy) of each (context, continuation)."""
        pairs = [encode_pair(self._tokenizer, *request.args) for request in requests]
        keyed = [(request.args, *pair) for request, pair in zip(requests, pairs, strict=True)]
        return self._loglikelihood_tokens(keyed, disable_tqdm=disable_tqdm)

    def _loglikelihood_tokens(
        self, requests: Sequence[Any], disable_tqdm: bool = False, **_: Any
    ) -> list[tuple[float, bool]]:
        """The same of ids: each request is (anything, context, continuation)."""
        pairs = [Pair(list(context), list(continuation)) for _, context, continuation in requests]
        with tqdm.tqdm(total=len(pairs), unit="pair", disable=disable_tqdm) as bar:
            scores = self._scorer.score(pairs, bar.update)
        return [(score.log_likelihood, score.is_greedy) for score in scores]

    def loglikelihood_rolling(
        self, requests: Sequence[Any], disable_tqdm: bool = False
    ) -> list[float]:
        """Log-likelihood of each whole text, in windows of the context, each token once."""
        context, totals = self._scorer.context, []
        for request in requests:
            ids = [self.eot_token_id, *self.tok_encode(request.args[0])]
            pairs = [
                Pair(ids[start : start + 1], ids[start + 1 : start + 1 + context])
                for start in range(0, len(ids) - 1, context)
            ]
            scores = self._scorer.score(pairs)
            totals.append(float(np.sum([score.log_likelihood for score in scores])))
        return totals

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """What is generated behind each context up to the stop strings that its request names.

        Of a long context the end is read that leaves room for the new tokens, half of the model's
        context at most.
        """
        texts = []
        for request in tqdm.tqdm(requests, unit="text", disable=disable_tqdm):
            prompt, settings = request.args
            until = settings.get("until") or []
            new_tokens = min(settings.get("max_gen_toks", 256), self._scorer.context // 2)
            left = self._scorer.context - new_tokens - 1  # behind the token that begins it
            ids = self.tok_encode(prompt)
            (found,) = self._generate(
                [prompt if len(ids) <= left else self._tokenizer.decode(ids[-left:])],
                max_new_tokens=new_tokens,
                stop=[until] if isinstance(until, str) else until,
                sampling=Sampling(temperature=settings.get("temperature", 0.0)),
            )
            texts.append(found.text)
        return texts
