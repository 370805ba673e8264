"""What the test cases of the ops are made with: fixed random numbers, and paged KV caches whose unused part is NaN."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


def rng(*key: object) -> np.random.Generator:
    """A generator that depends on `key` alone, on every machine."""
    return np.random.Generator(np.random.PCG64(zlib.crc32(repr(key).encode())))


def normal(generator: np.random.Generator, *shape: int, scale: float = 1.0) -> np.ndarray:
    """f32 values of the given standard deviation."""
    return (generator.standard_normal(shape) * scale).astype(np.float32)


@dataclass(frozen=True)
class Chunk:
    """New tokens of one sequence: `length` of them, after `context` tokens that are cached already."""

    length: int
    context: int = 0

    @property
    def total(self) -> int:
        return self.context + self.length


@dataclass(frozen=True)
class Paged:
    """A paged cache and the step that uses it."""

    kv: np.ndarray  # [NP, L, 2, HK, P, Dh] f32
    page_table: np.ndarray  # [S, MP] i32
    positions: np.ndarray  # [T] i64
    seq: np.ndarray  # [T] i32
    offsets: np.ndarray  # [S + 1] i32


def paged(
    generator: np.random.Generator,
    chunks: Sequence[Chunk],
    *,
    page_size: int,
    kv_heads: int,
    head_dim: int,
    num_layers: int = 1,
    layer: int = 0,
    cached: bool = True,
    scale: float = 1.0,
) -> Paged:
    """Pages in scrambled order, with spare ones between them.

    Only what the chunks may read is filled: the slots of `layer` below each sequence's length (below its context when
    `cached` is false, for an op that writes the rest). All else is NaN, as memory never written may be, and the table's
    unused entries point at a page of NaN.
    """
    needed = [-(-c.total // page_size) for c in chunks]
    num_pages = sum(needed) + 3
    pages = generator.permutation(num_pages)
    spare, pages = pages[0], pages[1:]
    page_table = np.full((len(chunks), max(needed) + 1), spare, np.int32)
    kv = np.full((num_pages, num_layers, 2, kv_heads, page_size, head_dim), np.nan, np.float32)
    start = 0
    for s, (chunk, n) in enumerate(zip(chunks, needed, strict=True)):
        page_table[s, :n] = pages[start : start + n]
        start += n
        filled = chunk.total if cached else chunk.context
        for p in range(filled):
            slot = normal(generator, 2, kv_heads, head_dim, scale=scale)
            kv[page_table[s, p // page_size], layer, :, :, p % page_size] = slot
    lengths = [c.length for c in chunks]
    return Paged(
        kv,
        page_table,
        np.concatenate([np.arange(c.context, c.total) for c in chunks]).astype(np.int64),
        np.repeat(np.arange(len(chunks)), lengths).astype(np.int32),
        np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32),
    )
