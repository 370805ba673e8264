"""Under which key a stretch of KV is stored: equal across processes, machines and backends, and never a guess.

A key is a chained SHA-256 over the tokens of a chunk and all chunks before it, rooted in what decides the bits of the
model's KV. Every field that is hashed has its length before it, so no two lists of fields hash the same bytes.
"""

from __future__ import annotations

import hashlib
import sys
from array import array
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from ...config import KvCacheConfig

CHUNK_TOKENS = 256  # tokens of a chunk: LMCache's figure; a whole number of pages
DIGEST_NBYTES = 32
NUMERICS_VERSION = 1  # goes up when a release changes the KV of the same model and tokens beyond rounding

_TOKEN_LIMIT = 2**63


def digest_fields(*fields: bytes) -> bytes:
    """SHA-256 over fields, each after its length as u64 little-endian."""
    digest = hashlib.sha256()
    for each in fields:
        digest.update(len(each).to_bytes(8, "little"))
        digest.update(each)
    return digest.digest()


@dataclass(frozen=True)
class KvLayout:
    """How a page lies in memory: [num_layers, 2, num_kv_heads, page_size, head_dim] of `dtype`, K before V."""

    dtype: str
    num_layers: int
    num_kv_heads: int
    page_size: int
    head_dim: int

    def __post_init__(self) -> None:
        KvCacheConfig(1, self.num_layers, self.num_kv_heads, self.head_dim, self.page_size, self.dtype)  # checks them

    @classmethod
    def of(cls, config: KvCacheConfig) -> KvLayout:
        return cls(config.dtype, config.num_layers, config.num_kv_heads, config.page_size, config.head_dim)

    @property
    def itemsize(self) -> int:
        return 4 if self.dtype == "f32" else 2

    @property
    def page_shape(self) -> tuple[int, int, int, int, int]:
        return (self.num_layers, 2, self.num_kv_heads, self.page_size, self.head_dim)

    @property
    def page_nbytes(self) -> int:
        return self.num_layers * 2 * self.num_kv_heads * self.page_size * self.head_dim * self.itemsize


@dataclass(frozen=True)
class KvRoot:
    """What stored KV belongs to. `model` tells weights apart (for people: `gllm kv ls`), `digest` everything."""

    model: bytes  # 32 bytes
    digest: bytes  # 32 bytes: the parent of every first chunk
    layout: KvLayout

    @classmethod
    def of(
        cls,
        layout: KvLayout,
        *,
        weights: bytes,
        weight_dtypes: Mapping[str, str],
        context: int,
        adapters: Sequence[bytes] = (),
        exact: str = "",
    ) -> KvRoot:
        """The root of one model as it is computed.

        weights: digest of the weights and the architecture, RoPE included (models/identity.py). weight_dtypes: each
        stored element type and the one it is computed with, which repacking and `dtype` may change. context: tokens the
        model was loaded for, since RoPE may depend on it. adapters: digests of what is added to the weights, in order.
        exact: empty where rounding may differ, as between backends; else a name of whatever decides the last bit
        (backend, device architecture), so that KV of another origin is never found.
        """
        fields = [
            b"gllm-driver KV root 1",
            NUMERICS_VERSION.to_bytes(8, "little"),
            weights,
            *_counted(f"{stored}>{computed}".encode() for stored, computed in sorted(weight_dtypes.items())),
            context.to_bytes(8, "little"),
            layout.dtype.encode(),
            *(n.to_bytes(8, "little") for n in layout.page_shape),
            *_counted(adapters),
            exact.encode(),
        ]
        return cls(weights if len(weights) == DIGEST_NBYTES else digest_fields(weights), digest_fields(*fields), layout)


@dataclass(frozen=True)
class KvChunkKey:
    """The KV of `token_ids` at `position`, after exactly the tokens that `parent` stands for.

    Two keys are equal only if their token ids are: comparing keys compares the tokens, not digests alone.
    """

    root: KvRoot
    parent: bytes  # digest of the chunk before; the root's for the first
    position: int  # of the first token
    token_ids: bytes  # i64 little-endian
    digest: bytes

    @classmethod
    def after(cls, root: KvRoot, previous: KvChunkKey | None, tokens: Sequence[int]) -> KvChunkKey:
        """The key of `tokens`, whole pages of them, that follow `previous`. Raises ValueError."""
        if not tokens or len(tokens) % root.layout.page_size:
            raise ValueError(
                f"a chunk is one or more pages of {root.layout.page_size} tokens, got {len(tokens)} tokens"
            )
        parent = root.digest if previous is None else previous.digest
        position = 0 if previous is None else previous.position + previous.num_tokens
        ids = pack_tokens(tokens)
        return cls(root, parent, position, ids, chain(parent, position, ids))

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids) // 8

    @property
    def num_pages(self) -> int:
        return self.num_tokens // self.root.layout.page_size

    @property
    def shape(self) -> tuple[int, int, int, int, int, int]:
        """[pages, layers, 2, kv_heads, page_size, head_dim]"""
        return (self.num_pages, *self.root.layout.page_shape)

    @property
    def payload_nbytes(self) -> int:
        return self.num_pages * self.root.layout.page_nbytes

    @property
    def tokens(self) -> tuple[int, ...]:
        return unpack_tokens(self.token_ids)

    def __repr__(self) -> str:  # token ids are what users wrote: they stay out of logs
        return f"KvChunkKey({self.digest.hex()[:12]}, {self.num_tokens} tokens at {self.position})"


def chunk_keys(
    root: KvRoot, tokens: Sequence[int], *, chunk_tokens: int = CHUNK_TOKENS, tail: bool = False
) -> list[KvChunkKey]:
    """Keys of the chunks of a prompt, in order. With `tail` the whole pages after the last full chunk have one too.

    Raises ValueError when `chunk_tokens` is no whole number of pages or a token id is outside 0 … 2**63−1.
    """
    page_size = root.layout.page_size
    if chunk_tokens < 1 or chunk_tokens % page_size:
        raise ValueError(f"a chunk must be a whole number of pages of {page_size} tokens, got {chunk_tokens} tokens")
    end = len(tokens) // (page_size if tail else chunk_tokens) * (page_size if tail else chunk_tokens)
    keys: list[KvChunkKey] = []
    for start in range(0, end, chunk_tokens):
        keys.append(KvChunkKey.after(root, keys[-1] if keys else None, tokens[start : min(start + chunk_tokens, end)]))
    return keys


def chain(parent: bytes, position: int, token_ids: bytes) -> bytes:
    """Digest of a chunk after `parent`."""
    return digest_fields(b"gllm-driver KV chunk 1", parent, position.to_bytes(8, "little"), token_ids)


def pack_tokens(tokens: Sequence[int]) -> bytes:
    """Token ids as i64 little-endian. Raises ValueError for one that is none."""
    if min(tokens) < 0 or max(tokens) >= _TOKEN_LIMIT:
        raise ValueError(f"token ids are 0 … 2**63-1, got {min(tokens)} … {max(tokens)}")
    return _little(array("q", tokens)).tobytes()


def unpack_tokens(data: bytes) -> tuple[int, ...]:
    return tuple(_little(array("q", data)))


def _little(numbers: array[int]) -> array[int]:
    if sys.byteorder == "big":
        numbers.byteswap()
    return numbers


def _counted(fields: Iterable[bytes]) -> list[bytes]:
    """Fields after their number, so that lists next to each other cannot be mistaken for one another."""
    listed = list(fields)
    return [len(listed).to_bytes(8, "little"), *listed]
