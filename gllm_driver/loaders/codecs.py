"""The codec over the `tokenizers` package (Rust), and how its decoders spell tokens as bytes."""

from __future__ import annotations

import json
import secrets
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import Any, TypeVar

from ..errors import ModelFormatError, RequestError

_Result = TypeVar("_Result")


def checked(call: Callable[[], _Result], what: str, path: Path | str | None) -> _Result:
    """Run a constructor of `tokenizers`. It raises bare `Exception` for bad data, so its exact type is the test."""
    try:
        return call()
    except Exception as error:
        if type(error) is not Exception:
            raise
        raise ModelFormatError(f"{what}: {' '.join(str(error).split())}", path=path) from error


@cache
def byte_of_char() -> dict[int, int]:
    """Code point → byte, as byte-level BPE spells bytes (GPT-2): printable Latin-1 stands for itself, the other 68
    bytes in order for the code points from 256 on. In the form `str.translate` takes."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in set(printable)]
    return {byte: byte for byte in printable} | {256 + n: byte for n, byte in enumerate(others)}


def byte_level_bytes(piece: str) -> bytes:
    """Bytes that a piece of byte-level BPE stands for; a piece with other characters stands for itself."""
    table = byte_of_char()
    if all(ord(char) in table for char in piece):
        return piece.translate(table).encode("latin-1")
    return piece.encode("utf-8", "surrogateescape")


def fallback_byte(piece: str) -> int | None:
    """The byte that `<0xAB>` stands for; None for any other piece."""
    if len(piece) == 6 and piece.startswith("<0x") and piece.endswith(">"):
        try:
            return int(piece[3:5], 16)
        except ValueError:
            return None
    return None


@dataclass(frozen=True)
class PieceDecoder:
    """One piece to bytes. replacements: what to write for what, in order."""

    byte_level: bool = False
    byte_fallback: bool = False
    replacements: tuple[tuple[str, str], ...] = ()
    strips_leading_space: bool = False

    @classmethod
    def from_json(cls, spec: Mapping[str, Any] | None, path: Path | str | None) -> PieceDecoder:
        """From the `decoder` of a tokenizer.json: ByteLevel, Metaspace, or a Sequence of Replace, ByteFallback, Fuse
        and Strip. Metaspace drops one leading space here, where `tokenizers` drops all those of the first token."""
        steps = [] if spec is None else spec["decoders"] if spec["type"] == "Sequence" else [spec]
        fields: dict[str, Any] = {"replacements": ()}
        for step in steps:
            match step:
                case {"type": "ByteLevel"}:
                    fields["byte_level"] = True
                case {"type": "ByteFallback"}:
                    fields["byte_fallback"] = True
                case {"type": "Fuse"}:
                    pass
                case {"type": "Replace", "pattern": {"String": str(old)}, "content": str(new)}:
                    fields["replacements"] += ((old, new),)
                case {"type": "Strip", "content": " ", "start": 0 | 1 as start, "stop": 0}:
                    fields["strips_leading_space"] = start == 1
                case {"type": "Metaspace", "replacement": str(old)}:
                    fields["replacements"] += ((old, " "),)
                    fields["strips_leading_space"] = step.get("prepend_scheme", "always") != "never"
                case _:
                    raise ModelFormatError(
                        f"the tokenizer's decoder {json.dumps(step)} is not supported; known: ByteLevel, Metaspace, "
                        "and a Sequence of Replace, ByteFallback, Fuse, Strip of one leading space",
                        path=path,
                    )
        if not steps:
            raise ModelFormatError("tokenizer.json has no decoder, so tokens cannot be turned into text", path=path)
        return cls(**fields)

    def piece_bytes(self, piece: str) -> bytes:
        if self.byte_fallback and (byte := fallback_byte(piece)) is not None:
            return bytes((byte,))
        for old, new in self.replacements:
            piece = piece.replace(old, new)
        return byte_level_bytes(piece) if self.byte_level else piece.encode()


class RustCodec:
    """A `tokenizers.Tokenizer` and the spelling of its pieces.

    raw_ids: added tokens, whose text is their bytes already. pieces: spelling that differs from the Rust side's, by id.
    """

    has_text = True

    def __init__(
        self,
        rust: Any,
        decoder: PieceDecoder,
        *,
        vocab_size: int,
        raw_ids: frozenset[int] = frozenset(),
        pieces: Mapping[int, str] | None = None,
    ) -> None:
        from tokenizers import AddedToken

        self._decoder = decoder
        self._raw_ids = raw_ids
        self._pieces = pieces or {}
        self._rust = rust
        self.strips_leading_space = decoder.strips_leading_space
        self.vocab_size = vocab_size
        rust.encode_special_tokens = True  # special tokens inside a text are text
        # Some normalizers and pre-tokenizers add a space at the very start of the input only. A token that no text
        # can name (its name is random) stands in for whatever came before. Where ids have gaps it would get the id of
        # another token, so there it is left out.
        self._sentinel = ""
        if rust.get_vocab_size(with_added_tokens=True) == vocab_size:
            self._sentinel = "".join(chr(0xF0000 + byte) for byte in secrets.token_bytes(12))
            rust.add_tokens([AddedToken(self._sentinel, normalized=False, special=False)])

    def encode(self, text: str, *, continues: bool) -> list[int]:
        if continues and self._sentinel:
            ids: list[int] = self._rust.encode(self._sentinel + text, add_special_tokens=False).ids
            return ids[1:]
        ids = self._rust.encode(text, add_special_tokens=False).ids
        return ids

    def piece(self, token_id: int) -> str:
        piece = self._pieces.get(token_id)
        if piece is None:
            piece = self._rust.id_to_token(token_id)
        if piece is None:  # a hole in the vocabulary
            raise RequestError(f"token id {token_id} is not in the vocabulary")
        return str(piece)

    def piece_bytes(self, token_id: int) -> bytes:
        if token_id not in self._pieces and self._rust.id_to_token(token_id) is None:
            return b""
        piece = self.piece(token_id)
        if self._decoder.byte_level and token_id in self._raw_ids:
            return piece.encode("utf-8", "surrogateescape")
        return self._decoder.piece_bytes(piece)

    def id_of(self, piece: str) -> int | None:
        if piece in self._renamed:
            return self._renamed[piece]
        token_id = self._rust.token_to_id(piece)
        return None if token_id is None or token_id >= self.vocab_size or token_id in self._pieces else int(token_id)

    @cached_property
    def _renamed(self) -> dict[str, int]:
        return {piece: token_id for token_id, piece in self._pieces.items()}
