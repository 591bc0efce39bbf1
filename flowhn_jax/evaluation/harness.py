"""Models of this package in EleutherAI's lm-evaluation-harness (`pip install lm-eval`).

from lm_eval import simple_evaluate
simple_evaluate(model=HarnessLM(scorer, tokenizer, generate), tasks=["piqa"])
"""

import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from flowhn_jax.data.tokenizer import Tokenizer, begin, prefix_id
from flowhn_jax.evaluation.chat import ChatTemplates
from flowhn_jax.evaluation.generate import Generation
from flowhn_jax.evaluation.harness_settings import GenerationSettings
from flowhn_jax.evaluation.scoring import Pair, Scorer, encode_pair
from flowhn_jax.utils.progress import progress

try:
    # lm-eval is optional, and not in every environment that is type-checked.
    from lm_eval.api.model import TemplateLM
    from lm_eval.utils import (
        get_rolling_token_windows,
        make_disjoint_window,
    )
except ImportError as error:
    raise ImportError(
        "flowhn_jax.evaluation.harness needs EleutherAI's harness: pip install lm-eval"
    ) from error

# `evaluation.generate.generate`, bound to a model.
Generate = Callable[..., list[Generation]]


class HarnessLM(TemplateLM):
    """A model with the harness's interface and the log-likelihoods of `evaluation.tasks`."""

    def __init__(self, scorer: Scorer, tokenizer: Tokenizer, generate: Generate, seed: int = 0):
        """Wrap one model.

        Args:
          scorer: the scorer of the model; its context is the longest text that the model reads.
          tokenizer: the model's tokenizer; its `first_token` begins every context.
          generate: `evaluation.generate.generate`, bound to the same model and tokenizer, and to a
            batch size.
          seed: seed of all sampling. All texts of a run have different random numbers, and running
            again gives the same texts.
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
        """The token from which a text's first token is predicted."""
        return prefix_id(self._tokenizer)

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **_: Any
    ) -> list[int]:
        """Return the ids of a text, without the token that begins it if `add_special_tokens=False`.

        Once a chat template is used, names of special tokens in a text stand for these tokens.
        """
        ids = self._tokenizer.encode(string, parse_special=self._is_chat).tolist()
        return ids if add_special_tokens is False else begin(self._tokenizer, ids)

    def loglikelihood(
        self, requests: Sequence[Any], disable_tqdm: bool = False
    ) -> list[tuple[float, bool]]:
        """Return (nats, whether greedy decoding gives it) for each (context, continuation)."""
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
        """Return what `loglikelihood` does, for (anything, context ids, continuation ids)."""
        pairs = [Pair(list(context), list(continuation)) for _, context, continuation in requests]
        with progress(len(pairs), "scoring", "pairs", enabled=not disable_tqdm) as bar:
            scores = self._scorer.score(pairs, bar.update)
        return [(score.log_likelihood, score.is_greedy) for score in scores]

    def loglikelihood_rolling(
        self, requests: Sequence[Any], disable_tqdm: bool = False
    ) -> list[float]:
        """Return the log-likelihood of each whole text, computed in the harness's own windows."""
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
        """Return the continuation of each context by its request's settings.

        As in the harness, a long context is truncated from the left to leave room for the new
        tokens. Requests with equal settings share batches.
        """
        context = self._scorer.context
        groups: dict[GenerationSettings, list[int]] = {}
        for index, request in enumerate(requests):
            settings = GenerationSettings.parse(request.args[1], context, self._tokenizer.eot_token)
            groups.setdefault(settings, []).append(index)
        texts = [""] * len(requests)
        total = sum(settings.max_new_tokens * len(each) for settings, each in groups.items())
        with progress(total, "generating", "tokens", enabled=not disable_tqdm) as bar:
            for settings, indices in groups.items():
                prompts = [self.tok_encode(requests[index].args[0]) for index in indices]
                found = self._continue(prompts, settings, bar.update)
                for index, each in zip(indices, found, strict=True):
                    texts[index] = each.text
        return texts

    def _continue(
        self,
        prompts: Sequence[list[int]],
        settings: GenerationSettings,
        on_progress: Callable[[int], None],
    ) -> list[Generation]:
        """Return the continuations of prompts with the same settings."""
        room = self._scorer.context - settings.max_new_tokens
        seed = np.random.SeedSequence((self._seed, self._batches)).generate_state(1)
        self._batches += 1
        return self._generate(
            [prompt[-room:] or [self.prefix_token_id] for prompt in prompts],
            max_new_tokens=settings.max_new_tokens,
            stop=settings.stop,
            sampling=settings.sampling,
            seed=int(seed[0]),
            on_progress=on_progress,
        )

    @property
    def tokenizer_name(self) -> str:
        """A name of the tokenizer for the harness's cache of requests."""
        return f"{self._tokenizer.fingerprint[:16]}-{self._tokenizer.first_token}"

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """Choose the chat template and return it.

        Args:
          chat_template: a name; True: the default template; False: none.

        Raises:
          ValueError: the tokenizer has no chat template, or none of that name.
        """
        if chat_template is False or chat_template is None:
            self._template = None
            return None
        return self._choose(chat_template if isinstance(chat_template, str) else None)[1]

    def _choose(self, name: str | None) -> tuple[ChatTemplates, str]:
        """Choose a template by name, or the default one; return all templates and that one."""
        self._templates = self._templates or ChatTemplates.read(self._tokenizer)
        self._template = self._templates.template(name)
        return self._templates, self._template

    def apply_chat_template(
        self, chat_history: Sequence[Mapping[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """Return a chat as text; from then on texts may contain names of special tokens.

        If the template refuses system messages, they are left out.

        Raises:
          ImportError: jinja2 is not installed.
          ValueError: the tokenizer has no chat template, or it fails on this chat.
        """
        if self._templates is None or self._template is None:
            templates, template = self._choose(None)
        else:
            templates, template = self._templates, self._template
        options = {"add_generation_prompt": add_generation_prompt}
        try:
            return templates.render(template, chat_history, **options)
        except ValueError as error:
            others = [message for message in chat_history if message["role"] != "system"]
            if len(others) == len(chat_history):
                raise
            print(f"warning: {error}; system messages are left out", file=sys.stderr)
            return templates.render(template, others, **options)

    @property
    def _is_chat(self) -> bool:
        """Whether texts come from a chat template."""
        return self._template is not None
