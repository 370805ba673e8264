"""Stored weights that a backend does not compute, as the nearest type that it does and that loses nothing, or little.

Integers times f16 scales go to the smallest computed format with room for the integers, exactly. All else goes to f16,
whose rounding (2^-11) is far below the step of any block format, or to bf16 where f16 would overflow.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, replace
from math import prod

import numpy as np

from ..types import BF16, DTYPES, F16, FLOAT_DTYPES, DType, Tensor
from .formats import FORMATS, NATIVE_FORMATS, Planes
from .formats.simple import Q5_0Format, Q5_1Format

PIECE_ELEMENTS = 1 << 18  # of a thread at a time, whole blocks of every format: a few MB of f32 are alive per thread

# Types whose blocks are the same bytes: no repacking, another name.
_SAME_BYTES = {"int8_32": "q8_0", "int4_32": "q4_0", "int4_32m": "q4_1"}
_SAME_BYTES |= {new: old for old, new in _SAME_BYTES.items()}


@dataclass(frozen=True)
class _IntegerTarget:
    """A format of 32 elements that other formats' integers and f16 scales can move to unchanged."""

    low: int
    high: int
    has_minimums: bool
    pack: Callable[..., np.ndarray]  # (quants [N, 32], scales [N, 1], minimums [N, 1] if it has those)
    shift: int  # stored quant − integer


_TARGETS = {  # the smallest first
    "q4_0": _IntegerTarget(-8, 7, False, NATIVE_FORMATS["int4_32"].pack, 8),
    "q5_0": _IntegerTarget(-16, 15, False, Q5_0Format().pack, 16),
    "q8_0": _IntegerTarget(-128, 127, False, NATIVE_FORMATS["int8_32"].pack, 0),
    "q4_1": _IntegerTarget(0, 15, True, NATIVE_FORMATS["int4_32m"].pack, 0),
    "q5_1": _IntegerTarget(0, 31, True, Q5_1Format().pack, 0),
    "int8_32m": _IntegerTarget(0, 255, True, NATIVE_FORMATS["int8_32m"].pack, 0),
}


class BadWeights(ValueError):  # noqa: N818 - what was found, for the loader to report with path and name
    """A block has a scale that is NaN or infinite; `element` is its first element."""

    def __init__(self, element: int) -> None:
        super().__init__(f"NaN or infinite value at element {element}")
        self.element = element


def repacked_dtype(source: DType, computed: Collection[str], dtype: str = "auto") -> DType:
    """What a matrix of type `source` becomes for a backend that computes `computed`, going by the type alone.

    dtype: the float type asked for, or auto. A tensor's values may need another one (`repack` looks at them): zero
    points that are no integers, values beyond f16.
    """
    if source.name in computed or source.name in FLOAT_DTYPES:
        return source
    if _SAME_BYTES.get(source.name) in computed:
        return DTYPES[_SAME_BYTES[source.name]]
    return _integer_target(source, computed, FORMATS[source.name].quant_range) or _floats(source, dtype)[0]


def repack(tensor: Tensor, computed: Collection[str], dtype: str = "auto", workers: int | None = None) -> Tensor:
    """The host tensor in a type of `computed`: itself if it has one, else a copy made in pieces by `workers` threads.

    Raises BadWeights for a NaN or infinite scale.
    """
    source = tensor.dtype
    wanted = repacked_dtype(source, computed, dtype)
    if wanted is source:
        return tensor
    if _SAME_BYTES.get(source.name) == wanted.name:
        return replace(tensor, dtype=wanted)
    with ThreadPoolExecutor(workers or os.cpu_count() or 1) as pool:
        ranges = list(pool.map(lambda piece: _range_of(source, piece), _pieces(tensor)))
        known = [r for r in ranges if r is not None]
        integers = (min(r[0] for r in known), max(r[1] for r in known)) if len(known) == len(ranges) else None
        target = _integer_target(source, computed, integers)
        if target is not None:
            return _converted(tensor, target, pool)
        *first, last = _floats(source, dtype)
        for candidate in first:
            with suppress(OverflowError):
                return _converted(tensor, candidate, pool)
        return _converted(tensor, last, pool)


def convert(blocks: np.ndarray, source: DType, target: DType) -> np.ndarray:
    """Blocks u8 [N, block_nbytes] of one type as the bytes of another: an integer format that holds them, or a float.

    Raises BadWeights, and OverflowError when a value is beyond f16.
    """
    format = FORMATS[source.name]
    bad = format.first_bad_block(blocks)
    if bad >= 0:
        raise BadWeights(bad * source.block_size)
    shape = (len(blocks), source.block_size)
    if target.name in _TARGETS:
        return _packed(format.planes(blocks, shape), _TARGETS[target.name])
    values = format.dequantize(blocks, shape)
    if target.name == "f32":
        return values.view(np.uint8).reshape(-1)
    if target.name == "bf16":
        import ml_dtypes

        return values.astype(ml_dtypes.bfloat16).view(np.uint8).reshape(-1)
    with np.errstate(over="ignore"):
        halves = values.astype("<f2")
    if not np.isfinite(halves).all():
        raise OverflowError(f"values up to {np.abs(values).max():.3g} are beyond f16")
    return halves.view(np.uint8).reshape(-1)


def _floats(source: DType, dtype: str) -> tuple[DType, ...]:
    """Float types in the order they are tried."""
    if dtype in ("auto", "f16"):
        return (BF16,) if FORMATS[source.name].is_exact_in_bf16 else (F16, BF16)
    return (DTYPES[dtype],)


def _integer_target(source: DType, computed: Collection[str], integers: tuple[int, int] | None) -> DType | None:
    """The smallest computed integer format for quants in this range, if the source has one and it is there."""
    if integers is None:
        return None
    for name, target in _TARGETS.items():
        there = name in computed or _SAME_BYTES.get(name) in computed
        fits = target.low <= integers[0] and integers[1] <= target.high
        if there and fits and target.has_minimums == FORMATS[source.name].has_minimums:
            return DTYPES[name if name in computed else _SAME_BYTES[name]]
    return None


def _range_of(source: DType, piece: tuple[int, np.ndarray]) -> tuple[int, int] | None:
    start, blocks = piece
    bad = FORMATS[source.name].first_bad_block(blocks) if source.name in NATIVE_FORMATS else -1
    if bad >= 0:  # a zero point that is NaN has no range
        raise BadWeights(start + bad * source.block_size)
    return FORMATS[source.name].quant_range_of(blocks)


def _packed(planes: Planes, target: _IntegerTarget) -> np.ndarray:
    quants = planes.quants.astype(np.int16)
    block_size = quants.shape[1]
    if planes.zeros is not None:
        quants = quants - planes.zeros.astype(np.int16)
    repeats = block_size // 32 // planes.scales.shape[1]
    numbers = [np.repeat(planes.scales.reshape(-1, 1), repeats, axis=0)]
    if planes.minimums is not None:
        numbers.append(np.repeat(planes.minimums.reshape(-1, 1), repeats, axis=0))
    return target.pack((quants + np.int16(target.shift)).reshape(-1, 32), *numbers).reshape(-1)


def _pieces(tensor: Tensor) -> Iterator[tuple[int, np.ndarray]]:
    """(first element, blocks u8 [N, block_nbytes]) of at most PIECE_ELEMENTS."""
    blocks = tensor.to_numpy().reshape(-1, tensor.dtype.block_nbytes)
    step = PIECE_ELEMENTS // tensor.dtype.block_size
    for start in range(0, len(blocks), step):
        yield start * tensor.dtype.block_size, blocks[start : start + step]


def _converted(tensor: Tensor, target: DType, pool: ThreadPoolExecutor) -> Tensor:
    name = target.name if target.name in _TARGETS else _SAME_BYTES.get(target.name, target.name)
    working = DTYPES[name]
    count = prod(tensor.shape)
    out = np.empty(count // target.block_size * target.block_nbytes, np.uint8)

    def one(piece: tuple[int, np.ndarray]) -> None:
        start, blocks = piece
        try:
            data = convert(blocks, tensor.dtype, working)
        except BadWeights as error:
            raise BadWeights(start + error.element) from None
        at = start // target.block_size * target.block_nbytes
        out[at : at + data.size] = data

    for _ in pool.map(one, _pieces(tensor)):
        pass
    return Tensor(out.ctypes.data, tensor.shape, target, out)
