"""What a quantization cost: bits and error of each tensor, and in all."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import asdict, dataclass
from math import prod, sqrt
from typing import Any

from ..types import DType
from .plan import Output


@dataclass(frozen=True)
class Row:
    """One matrix. relative_error: root mean square of what was lost over that of the weights."""

    name: str
    type: str
    shape: tuple[int, ...]
    method: str
    bits_per_weight: float
    relative_error: float
    reason: str

    @property
    def num_weights(self) -> int:
        return prod(self.shape)


def row(output: Output, dtype: DType, method: str, squared_error: float, squares: float) -> Row:
    bits = 8 * dtype.row_nbytes(output.shape[-1]) / output.shape[-1]
    error = sqrt(squared_error / squares) if squares else 0.0
    return Row(output.name, dtype.name, output.shape, method, bits, error, output.reason)


@dataclass(frozen=True)
class Report:
    """nbytes: of all files. bits_per_weight: of everything the model has, vectors included."""

    path: str
    nbytes: int
    num_weights: int
    bits_per_weight: float
    rows: tuple[Row, ...]

    def as_object(self) -> dict[str, Any]:
        """What --json prints (docs/cli.md)."""
        return {**{k: v for k, v in asdict(self).items() if k != "rows"}, "tensors": [asdict(r) for r in self.rows]}

    def lines(self) -> list[str]:
        """A table: a line for the matrices of each kind (their layer numbers left out) and type, and the whole."""
        kinds: dict[tuple[str, str, str, str], list[Row]] = defaultdict(list)
        for each in self.rows:
            kinds[_kind(each.name), each.type, each.method, each.reason].append(each)
        table = [("tensors", "type", "method", "count", "bits/weight", "relative error", "")]
        for (kind, type_name, method, reason), rows in kinds.items():
            weights = sum(r.num_weights for r in rows)
            bits = sum(r.bits_per_weight * r.num_weights for r in rows) / weights
            error = sqrt(sum(r.relative_error**2 * r.num_weights for r in rows) / weights)
            table.append((kind, type_name, method, str(len(rows)), f"{bits:.3f}", f"{error:.4f}", reason))
        widths = [max(len(line[column]) for line in table) for column in range(len(table[0]))]
        lines = [
            "  ".join(f"{cell:<{width}}" for cell, width in zip(line, widths, strict=True)).rstrip() for line in table
        ]
        size = f"{self.num_weights:,} weights, {self.nbytes:,} bytes, {self.bits_per_weight:.3f} bits per weight"
        total = f"{self.path}: {size}"
        return [*lines, total]


def _kind(name: str) -> str:
    return ".".join("*" if part.isdigit() else part for part in name.split("."))
