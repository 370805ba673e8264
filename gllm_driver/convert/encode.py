"""Rows of a matrix as blocks of a type, by one of the methods that look at the weights, and at most at what an error in
each column costs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ..errors import RequestError
from ..quant.formats import FORMATS
from ..quant.grid import GRIDS
from ..quant.hqq import half_quadratic
from ..types import DType, Tensor

METHODS = ("rtn", "search", "hqq", "gptq")


@dataclass(frozen=True)
class Encoded:
    """Rows as they are stored, u8 [N, row_nbytes], with what was lost: sums of squared errors and of squares."""

    dtype: DType
    data: np.ndarray
    squared_error: float
    squares: float

    def values(self, rows: np.ndarray | slice = slice(None)) -> np.ndarray:
        """f32 [N, K] of the rows."""
        return decoded(self.dtype, self.data[rows])


def decoded(dtype: DType, data: np.ndarray) -> np.ndarray:
    """Stored rows u8 [N, row_nbytes] → f32 [N, K]."""
    if dtype.is_quantized:
        return FORMATS[dtype.name].dequantize(data, (len(data), data.shape[1] // dtype.block_nbytes * dtype.block_size))
    if dtype.name == "bf16":
        return (data.view("<u2").astype(np.uint32) << 16).view(np.float32)
    return data.view("<f2" if dtype.name == "f16" else "<f4").astype(np.float32)


def source_rows(tensor: Tensor, first: int, end: int) -> np.ndarray:
    """f32 [end − first, K] of a stored matrix or, of a vector, [1, N]. ValueError for NaN and infinities."""
    stored = tensor.to_numpy()
    rows = stored.reshape(1, -1) if len(tensor.shape) == 1 else stored[first:end]
    data = np.ascontiguousarray(rows).view(np.uint8)
    values = decoded(tensor.dtype, data.reshape(len(rows), -1))
    if not np.isfinite(values).all():
        row = first + int(np.argmin(np.isfinite(values).all(axis=1)))
        raise ValueError(f"holds NaN or infinite values, the first in row {row}")
    return values


def check_method(method: str, dtypes: Sequence[DType]) -> None:
    """RequestError when none of these types can be rounded by the method."""
    kinds = {dtype.name for dtype in dtypes if dtype.is_quantized}
    able = {name for name in kinds if name in GRIDS and (method != "hqq" or GRIDS[name].bits < 8)}
    if method in ("hqq", "gptq") and not able:
        raise RequestError(
            f"{method} chooses scales for int4, int2, int1 and ggml's older types; it cannot for "
            f"{', '.join(sorted(kinds)) or 'floats'}: use --method search"
        )


def encode(dtype: DType, method: str, rows: np.ndarray, importance: np.ndarray | None = None) -> Encoded:
    """f32 [N, K] → blocks. importance f32 [K]: what a squared error costs in each column. Types a method has nothing to
    choose for are encoded by their format's own rule. ValueError where a value is beyond the type."""
    return measured(dtype, _data(dtype, method, rows, importance), rows)


def measured(dtype: DType, data: np.ndarray, rows: np.ndarray) -> Encoded:
    """Stored rows with their errors against f32 [N, K]. ValueError where they cannot hold the values."""
    with np.errstate(invalid="ignore", over="ignore"):
        off = decoded(dtype, data) - rows
    error = float(np.vdot(off, off))
    if not np.isfinite(error):
        raise ValueError(f"holds values up to {np.abs(rows).max():.3g}, beyond what {dtype.name} can hold")
    return Encoded(dtype, data, error, float(np.vdot(rows, rows)))


def _data(dtype: DType, method: str, rows: np.ndarray, importance: np.ndarray | None) -> np.ndarray:
    if not dtype.is_quantized:
        return float_bytes(dtype, rows)
    grid = GRIDS.get(dtype.name)
    by_rule = grid is None or method == "rtn" or (grid.bits == 8 and importance is None)
    if grid is None or by_rule:
        return FORMATS[dtype.name].quantize(rows, importance)
    x = rows.reshape(-1, grid.block_size)
    if method == "hqq":
        s, m = half_quadratic(grid, x)
    else:
        weight = None if importance is None else np.broadcast_to(importance, rows.shape).reshape(x.shape)
        s, m = grid.search(x, weight)
    return grid.pack(grid.round(x, s, m), s, m).reshape(len(rows), -1)


def float_bytes(dtype: DType, rows: np.ndarray) -> np.ndarray:
    """f32 [N, K] → u8 [N, row_nbytes] of a float type."""
    if dtype.name == "bf16":
        import ml_dtypes

        return rows.astype(ml_dtypes.bfloat16).view(np.uint8).reshape(len(rows), -1)
    with np.errstate(over="ignore"):
        return rows.astype("<f2" if dtype.name == "f16" else "<f4").view(np.uint8).reshape(len(rows), -1)
