"""Our models in EleutherAI's lm-evaluation-harness (`pip install lm-eval`).

from lm_eval import simple_evaluate
simple_evaluate(model=HarnessLM(scorer, tokenizer, generate), tasks=["piqa"])
"""

import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import tqdm

from flowhn_jax.data.tokenizer import Tokenizer, begin, prefix_id
from flowhn_jax.evaluation.chat import ChatTemplates
from flowhn_jax.evaluation.generate import Generation
from flowhn_jax.evaluation.harness_settings import GenerationSettings
from flowhn_jax.evaluation.scoring import Pair, Scorer, encode_pair

try:
    from lm_eval.api.model import TemplateLM
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
except ImportError as error:
    raise ImportError(
        "evaluation.harness plugs into EleutherAI's harness, which is not installed: "
        "pip install lm-eval."
    ) from error

# Continues prompts, with generate's keyword arguments.
Generate = Callable[..., list[Generation]]


class HarnessLM(TemplateLM):
    """A model as the harness wants it: with the log-likelihoods of `evaluation.tasks`."""

    def __init__(self, scorer: Scorer, tokenizer: Tokenizer, generate: Generate, seed: int = 0):
        """Evaluate one model, by its scorer, its tokenizer and its `generate`.

        Args:
          scorer: whose context is the longest text that the model reads.
          tokenizer: the model's; its `first_token` begins every context.
          generate: `evaluation.generate.generate`, bound to the same model and tokenizer, and to a
            batch size.
          seed: of all sampling. Every text of a run has random numbers of its own, and the same run
            has the same texts.
        """
        super().__init__()
        self._scorer, self._tokenizer, self._generate = scorer, tokenizer, generate
        self._seed, self._batches = seed, 0
        self._templates: ChatTemplates | None = None
        self._template: str | None = None

    @property
    def eot_token_id(self) -> int:
        """The end-of-text token."""
        return self._tokenizer.eot_id

    @property
    def prefix_token_id(self) -> int:
        """The token that a text's first token is predicted from."""
        return prefix_id(self._tokenizer)

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **_: Any
    ) -> list[int]:
        """Return the ids of a text, without the token that begins it if `add_special_tokens=False`.

        In a text of a chat template the names of special tokens stand for these tokens.
        """
        ids = self._tokenizer.encode(string, parse_special=self._is_chat)
        return ids.tolist() if add_special_tokens is False else begin(self._tokenizer, ids)

    def loglikelihood(
        self, requests: Sequence[Any], disable_tqdm: bool = False
    ) -> list[tuple[float, bool]]:
        """Return (log-likelihood in nats, whether it is greedy) of each (context, continuation)."""
        keyed = []
        for number, request in enumerate(requests, 1):
            try:
                pair = encode_pair(self._tokenizer, *request.args, parse_special=self._is_chat)
            except ValueError as error:
                reason = str(error).rstrip(".")
                raise ValueError(f"Request {number}, {request.args!r:.200}: {reason}.") from error
            keyed.append((request.args, *pair))
        return self._loglikelihood_tokens(keyed, disable_tqdm=disable_tqdm)

    def _loglikelihood_tokens(
        self, requests: Sequence[Any], disable_tqdm: bool = False, **_: Any
    ) -> list[tuple[float, bool]]:
        """Return the same for ids: each request is (anything, context, continuation)."""
        pairs = [Pair(list(context), list(continuation)) for _, context, continuation in requests]
        with tqdm.tqdm(total=len(pairs), unit="pair", disable=disable_tqdm) as bar:
            scores = self._scorer.score(pairs, bar.update)
        return [(score.log_likelihood, score.is_greedy) for score in scores]

    def loglikelihood_rolling(
        self, requests: Sequence[Any], disable_tqdm: bool = False
    ) -> list[float]:
        """Return the log-likelihood of each whole text, in the harness's own windows."""
        windows, owners = [], []
        for owner, request in enumerate(requests):
            found = get_rolling_token_windows(
                token_list=self.tok_encode(request.args[0], add_special_tokens=False),
                prefix_token=self.prefix_token_id,
                max_seq_len=self._scorer.context,
                context_len=1,
            )
            windows += [(None, *make_disjoint_window(window)) for window in found]
            owners += [owner] * (len(windows) - len(owners))
        scores = self._loglikelihood_tokens(windows, disable_tqdm=disable_tqdm)
        totals = np.zeros(len(requests))
        np.add.at(totals, owners, [log_likelihood for log_likelihood, _ in scores])
        return totals.tolist()

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Return the continuation of each context, as its request's settings say.

        Of a long context the end is read that leaves room for the new tokens, as in the harness.
        Requests with equal settings go through the model in batches.
        """
        context = self._scorer.context
        groups: dict[GenerationSettings, list[int]] = {}
        for index, request in enumerate(requests):
            settings = GenerationSettings.parse(request.args[1], context, self._tokenizer.eot_token)
            groups.setdefault(settings, []).append(index)
        texts = [""] * len(requests)
        with tqdm.tqdm(total=len(requests), unit="text", disable=disable_tqdm) as bar:
            for settings, indices in groups.items():
                prompts = [self.tok_encode(requests[index].args[0]) for index in indices]
                found = self._continue(prompts, settings, bar)
                for index, each in zip(indices, found, strict=True):
                    texts[index] = each.text
        return texts

    def _continue(
        self, prompts: Sequence[list[int]], settings: GenerationSettings, bar: tqdm.tqdm
    ) -> list[Generation]:
        """Return the continuations of prompts, whose beginning `bar` shows."""
        left = self._scorer.context - settings.max_new_tokens
        begun: set[int] = set()

        def on_text(index: int, _: str) -> None:
            bar.update(index not in begun)
            begun.add(index)

        seed = np.random.SeedSequence((self._seed, self._batches)).generate_state(1)
        self._batches += 1
        found = self._generate(
            [prompt[-left:] or [self.prefix_token_id] for prompt in prompts],
            max_new_tokens=settings.max_new_tokens,
            stop=settings.stop,
            sampling=settings.sampling,
            seed=int(seed[0]),
            on_text=on_text,
        )
        bar.update(len(prompts) - len(begun))  # those without a text
        return found

    @property
    def tokenizer_name(self) -> str:
        """The tokenizer, for the harness's cache of requests."""
        return f"{self._tokenizer.fingerprint[:16]}-{self._tokenizer.first_token}"

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """Choose the template of a name, True: the default one; return it, None for False.

        Raises:
          ValueError: the tokenizer has none, or none of that name.
        """
        if chat_template is False or chat_template is None:
            self._template = None
            return None
        name = chat_template if isinstance(chat_template, str) else None
        self._templates = self._templates or ChatTemplates.read(self._tokenizer)
        self._template = self._templates.template(name)
        return self._template

    def apply_chat_template(
        self, chat_history: Sequence[Mapping[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """Return the text of a chat; from then on texts are read as a template's.

        A template that refuses the system's messages is given the others.

        Raises:
          ImportError: jinja2 is missing.
          ValueError: the tokenizer has no template, or it fails on this chat.
        """
        if self._template is None:
            self.chat_template(True)
        options = {"add_generation_prompt": add_generation_prompt}
        try:
            return self._templates.render(self._template, chat_history, **options)
        except ValueError as error:
            others = [message for message in chat_history if message["role"] != "system"]
            if len(others) == len(chat_history):
                raise
            print(f"warning: {error}; the system's messages are left out", file=sys.stderr)
            return self._templates.render(self._template, others, **options)

    @property
    def _is_chat(self) -> bool:
        """Whether texts are of a chat template."""
        return self._template is not None
