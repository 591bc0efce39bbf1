"""Chat templates: turn messages into the text that a chat model reads, as transformers does."""

import dataclasses
import datetime
import functools
import json
import typing
from collections.abc import Mapping, Sequence
from typing import Any

from flowhn_jax.data.tokenizer import Tokenizer
from flowhn_jax.data.tokenizer_config import (
    CHAT_TEMPLATE,
    DEFAULT_TEMPLATE,
    NAMED_TEMPLATES,
    SETTINGS,
    chat_templates,
    find_file,
    named_token,
    read_settings,
)
from flowhn_jax.utils.text import one_line, short_repr

Message = Mapping[str, Any]

_TEMPLATE_ENDING = ".jinja"
_END_TAG = "CONTINUE_FINAL_MESSAGE_TAG "  # marks the end of a last message to be continued


@dataclasses.dataclass(frozen=True)
class ChatTemplates:
    """The chat templates stored with a tokenizer.

    Attributes:
      templates: Jinja templates by name; 'default' is used where no name is given.
      special_tokens: texts of bos_token, eos_token and so on, for the templates.
    """

    templates: Mapping[str, str]
    special_tokens: Mapping[str, str]

    @classmethod
    def read(cls, tokenizer: Tokenizer) -> "ChatTemplates":
        """Return the templates in chat_template.jinja and tokenizer_config.json.

        Raises:
          ValueError: there is no template, or a file is not as transformers writes it.
        """
        path = find_file(tokenizer.spec, SETTINGS)
        settings = read_settings(path)
        templates = chat_templates(settings, path)
        file = find_file(tokenizer.spec, CHAT_TEMPLATE)
        if file is not None:
            templates[DEFAULT_TEMPLATE] = file.read_text()
            named = file.parent / NAMED_TEMPLATES
            templates |= {
                each.name.removesuffix(_TEMPLATE_ENDING): each.read_text()
                for each in named.children()
                if each.name.endswith(_TEMPLATE_ENDING)
            }
        if not templates:
            raise ValueError(
                f"Tokenizer {tokenizer.spec} must have a chat template, in {CHAT_TEMPLATE} or as "
                f"'chat_template' in {SETTINGS}, next to tokenizer.json; there is none."
            )
        names = [key for key in settings if key.endswith("_token") and not key.startswith("add_")]
        tokens = {key: named_token(settings, key, path) for key in names}
        return cls(templates, {key: token for key, token in tokens.items() if token is not None})

    def template(self, name: str | None = None) -> str:
        """Return a template by name; without a name, the default template or the only one.

        Raises:
          ValueError: there is no template of that name.
        """
        if name is None and len(self.templates) == 1:
            return next(iter(self.templates.values()))
        name = DEFAULT_TEMPLATE if name is None else name
        if name not in self.templates:
            raise ValueError(
                f"The chat template must be one of {', '.join(sorted(self.templates))}; got "
                f"{short_repr(name)}."
            )
        return self.templates[name]

    def render(
        self, template: str, messages: Sequence[Message], *, add_generation_prompt: bool = True
    ) -> str:
        """Return a chat as text.

        Args:
          template: as `template` returns it.
          messages: the chat; each message has a 'role' and a 'content'.
          add_generation_prompt: start the model's answer; otherwise the text ends with the last
            message's content, for the model to continue.

        Raises:
          ImportError: jinja2 is not installed.
          ValueError: the template fails on these messages.
        """
        messages = [dict(message) for message in messages]
        if not add_generation_prompt:
            messages[-1]["content"] += _END_TAG
        environment, failure = _environment()
        try:
            text = environment.from_string(template).render(
                messages=messages,
                add_generation_prompt=add_generation_prompt,
                tools=None,
                documents=None,
                **self.special_tokens,
            )
        except (failure, TypeError) as error:
            raise ValueError(f"The chat template fails: {one_line(error)}") from error
        if add_generation_prompt:
            return text
        end = text.rfind(_END_TAG.strip())
        if end < 0:
            raise ValueError("The chat template leaves out the last message's content.")
        # A template that strips the content removes its trailing spaces as well.
        return text[:end] if text.startswith(_END_TAG, end) else text[:end].rstrip()


@functools.cache
def _environment() -> tuple[Any, type[Exception]]:
    """Return a Jinja environment configured as in transformers, and the class of its errors."""
    try:
        import jinja2
        from jinja2.ext import Extension, loopcontrols
        from jinja2.sandbox import ImmutableSandboxedEnvironment
    except ImportError as error:
        raise ImportError("Chat templates need the `jinja2` package: pip install jinja2") from error

    class Generation(Extension):
        """The tag `{% generation %}`, which marks the model's words and prints them unchanged."""

        tags: typing.ClassVar[set[str]] = {"generation"}

        def parse(self, parser: Any) -> Any:
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    def raise_exception(message: str) -> None:
        raise jinja2.TemplateError(message)

    def tojson(value: Any, ensure_ascii: bool = False, **options: Any) -> str:
        # Unlike Jinja's own filter, do not escape HTML.
        return json.dumps(value, ensure_ascii=ensure_ascii, **options)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols]
    )
    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda text: datetime.datetime.now().strftime(text)
    return environment, jinja2.TemplateError
