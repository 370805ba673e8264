"""Formats whose values are s · u + m, u a whole number in 0 … 2^bits − 1: what quantizers choose s, m and u for.

Our own formats are of this form, and ggml's older ones. Symmetric formats have m = −s · center, zero points m = −s · a.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from ..types import DType
from .formats import FORMATS, NATIVE_FORMATS
from .formats.base import f16_at, f16_bytes, reciprocal
from .formats.simple import Q5_0Format, Q5_1Format

CHUNK_ELEMENTS = 1 << 18  # at a time: the trial arrays stay in the cache
_TRIALS = np.linspace(0.4, 1.0, 9, dtype=np.float32)  # shares of the range between the extremes
_F16_MAX = np.float32(65_504)
_SAME_BYTES = {"q8_0": "int8_32", "q4_0": "int4_32", "q4_1": "int4_32m"}


@dataclass(frozen=True)
class Grid:
    """The values that blocks of a format can hold. Arrays of blocks are f32 [N, block_size], of s and m f32 [N, 1].

    kind: "" symmetric, "z" zero point, "m" minimum.
    """

    dtype: DType
    bits: int
    kind: str
    pack_blocks: Callable[..., np.ndarray]

    @property
    def block_size(self) -> int:
        return self.dtype.block_size

    @property
    def top(self) -> int:
        """The largest u."""
        return (1 << self.bits) - 1

    @property
    def center(self) -> float:
        """The u of value 0 in symmetric formats; of 2 bits and 1 bit it lies between two levels."""
        return 1 << (self.bits - 1) if self.bits > 2 else self.top / 2

    def stored(self, s: np.ndarray, m: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """s and m as the f16 numbers of a block give them back."""
        if self.kind == "m":
            return _f16(s), _f16(m)
        if self.kind == "z":
            s = _f16(s)
            return s, -s * _f16(np.clip(-m * reciprocal(s), -_F16_MAX, _F16_MAX))
        unit = self._unit
        s = _f16(s / unit) * unit
        return s, -s * np.float32(self.center)

    @property
    def _unit(self) -> np.float32:
        """s over the stored scale: levels of 2 bits and 1 bit are 2u − top times it."""
        return np.float32(1 if self.bits > 2 else 2)

    def round(self, x: np.ndarray, s: np.ndarray, m: np.ndarray) -> np.ndarray:
        """The nearest u, f32."""
        u: np.ndarray = np.rint((x - m) * reciprocal(s))
        return np.clip(u, 0, self.top, out=u)

    def least_squares(self, x: np.ndarray, weight: np.ndarray, u: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """s and m that fit s · u + m to x best, by the weighted squared error."""
        if not self.kind:
            u = u - np.float32(self.center)
            s = _dot(weight * x, u) * reciprocal(_dot(weight * u, u))
            return s, -s * np.float32(self.center)
        wu = weight * u
        sum_w, sum_u, sum_uu = weight.sum(axis=1, keepdims=True), wu.sum(axis=1, keepdims=True), _dot(wu, u)
        sum_x, sum_xu = _dot(weight, x), _dot(wu, x)
        determinant = sum_w * sum_uu - sum_u * sum_u
        free = determinant > 1e-6 * sum_w * sum_uu  # else all u are equal, and m alone fits
        s = np.where(free, (sum_w * sum_xu - sum_x * sum_u) * reciprocal(np.where(free, determinant, 1)), 0)
        return s, (sum_x - s * sum_u) * reciprocal(sum_w)

    def extremes(self, x: np.ndarray, share: float = 1.0, *, with_zero: bool = False) -> tuple[np.ndarray, np.ndarray]:
        """s and m that spread the levels over this share of the range of x, or of x and 0: that has a zero point
        always, where values far from 0 and close together have none that f16 holds."""
        if self.kind:
            low, high = x.min(axis=1, keepdims=True), x.max(axis=1, keepdims=True)
            if with_zero:
                low, high = np.minimum(low, 0), np.maximum(high, 0)
            margin = (high - low) * ((1 - share) / 2)
            return (high - low) * (share / self.top), low + margin
        if self.bits > 2:  # the lowest level is the far one
            largest = np.take_along_axis(x, np.abs(x).argmax(axis=1)[:, None], axis=1)
            s = largest * (share / -np.float32(self.center))
        else:
            s = np.abs(x).max(axis=1, keepdims=True) * (share / np.float32(self.center))
        return s, -s * np.float32(self.center)

    def search(self, x: np.ndarray, weight: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
        """s and m of nearly the least weighted squared error: levels over several shares of the range, each improved by
        rounding and least squares in turn, the best of all."""
        weight = np.ones((1, 1), np.float32) if weight is None else weight
        weight = np.broadcast_to(weight, x.shape)
        step = max(1, CHUNK_ELEMENTS // self.block_size)
        found = [self._search(x[i : i + step], weight[i : i + step]) for i in range(0, len(x), step)]
        return np.concatenate([s for s, _ in found]), np.concatenate([m for _, m in found])

    def _search(self, x: np.ndarray, weight: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        best: list[np.ndarray] | None = None
        if self.kind == "z":
            best = self._candidate(x, weight, *self.extremes(x, with_zero=True))
        for share in _TRIALS:
            s, m = self.extremes(x, share)
            for _ in range(2):
                s, m = self.least_squares(x, weight, self.round(x, s, m))
            found = self._candidate(x, weight, s, m)
            if best is None:
                best = found
                continue
            better = found[0] < best[0]
            best = [np.where(better, new, old) for new, old in zip(found, best, strict=True)]
        assert best is not None
        return best[1], best[2]

    def _candidate(self, x: np.ndarray, weight: np.ndarray, s: np.ndarray, m: np.ndarray) -> list[np.ndarray]:
        """[weighted squared error, s, m] as a block stores them."""
        s, m = self.stored(s, m)
        off = s * self.round(x, s, m) + m - x
        return [_dot(weight * off, off), s, m]

    def pack(self, u: np.ndarray, s: np.ndarray, m: np.ndarray) -> np.ndarray:
        """Blocks u8 [N, block_nbytes] of these u and of `stored` s and m."""
        if self.kind == "m":
            return self.pack_blocks(u, s, m)
        if self.kind == "z":
            return self.pack_blocks(u, s, -m * reciprocal(s))
        return self.pack_blocks(u - 128 if self.bits == 8 else u, s / self._unit)


def _f16(x: np.ndarray) -> np.ndarray:
    return f16_at(f16_bytes(x.reshape(-1, 1)), 0).reshape(x.shape)


def _dot(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Row by row: [N, n] · [N, n] → [N, 1]."""
    return np.einsum("ij,ij->i", a, b)[:, None]


def _grids() -> dict[str, Grid]:
    found = {name: Grid(f.dtype, f.bits, f.kind, f.pack) for name, f in NATIVE_FORMATS.items()}
    for name, native in _SAME_BYTES.items():
        same = NATIVE_FORMATS[native]
        found[name] = Grid(FORMATS[name].dtype, same.bits, same.kind, same.pack)
    found["q5_0"] = Grid(FORMATS["q5_0"].dtype, 5, "", _q5_0)
    found["q5_1"] = Grid(FORMATS["q5_1"].dtype, 5, "m", _q5_1)
    return found


def _q5_0(u: np.ndarray, s: np.ndarray) -> np.ndarray:
    return Q5_0Format().pack(u.astype(np.uint8), s.reshape(-1, 1))


def _q5_1(u: np.ndarray, s: np.ndarray, m: np.ndarray) -> np.ndarray:
    return Q5_1Format().pack(u.astype(np.uint8), s.reshape(-1, 1), m.reshape(-1, 1))


GRIDS: dict[str, Grid] = _grids()
