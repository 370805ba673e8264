"""Pooled hidden states on the CPU."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from cpu_backend.program import Program
from cpu_backend.team import Team

from ...types import F32, SequenceInput, Tensor
from ..base import KvCacheHandle, WeightsHandle
from .steps import Compiling, Steps


class CpuPooler:
    """Pooler over the backend's team and steps (gllm_driver.backends.pooling)."""

    def __init__(
        self, team: Team, steps: Steps, compiling: Compiling, weights: WeightsHandle, kv: KvCacheHandle, count: int
    ) -> None:
        self._team, self._steps, self._compiling = team, steps, compiling
        self._weights, self._kv = weights, kv
        self._sums = np.zeros((count, weights.tensors["final_norm"].shape[-1]), np.float32)

    def step(self, parts: Sequence[SequenceInput], pieces: np.ndarray) -> None:
        hidden = self._steps.run(self._weights, self._kv, parts, "hidden").hidden
        sums = Tensor.from_numpy(self._sums)
        self._run("pool_rows", {"x": hidden, "pieces": Tensor.from_numpy(pieces), "sums": sums})

    def sums(self) -> np.ndarray:
        return self._sums.copy()

    def products(self, weight: Tensor) -> np.ndarray:
        out = np.empty((len(self._sums), weight.shape[0]), np.float32)
        self._run("linear", {"x": Tensor.from_numpy(self._sums), "weight": weight, "out": Tensor.from_numpy(out)})
        return out

    def rows(self, weight: Tensor, ids: Sequence[int]) -> Tensor:
        out = np.empty((len(ids), weight.shape[-1]), np.float32)
        found = Tensor(out.ctypes.data, out.shape, F32, out)
        self._run("embedding", {"ids": Tensor.from_numpy(np.array(ids, np.int32)), "weight": weight, "out": found})
        return found

    def _run(self, op: str, arrays: dict[str, Tensor | None]) -> None:
        program = Program(self._team)
        program.add(op, arrays)
        program.finish(self._compiling).run()
