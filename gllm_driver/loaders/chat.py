"""Chat templates (Jinja, as Hugging Face models carry them), encoded so that no message can forge a turn."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from functools import cached_property
from typing import TYPE_CHECKING, Any

from ..errors import RequestError
from .tokenizer import Tokenizer

if TYPE_CHECKING:
    from jinja2 import Template

Message = Mapping[str, Any]

# What a template of a stranger may raise by mistake, besides Jinja's own errors.
_TEMPLATE_MISTAKES = (TypeError, ValueError, LookupError, ArithmeticError, AttributeError, RecursionError)
_FIRST_PLACEHOLDER = 0xF0000  # supplementary private use area A
_LAST_PLACEHOLDER = 0xFFFFD


class ChatTemplate:
    """A chat template. source: Jinja text, or a list of {"name", "template"}, of which `default` is used, and
    `tool_use` when there are tools. bos_token, eos_token: what the template writes for them."""

    def __init__(self, source: str | Sequence[Mapping[str, str]], bos_token: str = "", eos_token: str = "") -> None:
        sources = {"default": source} if isinstance(source, str) else {t["name"]: t["template"] for t in source}
        self._sources: dict[str, str] = sources
        self._compiled: dict[str, Template] = {}
        self._bos_token = bos_token
        self._eos_token = eos_token

    @classmethod
    def of(cls, tokenizer: Tokenizer) -> ChatTemplate:
        """The model's own template. Raises RequestError when it has none."""
        if not tokenizer.chat_template:
            raise RequestError("this model has no chat template; give a plain prompt instead of messages")
        return cls(tokenizer.chat_template, tokenizer.bos_token, tokenizer.eos_token)

    def render(
        self,
        messages: Sequence[Message],
        *,
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = None,
        **variables: Any,
    ) -> str:
        """The prompt as text. messages: {"role", "content", …}; tools: JSON schemas of functions; variables: whatever
        else the template reads (enable_thinking, …). Raises RequestError for what the template refuses."""
        from jinja2 import TemplateError

        name = "tool_use" if tools and "tool_use" in self._sources else "default"
        try:
            return self._template(name).render(
                messages=messages,
                tools=tools,
                add_generation_prompt=add_generation_prompt,
                bos_token=self._bos_token,
                eos_token=self._eos_token,
                **variables,
            )
        except (TemplateError, *_TEMPLATE_MISTAKES) as error:
            problem = " ".join(str(error).split()) or type(error).__name__
            raise RequestError(f"the chat template cannot render these messages: {problem}") from error

    def _template(self, name: str) -> Template:
        if name not in self._sources:
            raise RequestError(f"the model has no chat template named {name!r}; it has {', '.join(self._sources)}")
        if name not in self._compiled:
            self._compiled[name] = _environment().from_string(self._sources[name])
        return self._compiled[name]


def encode_chat(
    tokenizer: Tokenizer,
    template: ChatTemplate,
    messages: Sequence[Message],
    *,
    add_generation_prompt: bool = True,
    tools: Sequence[Mapping[str, Any]] | None = None,
    **variables: Any,
) -> list[int]:
    """Token ids of a conversation. Special tokens that the template writes become special tokens; the same characters
    inside messages and tools stay text. BOS is there if the template writes it, and never twice.

    Raises RequestError like `ChatTemplate.render`.
    """
    shield = _Shield(tokenizer, [messages, tools])
    text = template.render(
        shield.covered[0], add_generation_prompt=add_generation_prompt, tools=shield.covered[1], **variables
    )
    segments = tokenizer.split_special(text)
    # A BOS at the start may be written twice, by the template and inside a first turn copied from another.
    while len(segments) > 1 and segments[0] == segments[1] == tokenizer.bos_token_id:
        del segments[0]
    return tokenizer.encode_segments(s if isinstance(s, int) else shield.uncover(s) for s in segments)


class _Shield:
    """Hides special-token strings in what users wrote behind private-use characters while a template renders.

    Hidden are whole special tokens, and an end of a string that begins one (two strings may be written side by side).
    So no special token can begin inside a user's string. Roles are left alone: templates build tokens from them.
    """

    def __init__(self, tokenizer: Tokenizer, values: Sequence[Any]) -> None:
        self._pattern = tokenizer.special_pattern
        self._prefixes = tokenizer.special_prefixes
        self._longest_prefix = max(map(len, self._prefixes), default=0)
        self._taken: set[int] = set()
        for value in values:
            self._collect(value)
        self._placeholders: dict[str, str] = {}
        self._next = _FIRST_PLACEHOLDER
        self.covered = [self._cover(value) for value in values]

    @cached_property
    def _originals(self) -> dict[int, str]:
        return {ord(placeholder): text for text, placeholder in self._placeholders.items()}

    def uncover(self, text: str) -> str:
        for original, placeholder in self._placeholders.items():  # `tojson` may have written it as an escape
            escaped = json.dumps(placeholder)[1:-1]
            if escaped in text:
                text = text.replace(escaped, json.dumps(original)[1:-1])
        return text.translate(self._originals)

    def _collect(self, value: Any) -> None:
        """Private-use characters in users' own strings are not free to be placeholders."""
        if isinstance(value, str):
            self._taken.update(code for code in map(ord, value) if code >= _FIRST_PLACEHOLDER)
        elif isinstance(value, Mapping):
            for item in value.values():
                self._collect(item)
        elif isinstance(value, (list, tuple)):
            for item in value:
                self._collect(item)

    def _cover(self, value: Any, key: str | None = None) -> Any:
        if isinstance(value, str):
            return value if key == "role" else self._cover_text(value)
        if isinstance(value, Mapping):
            return {name: self._cover(item, name) for name, item in value.items()}
        if isinstance(value, (list, tuple)):
            return [self._cover(item) for item in value]
        return value

    def _cover_text(self, text: str) -> str:
        text = self._pattern.sub(lambda match: self._placeholder(match.group()), text)
        for length in range(min(self._longest_prefix, len(text)), 0, -1):
            if text[-length:] in self._prefixes:
                return text[:-length] + self._placeholder(text[-length:])
        return text

    def _placeholder(self, original: str) -> str:
        if original not in self._placeholders:
            while self._next in self._taken:
                self._next += 1
            if self._next > _LAST_PLACEHOLDER:
                raise RequestError("the messages use up all private-use characters")
            self._placeholders[original] = chr(self._next)
            self._next += 1
        return self._placeholders[original]


def _environment() -> Any:
    """Jinja as transformers sets it up, in its sandbox: templates come from strangers."""
    from jinja2 import TemplateError, nodes
    from jinja2.ext import Extension, loopcontrols
    from jinja2.parser import Parser
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """`{% generation %}` marks the assistant's words for training; here it is its body."""

        tags = {"generation"}  # noqa: RUF012

        def parse(self, parser: Parser) -> list[nodes.Node]:
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    def raise_exception(message: str) -> None:
        raise TemplateError(message)

    def tojson(value: Any, ensure_ascii: bool = False, indent: int | None = None, **options: Any) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, **options)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols]
    )
    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda pattern: datetime.now().strftime(pattern)
    return environment
