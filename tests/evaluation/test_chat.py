import json
import sys

import pytest
import tokenizers

from flowhn_jax.data.tokenizer import load_tokenizer
from flowhn_jax.evaluation import chat
from flowhn_jax.evaluation.chat import ChatTemplates

pytest.importorskip("jinja2")

TEMPLATE = """{{ bos_token }}{% for m in messages %}
    {% if m['role'] == 'system' %}
        {{ raise_exception('no system') }}
    {% endif %}
<|{{ m['role'] }}|>{% generation %}{{ m['content'] | trim }}{% endgeneration %}{{ eos_token }}
{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"""
LATER = "{% for m in messages %}{% if loop.first %}{% continue %}{% endif %}[{{ m.content }}]"
PLAIN = LATER + "{% endfor %}"
MESSAGES = [
    {"role": "user", "content": " Hi <b> "},
    {"role": "assistant", "content": "Well, é "},
]
EOS = {"__type": "AddedToken", "content": "</s>", "normalized": False}
NAMES = {"bos_token": "<s>", "eos_token": EOS, "add_bos_token": True}


def save(folder, template=None, **settings):
    """Save a tokenizer with settings and, if given, a template in a file."""
    vocabulary = {"<s>": 0, "</s>": 1, "a": 2}
    library = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, [], unk_token="a"))
    library.add_special_tokens(["<s>", "</s>"])
    library.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(NAMES | settings))
    if template is not None:
        (folder / "chat_template.jinja").write_text(template)
    return load_tokenizer(str(folder / "tokenizer.json"))


def test_a_chat_is_rendered_as_text(tmp_path):
    templates = ChatTemplates.read(save(tmp_path, chat_template=TEMPLATE))
    text = templates.render(templates.template(), MESSAGES)
    expected = "<s><|user|>Hi <b></s>\n<|assistant|>Well, é</s>\n"
    assert text == expected + "<|assistant|>"
    continued = templates.render(templates.template(), MESSAGES, add_generation_prompt=False)
    assert continued == expected.removesuffix("</s>\n")
    assert MESSAGES[-1]["content"] == "Well, é "  # unchanged


@pytest.mark.parametrize("add_generation_prompt", [True, False])
@pytest.mark.parametrize("template", [TEMPLATE, PLAIN, "{{ messages | tojson }}{# content #}"])
def test_transformers_renders_the_same(tmp_path, template, add_generation_prompt):
    transformers = pytest.importorskip("transformers")
    templates = ChatTemplates.read(save(tmp_path, template))
    theirs = transformers.PreTrainedTokenizerFast.from_pretrained(tmp_path)
    expected = theirs.apply_chat_template(
        MESSAGES,
        tokenize=False,
        add_generation_prompt=add_generation_prompt,
        continue_final_message=not add_generation_prompt,
    )
    options = {"add_generation_prompt": add_generation_prompt}
    assert templates.render(templates.template(), MESSAGES, **options) == expected


def test_templates_have_names(tmp_path):
    named = [{"name": "default", "template": "a"}, {"name": "tool_use", "template": "b"}]
    templates = ChatTemplates.read(save(tmp_path, chat_template=named))
    assert (templates.template(), templates.template("tool_use")) == ("a", "b")
    with pytest.raises(ValueError, match="must be one of default, tool_use; got 'x'"):
        templates.template("x")
    # A file takes precedence over the settings, and a folder may hold further templates.
    (tmp_path / "additional_chat_templates").mkdir()
    (tmp_path / "additional_chat_templates" / "rag.jinja").write_text("d")
    templates = ChatTemplates.read(save(tmp_path, "c", chat_template=named))
    assert templates.templates == {"default": "c", "tool_use": "b", "rag": "d"}
    (tmp_path / "one").mkdir()
    one = [{"name": "only", "template": "e"}]
    assert ChatTemplates.read(save(tmp_path / "one", chat_template=one)).template() == "e"


def test_special_tokens_are_the_named_ones(tmp_path):
    """The settings of this package, which stand next to them, are none."""
    templates = ChatTemplates.read(save(tmp_path, "a", flowhn_jax={"first_token": "eot"}))
    assert templates.special_tokens == {"bos_token": "<s>", "eos_token": "</s>"}


@pytest.mark.parametrize("found", [5, ["a"], [{"name": "a"}], [{"name": "a", "template": 1}]])
def test_a_malformed_template_is_refused(tmp_path, found):
    tokenizer = save(tmp_path, chat_template=found)
    with pytest.raises(ValueError, match=r"chat_template in .* must be a string, or a list"):
        ChatTemplates.read(tokenizer)


def test_a_failing_template_gives_one_message(tmp_path):
    templates = ChatTemplates.read(save(tmp_path, TEMPLATE))
    system = [{"role": "system", "content": "x"}]
    for template, message in (
        (TEMPLATE, "The chat template fails: no system"),
        ("{% if %}", "The chat template fails: Expected"),
        ("{{ messages[0].content + 1 }}", "The chat template fails: can only concatenate"),
        (
            "{{ messages.append(1) }}",
            "The chat template fails: .*'append' of 'list' object is unsafe",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            templates.render(template, system)
    with pytest.raises(ValueError, match="leaves out the last message's content"):
        templates.render("{{ 1 }}", system, add_generation_prompt=False)


def test_a_missing_template_or_package_is_named(tmp_path, monkeypatch):
    for tokenizer in (save(tmp_path), load_tokenizer("bytes")):
        with pytest.raises(ValueError, match=r"must have a chat template, in chat_template"):
            ChatTemplates.read(tokenizer)
    templates = ChatTemplates.read(save(tmp_path, "a"))
    chat._environment.cache_clear()
    monkeypatch.setitem(sys.modules, "jinja2", None)
    with pytest.raises(ImportError, match=r"`jinja2` package: pip install jinja2"):
        templates.render("a", MESSAGES)
