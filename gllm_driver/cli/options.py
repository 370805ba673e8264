"""Values from the command line, checked before any model is opened."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import click

from ..config import SamplingConfig
from ..errors import RequestError

SEED_MAX = 2**64 - 1


class DeviceType(click.ParamType):
    """auto, cpu, cuda or cuda:N."""

    name = "auto|cpu|cuda[:N]"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", value, re.ASCII):
            self.fail(f"{value!r} is none of auto, cpu, cuda, cuda:N.", param, ctx)
        return str(value)


class TokensType(click.ParamType):
    """Token ids with commas between them."""

    name = "1,2,3"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, ...]:
        if isinstance(value, tuple):
            return value
        ids = [part.strip() for part in value.split(",")]
        wrong = next((part for part in ids if not re.fullmatch(r"\d{1,18}", part, re.ASCII)), None)
        if wrong is not None:
            self.fail(f"token ids are whole numbers with commas between them, got {wrong!r}.", param, ctx)
        return tuple(int(part) for part in ids)


class TextType(click.ParamType):
    """Text of at least one character, in valid UTF-8."""

    name = "text"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        if not value:
            self.fail("must not be empty.", param, ctx)
        if not _is_unicode(value):
            self.fail("is not valid UTF-8.", param, ctx)
        return str(value)


def check_sampling(options: dict[str, Any]) -> dict[str, Any]:
    """The options that were given (not None), once they are in range and do not contradict each other.

    Greedy decoding (temperature 0) looks at the best token alone, so options that shape a draw contradict it, unless
    their value means "off". A seed does not: the output is as reproducible as it asks for.

    Raises RequestError for a value out of range, click.UsageError for a contradiction.
    """
    given = {name: value for name, value in options.items() if value is not None}
    config = SamplingConfig(**given)
    if given.get("temperature") == 0:
        for name, off in (("top_k", (0, 1)), ("top_p", (1.0,)), ("min_p", (0.0,))):
            if name in given and getattr(config, name) not in off:
                raise click.UsageError(
                    f"--temperature 0 always takes the best token and contradicts {flag(name)} {given[name]:g}: "
                    "leave one of them out."
                )
    return given


def flag(name: str) -> str:
    """The option of a parameter: top_k → --top-k."""
    return "--" + name.replace("_", "-")


def read_prompt(words: tuple[str, ...]) -> str:
    """The text of the PROMPT argument: itself, standard input for `-` or nothing, a file for `@path`; `@@` is an @.

    One line end at the end of a file or of standard input belongs to the file, not to the prompt, and is dropped.
    Raises click.UsageError when PROMPT is missing or is several, RequestError when the text cannot be read or is empty.
    """
    if len(words) > 1:
        raise click.UsageError(f"PROMPT is one argument, got {len(words)}: put it in quotes.")
    if not words and (sys.stdin is None or sys.stdin.closed or sys.stdin.isatty()):
        raise click.UsageError("Missing PROMPT (text, - for standard input, @FILE) or --tokens.")
    word = words[0] if words else "-"
    if word == "-":
        text = _decoded(_standard_input(), "the prompt in standard input")
    elif word.startswith("@") and not word.startswith("@@"):
        hint = " (a prompt that begins with @ is written @@)"
        text = _decoded(_file(Path(word[1:]), "the prompt file", hint), f"the prompt in {word[1:]}")
    else:
        text = word.removeprefix("@")
        if not _is_unicode(text):
            raise RequestError("the prompt is not valid UTF-8")
    if not text:
        raise RequestError("the prompt is empty: give at least one character")
    return text


def _standard_input() -> bytes:
    if sys.stdin is None or sys.stdin.closed:
        raise RequestError("standard input is closed: give the text as an argument or in a file")
    try:
        return sys.stdin.buffer.read()
    except OSError as error:
        raise RequestError(f"cannot read standard input: {error.strerror or error}") from error


def read_text(word: str) -> str:
    """The text of a FILE argument: a path, which an @ may precede, or `-` for standard input.

    One line end at its end is dropped, as by `read_prompt`. Raises RequestError when it cannot be read.
    """
    if word == "-":
        return _decoded(_standard_input(), "the text in standard input")
    path = word.removeprefix("@")
    return _decoded(_file(Path(path), "the file", ""), f"the text in {path}")


def _file(path: Path, what: str, hint: str) -> bytes:
    try:
        return path.read_bytes()
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise RequestError(f"cannot read {what} {str(path)!r}: {reason}{hint}") from error


def _decoded(data: bytes, source: str) -> str:
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise RequestError(f"{source} is not valid UTF-8 (at byte {error.start})") from error
    return text[:-2] if text.endswith("\r\n") else text.removesuffix("\n")


def _is_unicode(text: str) -> bool:
    """False for command-line bytes that are not UTF-8: Python passes them as lone surrogates."""
    return not any("\ud800" <= c <= "\udfff" for c in text)
