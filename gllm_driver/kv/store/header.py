"""The head of a stored entry: what it is the KV of, and how its body is packed (docs/kv-store.md has the table).

Everything read here was written by someone else. Nothing is allocated by a number from it before the number was
compared with what the reader expects.
"""

from __future__ import annotations

import hashlib
import struct
from dataclasses import dataclass

from ...errors import StoreError
from .keys import DIGEST_NBYTES, KvChunkKey, KvLayout, KvRoot, chain
from .quantize import QUANTIZATIONS, packed_nbytes

MAGIC = b"\x89GLKV\r\n\x1a"
VERSION = 1
ALIGNMENT = 64  # of the body, from the start of the entry
MAX_TOKENS = 1 << 16  # of a chunk
MAX_PAYLOAD_NBYTES = 1 << 30  # of a chunk, unpacked

DTYPE_CODES = {"f32": 0, "f16": 1, "bf16": 2}  # as in types.py
COMPRESSIONS = ("none", "zstd", "lz4")
_LAYOUT_CODE = 1  # [pages, layers, 2, kv_heads, page_size, head_dim]

# magic, version, header_nbytes, dtype, layout, quantization, compression, pages, layers, kv_heads, page_size, head_dim,
# tokens, position, payload_nbytes, packed_nbytes, stored_nbytes, created, zero; then digests: model, root, parent, key,
# body checksum. Behind them the header's own SHA-256, the token ids, and zeros up to the alignment.
_FIXED = struct.Struct("<8s I I 4B 6I Q Q Q Q d 16s 32s 32s 32s 32s 32s")
_CHECKSUM_AT = _FIXED.size
PREFIX_NBYTES = _CHECKSUM_AT + DIGEST_NBYTES  # what precedes the token ids
MAX_HEADER_NBYTES = -(-(PREFIX_NBYTES + 8 * MAX_TOKENS) // ALIGNMENT) * ALIGNMENT


def header_nbytes_of(data: bytes | memoryview) -> int:
    """How long the header that begins like this is, by its own account."""
    return int(struct.unpack_from("<I", data, 12)[0])


def header_nbytes(num_tokens: int) -> int:
    return -(-(PREFIX_NBYTES + 8 * num_tokens) // ALIGNMENT) * ALIGNMENT


@dataclass(frozen=True)
class Header:
    """One entry's header. Sizes in bytes: payload as pages, packed after quantization, stored after compression."""

    key: KvChunkKey
    quantization: str
    compression: str
    packed_nbytes: int
    stored_nbytes: int
    created: float
    checksum: bytes  # tree_digest of the stored body

    @property
    def nbytes(self) -> int:
        return header_nbytes(self.key.num_tokens)

    @property
    def total_nbytes(self) -> int:
        """Header and body."""
        return self.nbytes + self.stored_nbytes

    @property
    def codec(self) -> str:
        """As in a store's options: none, zstd, int8+lz4 …"""
        return "+".join(part for part in (self.quantization, self.compression) if part != "none") or "none"

    def pack(self) -> bytes:
        key, layout = self.key, self.key.root.layout
        fixed = _FIXED.pack(
            MAGIC,
            VERSION,
            self.nbytes,
            DTYPE_CODES[layout.dtype],
            _LAYOUT_CODE,
            QUANTIZATIONS.index(self.quantization),
            COMPRESSIONS.index(self.compression),
            key.num_pages,
            layout.num_layers,
            layout.num_kv_heads,
            layout.page_size,
            layout.head_dim,
            key.num_tokens,
            key.position,
            key.payload_nbytes,
            self.packed_nbytes,
            self.stored_nbytes,
            self.created,
            bytes(16),
            key.root.model,
            key.root.digest,
            key.parent,
            key.digest,
            self.checksum,
        )
        return b"".join((fixed, _own_checksum(fixed, key.token_ids), key.token_ids)).ljust(self.nbytes, b"\0")


def parse_header(data: memoryview) -> Header:
    """The header at the start of `data`, consistent in itself: sizes fit dims, the key is that of its tokens.

    Raises StoreError.
    """
    if len(data) < PREFIX_NBYTES:
        raise StoreError("truncated", f"{len(data)} bytes are no entry")
    (
        magic,
        version,
        nbytes,
        *codes,
        pages,
        layers,
        kv_heads,
        page_size,
        head_dim,
        num_tokens,
        position,
        payload,
        packed,
        stored,
        created,
        zero,
        model,
        root,
        parent,
        digest,
        checksum,
    ) = _FIXED.unpack_from(data)
    if magic != MAGIC:
        raise StoreError("magic", f"starts with {bytes(magic)!r}")
    if version != VERSION:
        raise StoreError("version", f"is of version {version}, this program reads {VERSION}")
    if not 0 < num_tokens <= MAX_TOKENS or nbytes != header_nbytes(num_tokens):
        raise StoreError("header", f"says {num_tokens} tokens in a header of {nbytes} bytes")
    if len(data) < nbytes:
        raise StoreError("truncated", f"{len(data)} bytes of a header of {nbytes}")
    token_ids = bytes(data[PREFIX_NBYTES : PREFIX_NBYTES + 8 * num_tokens])
    if bytes(data[_CHECKSUM_AT:PREFIX_NBYTES]) != _own_checksum(bytes(data[:_CHECKSUM_AT]), token_ids):
        raise StoreError("checksum", "the header is damaged")
    # From here on the header is as it was written; whether by this program is another question.
    dtype_code, layout_code, quantization, compression = codes
    dtypes = {code: name for name, code in DTYPE_CODES.items()}
    if (
        dtype_code not in dtypes
        or layout_code != _LAYOUT_CODE
        or quantization >= len(QUANTIZATIONS)
        or compression >= len(COMPRESSIONS)
        or zero != bytes(16)
        or any(data[PREFIX_NBYTES + 8 * num_tokens : nbytes])
    ):
        raise StoreError("header", f"codes {codes} are not of this version")
    if not (layers and kv_heads and page_size and head_dim) or pages * page_size != num_tokens or position >= 2**62:
        raise StoreError("header", f"{pages} pages of {page_size} tokens cannot hold {num_tokens}")
    layout = KvLayout(dtypes[dtype_code], layers, kv_heads, page_size, head_dim)
    if payload != pages * layout.page_nbytes or payload > MAX_PAYLOAD_NBYTES:
        raise StoreError("header", f"a payload of {payload} bytes for {pages} pages of {layout.page_nbytes}")
    is_whole = stored == packed if compression == 0 else 0 < stored < packed
    if packed != packed_nbytes(QUANTIZATIONS[quantization], layout, pages) or not is_whole:
        raise StoreError("header", f"a body of {stored} bytes, {packed} unpacked, for a payload of {payload}")
    if not 0 <= created < 2**40:  # NaN too
        raise StoreError("header", f"written at {created}")
    if digest != chain(parent, position, token_ids):
        raise StoreError("key", "the key is not that of its tokens")
    key = KvChunkKey(KvRoot(model, root, layout), parent, position, token_ids, digest)
    return Header(key, QUANTIZATIONS[quantization], COMPRESSIONS[compression], packed, stored, created, checksum)


def check_key(header: Header, expected: KvChunkKey) -> None:
    """Raise StoreError unless the header is that of the expected key, token by token."""
    key = header.key
    if key.root.digest != expected.root.digest or key.root.model != expected.root.model:
        raise StoreError("model", "KV of another model, dtype or context")
    if key.root.layout != expected.root.layout or key.num_pages != expected.num_pages:
        raise StoreError("dims", f"KV of {key.shape} {key.root.layout.dtype}, wanted {expected.shape}")
    if key.digest != expected.digest or key.parent != expected.parent or key.position != expected.position:
        raise StoreError("key", "the entry of another key")
    if key.token_ids != expected.token_ids:
        raise StoreError("tokens", "the KV of other tokens")


def _own_checksum(fixed: bytes, token_ids: bytes) -> bytes:
    return hashlib.sha256(fixed + token_ids).digest()
