"""How AWQ, GPTQ, compressed-tensors and LLM.int8() store a matrix, each as a `Layout` and its rows of quants.

Sources: the checkpoint descriptions of AutoAWQ, AutoGPTQ / GPTQModel, compressed-tensors and bitsandbytes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from .arrays import Parts, array, unpacked
from .grouped import Layout

Rows = Callable[[int, int], np.ndarray]  # (first, end) → u8 [end − first, K]
_WORDS = ("I32",)
# The column of eight that nibble p of a word belongs to, and the other way round.
_AWQ_PLACES = np.argsort([0, 2, 4, 6, 1, 3, 5, 7])


def _count(parts: Parts, value: int, divisor: int, what: str) -> int:
    if value % divisor:
        raise parts.fail(f"has {value} {what}, which is no multiple of {divisor}")
    return value // divisor


@dataclass(frozen=True)
class Awq:
    """4 bits: qweight i32 [K, N / 8], qzeros i32 [G, N / 8], scales [G, N], nibbles in the order 0 2 4 6 1 3 5 7."""

    group_size: int  # −1 in the file: the whole row, here 0
    part = "qweight"

    def read(self, parts: Parts) -> tuple[Layout, Rows]:
        K, words = self._axes(parts)
        N = 8 * words
        G = _count(parts, K, self.group_size or K, "rows")
        weight = parts.get("qweight", (K, words), _WORDS)
        zeros = self._columns(parts.get("qzeros", (G, words), _WORDS))
        scales = parts.scales("scales", (G, N))

        def rows(first: int, end: int) -> np.ndarray:
            return self._columns(weight[:, first // 8 : -(-end // 8)])[:, first % 8 :][:, : end - first].T

        return Layout((N, K), 4, np.ascontiguousarray(scales.T), np.ascontiguousarray(zeros.T).astype(np.int32)), rows

    @staticmethod
    def _columns(words: np.ndarray) -> np.ndarray:
        nibbles = unpacked(words, 4).reshape(len(words), -1, 8)
        return nibbles[:, :, _AWQ_PLACES].reshape(len(words), -1)

    @staticmethod
    def _axes(parts: Parts) -> tuple[int, int]:
        shape = parts.shape("qweight")
        if len(shape) != 2 or not all(shape):
            raise parts.fail(f"has shape {list(shape)}, expected two axes", "qweight")
        return shape


@dataclass(frozen=True)
class Gptq:
    """2, 3, 4 or 8 bits: qweight i32 [K · bits / 32, N], qzeros i32 [G, N · bits / 32], scales [G, N], g_idx i32 [K].

    zero_offset: what a stored zero point lacks, 1 in the first version of the format. needs_order: columns were
    quantized in another order than they lie, so g_idx must be there.
    """

    bits: int
    group_size: int
    zero_offset: int
    needs_order: bool
    part = "qweight"

    def read(self, parts: Parts) -> tuple[Layout, Rows]:
        words, N = Awq._axes(parts)
        K = _count(parts, words * 32, self.bits, "bits a column")
        G = -(-K // (self.group_size or K))
        weight = parts.get("qweight", (words, N), _WORDS)
        zero_words = _count(parts, N * self.bits, 32, "bits of zero points")
        zeros = unpacked(parts.get("qzeros", (G, zero_words), _WORDS), self.bits).astype(np.int32) + self.zero_offset
        scales = parts.scales("scales", (G, N))
        groups = self._groups(parts, K, G)
        layout = Layout((N, K), self.bits, np.ascontiguousarray(scales.T), np.ascontiguousarray(zeros.T), groups)
        return layout, lambda first, end: unpacked(weight[:, first:end].T, self.bits)

    def _groups(self, parts: Parts, K: int, G: int) -> np.ndarray | None:
        """The group of each column, None where they are plain runs."""
        runs = np.arange(K) // (self.group_size or K)
        if "g_idx" not in parts.tensors:
            if self.needs_order:
                raise parts.fail("is missing; desc_act says that columns are permuted, so it is needed", "g_idx")
            return None if K % G == 0 else runs
        groups = parts.get("g_idx", (K,), _WORDS)
        if groups.min() < 0 or groups.max() >= G:
            raise parts.fail(f"names group {groups.max()} (or a negative one), there are {G}", "g_idx")
        return None if np.array_equal(groups, runs) and K % G == 0 else groups


@dataclass(frozen=True)
class PackQuantized:
    """compressed-tensors "pack-quantized": weight_packed i32 [N, K · bits / 32], weight_scale [N, G], weight_shape,
    weight_zero_point i32 [N · bits / 32, G] packed along N; quants and zero points are offset to be unsigned."""

    bits: int
    group_size: int
    symmetric: bool
    needs_order: bool
    part = "weight_packed"

    def read(self, parts: Parts) -> tuple[Layout, Rows]:
        shape = parts.get("weight_shape", (2,), ("I64", "I32"))
        N, K = (int(n) for n in shape)
        if N < 1 or K < 1:
            raise parts.fail(f"says the shape [{N}, {K}]", "weight_shape")
        weight = parts.get("weight_packed", (N, -(-K * self.bits // 32)), _WORDS)
        G = _count(parts, K, self.group_size or K, "columns")
        scales = parts.scales("weight_scale", (N, G))
        zeros = None
        if not self.symmetric:
            packed = parts.get("weight_zero_point", (-(-N * self.bits // 32), G), _WORDS)
            zeros = unpacked(packed.T, self.bits).T[:N].astype(np.int32)
        groups = None
        if "weight_g_idx" in parts.tensors:
            groups = parts.get("weight_g_idx", (K,), _WORDS)
            if groups.min() < 0 or groups.max() >= G:
                raise parts.fail(f"names group {groups.max()} (or a negative one), there are {G}", "weight_g_idx")
            if np.array_equal(groups, np.arange(K) // (K // G)):
                groups = None
        elif self.needs_order:
            raise parts.fail("is missing; actorder says that columns are permuted, so it is needed", "weight_g_idx")
        layout = Layout((N, K), self.bits, scales, zeros, groups)
        return layout, lambda first, end: unpacked(weight[first:end], self.bits)[:, :K]


@dataclass(frozen=True)
class Int8:
    """8 bits a byte: weight i8 [N, K] and scales per row (or group): compressed-tensors "int-quantized", whose scales
    are [N, G], and bitsandbytes' LLM.int8(), whose SCB [N] is 127 times the scale."""

    scale_part: str
    group_size: int = 0
    symmetric: bool = True
    part = "weight"

    def read(self, parts: Parts) -> tuple[Layout, Rows]:
        N, K = self._axes(parts)
        weight = parts.get("weight", (N, K), ("I8",))
        if self.scale_part == "SCB":
            scales = parts.scales("SCB", (N,))[:, None] / np.float32(127)
        else:
            scales = parts.scales(self.scale_part, (N, _count(parts, K, self.group_size or K, "columns")))
        zeros = None
        if not self.symmetric:
            zeros = parts.get("weight_zero_point", scales.shape, ("I8",)).astype(np.int32) + 128
        return Layout((N, K), 8, scales, zeros), lambda first, end: weight[first:end].view(np.uint8) ^ np.uint8(128)

    @staticmethod
    def _axes(parts: Parts) -> tuple[int, int]:
        shape = parts.shape("weight")
        if len(shape) != 2 or not all(shape):
            raise parts.fail(f"has shape {list(shape)}, expected two axes", "weight")
        return shape


Scheme = Awq | Gptq | PackQuantized | Int8
__all__ = ["Awq", "Gptq", "Int8", "PackQuantized", "Rows", "Scheme", "array"]
