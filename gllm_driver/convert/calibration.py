"""The text that shows a quantizer which inputs matter: read, cut into windows, and what is learned from them."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Executor
from functools import partial
from pathlib import Path

import numpy as np

from ..errors import RequestError
from ..quant.gptq import NO_NUMBERS
from .activations import Rows

WINDOW = 512  # tokens that see each other
DEFAULT_TOKENS = 65536
MIN_TOKENS = 256
_ROWS_AT_ONCE = 4096
_COLUMNS_AT_ONCE = 128


def read_text(path: Path) -> str:
    """The text of a file. Raises RequestError when it cannot be read, is empty or is no UTF-8."""
    try:
        data = path.read_bytes()
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise RequestError(f"cannot read the calibration text {str(path)!r}: {reason}") from error
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise RequestError(f"the calibration text {str(path)!r} is no UTF-8 (at byte {error.start})") from error


def windows_of(tokens: Sequence[int], num_tokens: int, context: int, vocab_size: int) -> np.ndarray:
    """Token ids i32 [S, L]: windows spread evenly over the text, `num_tokens` in all or what there is.

    Raises RequestError for a text of fewer than MIN_TOKENS, and ids beyond the model's.
    """
    length = min(WINDOW, context, max(len(tokens), 1))
    if len(tokens) < MIN_TOKENS:
        raise RequestError(f"the calibration text has {len(tokens)} tokens; at least {MIN_TOKENS} are needed")
    ids = np.array(tokens, np.int32)
    if ids.max() >= vocab_size:
        raise RequestError(f"the calibration text has the token {ids.max()}, the model {vocab_size} embeddings")
    there = len(ids) // length
    wanted = min(there, max(1, num_tokens // length))
    starts = np.arange(wanted) * there // wanted * length
    return np.stack([ids[start : start + length] for start in starts])


def input_squares(rows: Rows, num_windows: int, pool: Executor) -> np.ndarray:
    """Σ x² of each column of the inputs, f32 [K]. ValueError when there are NaN or infinities among them."""

    def squares(window: int) -> np.ndarray:
        found: np.ndarray = np.square(rows(window), dtype=np.float64).sum(axis=0)
        return found

    total = np.asarray(sum(pool.map(squares, range(num_windows))), np.float64)
    if not (total < np.finfo(np.float32).max).all():
        raise ValueError(NO_NUMBERS)
    return total.astype(np.float32)


def input_products(rows: Rows, num_windows: int, length: int, pool: Executor) -> np.ndarray:
    """Σ x xᵀ of the inputs, f32 [K, K]."""
    K = rows(0).shape[1]
    total = np.zeros((K, K), np.float32)
    step = max(1, _ROWS_AT_ONCE // length)
    for first in range(0, num_windows, step):
        x = np.concatenate(list(pool.map(rows, range(first, min(first + step, num_windows)))))
        list(pool.map(partial(_add_products, total, x), range(0, K, _COLUMNS_AT_ONCE)))
    return total


def _add_products(total: np.ndarray, x: np.ndarray, column: int) -> None:
    part = slice(column, column + _COLUMNS_AT_ONCE)
    with np.errstate(over="ignore", invalid="ignore"):  # the sums are looked at
        total[part] += x[:, part].T @ x
