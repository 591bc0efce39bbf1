"""Our models in EleutherAI's harness: its windows, settings, batches and chats; HFLM's numbers.

Without lm-eval, all tests but the last use stand-ins for the few names that `evaluation.harness`
imports from it.
"""

import importlib
import json
import sys
import types
from functools import partial

import jax
import numpy as np
import pytest
import tokenizers

from flowhn_jax import models
from flowhn_jax.config import MeshConfig
from flowhn_jax.data.tokenizer import load_tokenizer
from flowhn_jax.evaluation.generate import Generation, generate
from flowhn_jax.evaluation.sampling import Sampling
from flowhn_jax.evaluation.scoring import Pair, Score, Scorer
from flowhn_jax.parallel.mesh import make_mesh
from tests.small import small_baseline

BYTES = load_tokenizer("bytes")
MODULE = "flowhn_jax.evaluation.harness"


def _windows(token_list, prefix_token, max_seq_len, context_len):
    """lm_eval.utils.get_rolling_token_windows, for a context of one token."""
    for start in range(0, len(token_list), max_seq_len):
        end = min(start + max_seq_len, len(token_list))
        before = [prefix_token, *token_list]
        yield before[max(0, end - max_seq_len) : end], token_list[start:end]


@pytest.fixture(scope="module")
def harness():
    """Return the module under test, with stand-ins if lm-eval is not installed."""
    with pytest.MonkeyPatch.context() as patch:
        try:
            import lm_eval  # noqa: F401
        except ImportError:
            stand_ins = {
                "lm_eval": {},
                "lm_eval.api": {},
                "lm_eval.api.model": {"TemplateLM": object},
                "lm_eval.utils": {
                    "get_rolling_token_windows": _windows,
                    "make_disjoint_window": lambda pair: (
                        pair[0][: len(pair[0]) - len(pair[1]) + 1],
                        pair[1],
                    ),
                },
            }
            for name, content in stand_ins.items():
                module = types.ModuleType(name)
                vars(module).update(content)
                patch.setitem(sys.modules, name, module)
        patch.delitem(sys.modules, MODULE, raising=False)
        yield importlib.import_module(MODULE)
    sys.modules.pop(MODULE, None)


def requests(*arguments):
    return [types.SimpleNamespace(args=each) for each in arguments]


class Scores:
    """A scorer that records its pairs; a pair's score is the sum of its continuation's ids."""

    def __init__(self, context):
        self.context, self.calls = context, []

    def score(self, pairs, on_scored):
        self.calls.append(list(pairs))
        on_scored(len(pairs))
        return [Score(float(sum(pair.continuation)), True, False) for pair in pairs]


class Texts:
    """A `generate` that records its calls; a text is the temperature and its prompt's index."""

    def __init__(self):
        self.calls = []

    def __call__(self, prompts, *, on_progress, **options):
        self.calls.append((list(prompts), options))
        found = [f"{options['sampling'].temperature}:{i}" for i in range(len(prompts))]
        on_progress(len(prompts) * options["max_new_tokens"])
        return [Generation("", text, 1, "length") for text in found]


def test_rolling_windows_are_those_of_the_harness(harness):
    """Those in lm-eval's docstring; the windows of several texts are scored together."""
    scorer = Scores(4)
    lm = harness.HarnessLM(scorer, BYTES, Texts())
    long, short = bytes(range(10)).decode(), "\1\2"
    totals = lm.loglikelihood_rolling(requests((long,), ("",), (short,)), disable_tqdm=True)
    assert scorer.calls == [
        [
            Pair([256], [0, 1, 2, 3]),
            Pair([3], [4, 5, 6, 7]),
            Pair([5, 6, 7], [8, 9]),
            Pair([256], [1, 2]),
        ]
    ]
    assert totals == [45.0, 0.0, 3.0]


def test_log_likelihoods(harness):
    scorer = Scores(8)
    lm = harness.HarnessLM(scorer, BYTES, Texts())
    found = lm.loglikelihood(requests(("a ", "b"), ("", "c")), disable_tqdm=True)
    assert scorer.calls == [[Pair([256, 97], [32, 98]), Pair([256], [99])]]
    assert found == [(130.0, True), (99.0, True)]
    with pytest.raises(
        ValueError, match=r"Request 2, \('b', ''\): the continuation must add a token"
    ):
        lm.loglikelihood(requests(("a", "b"), ("b", "")), disable_tqdm=True)


def test_ids_of_a_text(harness):
    lm = harness.HarnessLM(Scores(8), BYTES, Texts())
    assert lm.tok_encode("ab") == lm.tok_encode("ab", add_special_tokens=True) == [256, 97, 98]
    assert lm.tok_encode("ab", add_special_tokens=False) == [97, 98]
    assert (lm.eot_token_id, lm.prefix_token_id) == (256, 256)
    nothing = harness.HarnessLM(Scores(8), BYTES.beginning_with("none"), Texts())
    assert (nothing.tok_encode("a"), nothing.prefix_token_id) == ([97], 256)
    assert lm.tokenizer_name != nothing.tokenizer_name


def test_equal_settings_share_batches_and_texts_keep_their_order(harness):
    texts = Texts()
    lm = harness.HarnessLM(Scores(8), BYTES, texts)
    greedy, warm = {"until": "x", "max_gen_toks": 3}, {"temperature": 0.5, "max_gen_toks": 3}
    asked = requests(("a", greedy), ("b", warm), ("c" * 9, dict(greedy)), ("", warm))
    found = lm.generate_until(asked, disable_tqdm=True)
    assert found == ["0.0:0", "0.5:0", "0.0:1", "0.5:1"]
    (first, options), (second, _) = texts.calls
    # A long context loses its beginning, including the token that begins the text.
    assert first == [[256, 97], [99] * 5]
    assert second == [[256, 98], [256]]
    assert (options["max_new_tokens"], options["stop"]) == (3, ("x",))
    assert options["sampling"] == Sampling(temperature=0)
    with pytest.raises(ValueError, match="got 'typical_p'"):
        lm.generate_until(requests(("a", {"typical_p": 1.0})), disable_tqdm=True)


def test_seeds_differ_between_batches_and_not_between_runs(harness):
    def seeds(seed):
        texts = Texts()
        lm = harness.HarnessLM(Scores(8), BYTES, texts, seed)
        for _ in range(2):
            lm.generate_until(requests(("a", {}), ("a", {"temperature": 1.0})), disable_tqdm=True)
        return [options["seed"] for _, options in texts.calls]

    assert len(set(seeds(0))) == 4
    assert seeds(0) == seeds(0)
    assert not set(seeds(0)) & set(seeds(1))


@pytest.fixture(scope="module")
def model():
    config = small_baseline("llama", vocab_size=257, blocks=1)
    return config, models.init(config, jax.random.key(1))


def test_sampled_texts_differ_and_settings_take_effect(harness, model):
    scorer = types.SimpleNamespace(context=24)
    bound = partial(generate, *model, tokenizer=BYTES, batch_size=8)

    def texts(count, **settings):
        lm = harness.HarnessLM(scorer, BYTES, bound)
        asked = requests(*[("abc", {"max_gen_toks": 6} | settings)] * count)
        return lm.generate_until(asked, disable_tqdm=True)

    sampled = texts(8, do_sample=True, temperature=1.0)
    assert len(set(sampled)) > 4
    assert sampled == texts(8, do_sample=True, temperature=1.0)
    greedy = texts(8)
    assert len(set(greedy)) == 1
    assert texts(8, do_sample=True, top_k=1) == greedy


def chat_tokenizer(folder, template):
    vocabulary = {"<s>": 0, "</s>": 1, "h": 2, "i": 3, "s": 4, "?": 5}
    library = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, [], unk_token="?"))
    library.add_special_tokens(["<s>", "</s>"])
    first = tokenizers.processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 0)])
    library.post_processor = first
    library.save(str(folder / "tokenizer.json"))
    settings = {"bos_token": "<s>", "eos_token": "</s>", "chat_template": template}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return load_tokenizer(str(folder / "tokenizer.json"))


CHAT = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no') }}"
    "{% endif %}{{ m.content }}{{ eos_token }}{% endfor %}"
)


def test_special_tokens_are_read_in_chats(harness, tmp_path, capsys):
    pytest.importorskip("jinja2")
    scorer, texts = Scores(8), Texts()
    lm = harness.HarnessLM(scorer, chat_tokenizer(tmp_path, CHAT), texts)
    assert lm.tok_encode("<s>hi")[:2] != [0, 2]  # text alone cannot spell a special token
    user = {"role": "user", "content": "hi"}
    text = lm.apply_chat_template([user])
    assert text == "<s>hi</s>"
    assert lm.tok_encode(text) == [0, 2, 3, 1]  # with one <s>
    assert lm.tok_encode("hi") == [0, 2, 3]
    lm.loglikelihood(requests((text, "hi")), disable_tqdm=True)
    assert scorer.calls == [[Pair([0, 2, 3, 1], [2, 3])]]
    lm.generate_until(requests((text, {"max_gen_toks": 2})), disable_tqdm=True)
    assert texts.calls[0][0] == [[0, 2, 3, 1]]
    assert texts.calls[0][1]["stop"] == ("</s>",)
    assert lm.apply_chat_template([user], add_generation_prompt=False) == "<s>hi"
    assert lm.apply_chat_template([{"role": "system", "content": "s"}, user]) == text
    assert (
        "warning: The chat template fails: no; system messages are left out"
        in capsys.readouterr().err
    )
    assert lm.chat_template(True) == CHAT
    assert lm.chat_template(False) is None
    assert lm.tok_encode("<s>hi")[:2] != [0, 2]


def test_named_templates(harness, tmp_path):
    pytest.importorskip("jinja2")
    named = [{"name": name, "template": name.upper()} for name in ("default", "tool_use")]
    lm = harness.HarnessLM(Scores(8), chat_tokenizer(tmp_path, named), Texts())
    user = [{"role": "user", "content": "hi"}]
    assert lm.apply_chat_template(user) == "DEFAULT"
    assert lm.chat_template("tool_use") == "TOOL_USE"
    assert lm.apply_chat_template(user) == "TOOL_USE"
    with pytest.raises(ValueError, match="must be one of default, tool_use; got 'x'"):
        lm.chat_template("x")
    with pytest.raises(ValueError, match="Tokenizer bytes must have a chat template"):
        harness.HarnessLM(Scores(8), BYTES, Texts()).apply_chat_template(user)


def test_hflm_gives_the_same_numbers(tmp_path):
    """Within 1e-4 nats of lm-eval's own class on the exported model, whose texts begin with <s>."""
    pytest.importorskip("lm_eval.models.huggingface")
    import torch
    import transformers
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    from flowhn_jax.evaluation.harness import HarnessLM
    from flowhn_jax.interop import huggingface

    context = 24
    config = small_baseline("llama", vocab_size=32, context=context)
    params = models.init(config, jax.random.key(0))
    letters = "abcdefghijklmnopqrstuvwxyz .,\n"
    vocabulary = {token: i for i, token in enumerate(("<s>", "</s>", *letters))}
    library = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, []))
    library.decoder = tokenizers.decoders.Fuse()
    library.add_special_tokens(["<s>", "</s>"])
    first = tokenizers.processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 0)])
    library.post_processor = first
    library.save(str(tmp_path / "tokenizer.json"))
    huggingface.save(tmp_path, config, params)
    names = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "</s>"}
    template = "{{ bos_token }}{% for m in messages %}{{ m.content }}{{ eos_token }}{% endfor %}"
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": template} | names))
    theirs = transformers.PreTrainedTokenizerFast.from_pretrained(tmp_path)
    loaded = transformers.LlamaForCausalLM.from_pretrained(tmp_path).eval().float()
    options = dict(pretrained=loaded, max_length=context, batch_size=4, device="cpu")
    hflm = HFLM(tokenizer=theirs, **options)
    # Rolling windows have the first token already; the tokenizer would add another.
    plain = HFLM(tokenizer=theirs, add_bos_token=False, **options)
    tokenizer = load_tokenizer(str(tmp_path / "tokenizer.json"))
    scorer = Scorer(config, params, make_mesh(MeshConfig(data=1), 4), 4)
    ours = HarnessLM(scorer, tokenizer, partial(generate, config, params, tokenizer=tokenizer))

    rng = np.random.default_rng(0)
    text = "".join(rng.choice(list(letters), 3 * context + 5))

    def instances(kind, *arguments):
        return [
            Instance(request_type=kind, doc={}, arguments=each, idx=i)
            for i, each in enumerate(arguments)
        ]

    pairs = [(text[:9], " b"), (text[:5] + " ", "ab"), ("", "abc"), (text[:60], " end of it")]
    asked = instances("loglikelihood", *pairs)
    found, expected = (lm.loglikelihood(asked, disable_tqdm=True) for lm in (ours, hflm))
    lengths = 1, context - 1, context, context + 1, 2 * context, len(text)
    rolled = instances("loglikelihood_rolling", *[(text[:length],) for length in lengths])
    totals, known = (lm.loglikelihood_rolling(rolled, disable_tqdm=True) for lm in (ours, plain))
    assert [greedy for _, greedy in found] == [greedy for _, greedy in expected]
    gaps = [abs(a[0] - b[0]) for a, b in zip(found, expected, strict=True)]
    rolling_gaps = np.abs(np.subtract(totals, known))
    print(f"log-likelihood: {max(gaps):.1e} nats, rolling: {rolling_gaps.max():.1e} nats")
    assert max(gaps) < 1e-4
    assert rolling_gaps.max() < 1e-4

    chat = hflm.apply_chat_template([{"role": "user", "content": "ab"}])
    assert ours.apply_chat_template([{"role": "user", "content": "ab"}]) == chat == "<s>ab</s>"
    asked = instances("loglikelihood", (chat, "c"))
    found, expected = (lm.loglikelihood(asked, disable_tqdm=True) for lm in (ours, hflm))
    assert found[0][0] == pytest.approx(expected[0][0], abs=1e-4)
    ours.chat_template(False)

    greedy = {"until": ["q"], "max_gen_toks": 8}
    sampled = {"do_sample": True, "temperature": 1.0, "top_k": 1, "max_gen_toks": 8, "until": []}
    contexts = [(text[:length], kwargs) for length in (3, 60, 10) for kwargs in (greedy, sampled)]
    with torch.inference_mode():
        expected = hflm.generate_until(instances("generate_until", *contexts), disable_tqdm=True)
    found = ours.generate_until(instances("generate_until", *contexts), disable_tqdm=True)
    assert found == expected
