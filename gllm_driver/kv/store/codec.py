"""Entries to bytes and back. Decoding trusts nothing: sizes, dims, key and tokens must be the expected ones first."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace

import numpy as np

from ...errors import RequestError, StoreError
from .base import KvEntry
from .checksum import tree_digest
from .compress import compress, decompress, require
from .header import COMPRESSIONS, MAX_PAYLOAD_NBYTES, Header, check_key, header_nbytes, parse_header
from .keys import KvChunkKey
from .quantize import QUANTIZATIONS, dequantize, packed_nbytes, quantize


@dataclass(frozen=True)
class Codec:
    """How bodies are packed: quantized (lossy), compressed, both or neither.

    A reader takes any compression, but only its own quantization or none: lossy KV is never a surprise.
    """

    quantization: str = "none"
    compression: str = "none"

    @classmethod
    def of(cls, text: str, *, deterministic: bool = False) -> Codec:
        """none, zstd, lz4, int8, int4, or a quantization and a compression: int8+zstd.

        Raises RequestError for anything else, for a compression whose package is not installed, and for a lossy one
        in deterministic mode.
        """
        codec = cls()
        for part in text.split("+"):
            if part in QUANTIZATIONS and part != "none" and codec.quantization == "none":
                codec = replace(codec, quantization=part)
            elif part in COMPRESSIONS and part != "none" and codec.compression == "none":
                codec = replace(codec, compression=part)
            elif text != "none":
                known = ", ".join((*COMPRESSIONS, *QUANTIZATIONS[1:], "int8+zstd …"))
                raise RequestError(f"KV codec {text!r} is not known: use one of {known}")
        if deterministic and codec.is_lossy:
            raise RequestError(
                f"KV codec {text!r} changes numbers and contradicts deterministic mode: use none, zstd or lz4"
            )
        require(codec.compression)
        return codec

    def __str__(self) -> str:
        return "+".join(part for part in (self.quantization, self.compression) if part != "none") or "none"

    @property
    def is_lossy(self) -> bool:
        return self.quantization != "none"

    def max_nbytes(self, key: KvChunkKey) -> int:
        """The most bytes an entry of this key may have, header and body."""
        return header_nbytes(key.num_tokens) + key.payload_nbytes

    def encode(self, entry: KvEntry) -> tuple[bytes, memoryview]:
        """Header and body, to be written one after the other. Raises StoreError (oversize)."""
        if entry.nbytes > MAX_PAYLOAD_NBYTES:
            raise StoreError("oversize", f"a chunk of {entry.nbytes} bytes, the format ends at {MAX_PAYLOAD_NBYTES}")
        body: np.ndarray | None = None
        quantization, compression = self.quantization, "none"
        if self.is_lossy and packed_nbytes(quantization, entry.key.root.layout, entry.key.num_pages) < entry.nbytes:
            body = quantize(entry, quantization)
        if body is None:
            body, quantization = entry.data.reshape(-1), "none"
        packed = body.nbytes
        if self.compression != "none":
            smaller = compress(body, self.compression, _width(entry.key, quantization))
            if smaller is not None:
                body, compression = smaller, self.compression
        created = entry.created or time.time()
        header = Header(entry.key, quantization, compression, packed, body.nbytes, created, tree_digest(body.data))
        return header.pack(), body.data

    def decode(self, data: bytes | memoryview, expected: KvChunkKey, *, verify: bool = True) -> KvEntry:
        """The entry of `expected`. Raises StoreError, whose reason says what is wrong, and nothing else.

        A body that is neither quantized nor compressed is not copied: `data` must never change afterwards.
        verify: check the body's checksum; without, only what the header says is checked.
        """
        view = memoryview(data).cast("B").toreadonly()
        header = parse_header(view)
        check_key(header, expected)
        if len(view) != header.total_nbytes:
            raise StoreError("truncated", f"{len(view)} bytes of an entry of {header.total_nbytes}")
        if header.quantization not in ("none", self.quantization):
            raise StoreError("quantization", f"quantized to {header.quantization}, wanted {self.quantization}")
        body = view[header.nbytes :]
        if verify and tree_digest(body) != header.checksum:
            raise StoreError("checksum", "the body changed since it was written")
        if header.compression != "none":
            width = _width(header.key, header.quantization)
            unpacked = decompress(body, header.compression, header.packed_nbytes, width)
        else:
            unpacked = np.frombuffer(body, np.uint8)
        if header.quantization != "none":
            unpacked = dequantize(unpacked, expected, header.quantization)
        pages = unpacked.reshape(expected.num_pages, expected.root.layout.page_nbytes)
        pages.setflags(write=False)
        return KvEntry(expected, pages, header.created, sealed=True)


def check_entry(data: bytes | memoryview) -> Header:
    """The header of an entry whose checksums are right, whatever key it is of. Raises StoreError."""
    view = memoryview(data).cast("B").toreadonly()
    header = parse_header(view)
    if len(view) != header.total_nbytes:
        raise StoreError("truncated", f"{len(view)} bytes of an entry of {header.total_nbytes}")
    if tree_digest(view[header.nbytes :]) != header.checksum:
        raise StoreError("checksum", "the body changed since it was written")
    return header


def _width(key: KvChunkKey, quantization: str) -> int:
    """Bytes of the numbers in a body, whose first, second … bytes are compressed apart."""
    return key.root.layout.itemsize if quantization == "none" else 1
