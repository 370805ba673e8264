"""Text to token ids and back, whatever file the vocabulary came from.

Source: the special-token rules are those of the Hugging Face `tokenizers` library and of llama.cpp; user text is never
read as special tokens, only BOS and EOS are added, as the model's files say.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

from ..errors import RequestError


class Codec(Protocol):
    """One vocabulary: plain text to ids, and each id to its bytes. It knows no BOS and no special tokens."""

    has_text: bool  # False: ids only, there are no pieces
    strips_leading_space: bool  # the decoded text loses one space at its very start (SentencePiece's dummy prefix)

    @property
    def vocab_size(self) -> int: ...
    def encode(self, text: str, *, continues: bool) -> list[int]:
        """`continues`: other tokens stand before this text, so a prefix due only at the start is not added."""
        ...

    def piece(self, token_id: int) -> str: ...
    def piece_bytes(self, token_id: int) -> bytes: ...
    def id_of(self, piece: str) -> int | None: ...


@dataclass(frozen=True)
class SpecialToken:
    """A token that plain text never becomes. lstrip, rstrip: it swallows the whitespace on that side of it."""

    id: int
    content: str
    lstrip: bool = False
    rstrip: bool = False


@dataclass(frozen=True)
class SpecialTokens:
    """What is added around a text, what ends a generation, and which ids are special (`by_id`)."""

    by_id: Mapping[int, SpecialToken]
    bos_token_id: int | None = None
    eos_token_ids: frozenset[int] = frozenset()
    eos_token_id: int | None = None  # the one that templates call eos_token
    prefix_ids: tuple[int, ...] = ()
    suffix_ids: tuple[int, ...] = ()


class Tokenizer:
    """Encodes and decodes text. Immutable after construction; make one with `from_directory` or `from_gguf`."""

    def __init__(self, codec: Codec, specials: SpecialTokens, chat_template: Any = None) -> None:
        self._codec = codec
        self._specials = specials
        self._bytes: dict[int, bytes] = {}
        self.chat_template = chat_template  # Jinja source, or a list of {name, template}; None when the model has none

    @classmethod
    def from_directory(cls, path: Path | str) -> Tokenizer:
        """Read tokenizer.json, tokenizer_config.json, special_tokens_map.json, generation_config.json and the chat
        template of a Hugging Face directory. Raises ModelFormatError."""
        from .hf_tokenizer import load_directory

        return load_directory(Path(path))

    @classmethod
    def from_gguf(cls, metadata: Mapping[str, Any], path: Path | str | None = None) -> Tokenizer:
        """Build from the `tokenizer.*` keys of a GGUF file; `path` is for messages. Raises ModelFormatError."""
        from .gguf_vocab import load_gguf

        return load_gguf(metadata, path)

    @cached_property
    def vocab_size(self) -> int:
        """One more than the highest token id. The model's embedding table may have padding rows beyond it."""
        return self._codec.vocab_size

    @property
    def has_text(self) -> bool:
        """Whether there is a vocabulary at all; without one, encode and decode raise RequestError."""
        return self._codec.has_text

    @property
    def bos_token_id(self) -> int | None:
        return self._specials.bos_token_id

    @property
    def prefix_ids(self) -> tuple[int, ...]:
        """What `encode` puts before a text, as the model's files say: BOS, or nothing."""
        return self._specials.prefix_ids

    @property
    def eos_token_ids(self) -> frozenset[int]:
        """Tokens that end a generation: end of sequence, of turn, of message."""
        return self._specials.eos_token_ids

    @property
    def bos_token(self) -> str:
        """Text of the BOS token for chat templates; empty when there is none."""
        return self._content(self._specials.bos_token_id)

    @property
    def eos_token(self) -> str:
        return self._content(self._specials.eos_token_id)

    @property
    def special_tokens(self) -> Mapping[int, SpecialToken]:
        return self._specials.by_id

    @property
    def strips_leading_space(self) -> bool:
        """Whether `decode` drops one space at the start of the text."""
        return self._codec.strips_leading_space

    def encode(self, text: str, *, add_special: bool = True) -> list[int]:
        """Token ids of `text`. Special-token strings inside it are plain text.

        add_special: put BOS and EOS around it where the model's files say so.
        Raises RequestError for a str that is no valid Unicode text (lone surrogates).
        """
        ids = self._encode_text(text, continues=False)
        return [*self._specials.prefix_ids, *ids, *self._specials.suffix_ids] if add_special else ids

    def encode_segments(self, segments: Iterable[str | int]) -> list[int]:
        """Token ids of plain texts (str) and ready ids (int) in a row; nothing is added around them."""
        ids: list[int] = []
        for segment in segments:
            if isinstance(segment, int):
                ids.append(segment)
            else:
                ids += self._encode_text(segment, continues=bool(ids))
        return ids

    def split_special(self, text: str) -> list[str | int]:
        """Cut trusted text (a rendered chat template) at its special tokens, for `encode_segments`."""
        segments: list[str | int] = []
        start = 0
        strip_left = False  # the special token before this text swallows whitespace
        for match in self.special_pattern.finditer(text):
            token = self._by_content[match.group()]
            between = text[start : match.start()]
            between = between.lstrip() if strip_left else between
            between = between.rstrip() if token.lstrip else between
            segments += [between, token.id] if between else [token.id]
            start, strip_left = match.end(), token.rstrip
        rest = text[start:].lstrip() if strip_left else text[start:]
        return [*segments, rest] if rest else segments

    def decode(self, ids: Sequence[int], *, skip_special: bool = True) -> str:
        """Text of `ids`. Bytes that are no UTF-8 become U+FFFD, one for each maximal invalid part (Unicode 3.9);
        ids beyond the vocabulary have no text. Raises RequestError for a negative id."""
        special = self._specials.by_id
        shown = (i for i in ids if i not in special) if skip_special else ids
        text = b"".join(map(self.token_bytes, shown)).decode("utf-8", "replace")
        return text[1:] if self.strips_leading_space and text.startswith(" ") else text

    def token_bytes(self, token_id: int) -> bytes:
        """What one token contributes to the text; it may be a part of a character."""
        data = self._bytes.get(token_id)
        if data is None:
            data = self._bytes[token_id] = self._token_bytes(token_id)
        return data

    def id_to_piece(self, token_id: int) -> str:
        """The token as the vocabulary spells it (`Ġhello`, `▁hello`, `<0x0A>`); special tokens as their text."""
        self._check_id(token_id)
        if token_id >= self.vocab_size:
            raise RequestError(f"token id {token_id} is not in the vocabulary of {self.vocab_size}")
        special = self._specials.by_id.get(token_id)
        return special.content if special else self._codec.piece(token_id)

    def token_to_id(self, piece: str) -> int | None:
        """Id of a piece as `id_to_piece` spells it; None when there is none."""
        special = self._by_content.get(piece)
        return special.id if special else self._codec.id_of(piece)

    def is_special(self, token_id: int) -> bool:
        return token_id in self._specials.by_id

    @cached_property
    def special_pattern(self) -> re.Pattern[str]:
        """Finds special tokens in a text, the longest where several begin."""
        contents = sorted(self._by_content, key=len, reverse=True)
        return re.compile("|".join(map(re.escape, contents)) if contents else r"(?!)")

    @cached_property
    def special_prefixes(self) -> frozenset[str]:
        """All proper prefixes of special tokens."""
        return frozenset(content[:n] for content in self._by_content for n in range(1, len(content)))

    @cached_property
    def _by_content(self) -> dict[str, SpecialToken]:
        return {token.content: token for token in self._specials.by_id.values() if token.content}

    def _content(self, token_id: int | None) -> str:
        return "" if token_id is None else self.id_to_piece(token_id)

    def _encode_text(self, text: str, *, continues: bool) -> list[int]:
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise RequestError(
                f"the text is not valid Unicode: lone surrogate U+{ord(text[error.start]):04X} at character "
                f"{error.start}; decode the input with errors='replace'"
            ) from None
        return self._codec.encode(text, continues=continues) if text else []

    def _token_bytes(self, token_id: int) -> bytes:
        self._check_id(token_id)
        special = self._specials.by_id.get(token_id)
        if special:
            return special.content.encode()
        return self._codec.piece_bytes(token_id) if token_id < self.vocab_size else b""

    @staticmethod
    def _check_id(token_id: int) -> None:
        if token_id < 0:
            raise RequestError(f"token id {token_id} is negative")
