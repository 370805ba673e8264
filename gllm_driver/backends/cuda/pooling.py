"""Pooled hidden states on the device; only what is asked for comes back."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from ...types import F32, I32, SequenceInput, Tensor
from .memory import Mirror, reserve
from .runtime import Runtime

Forward = Callable[[Sequence[SequenceInput]], Tensor]


class CudaPooler:
    """Pooler of `count` sequences of a model (gllm_driver.backends.pooling).

    forward: queues the forward pass of parts of sequences and returns their final hidden states, f32 [≥ T, D].
    """

    def __init__(self, runtime: Runtime, forward: Forward, count: int, hidden_size: int) -> None:
        self._runtime, self._forward = runtime, forward
        memory = reserve(runtime.device, 4 * count * hidden_size, "pooled hidden states")
        self._sums = Tensor(memory.address, (count, hidden_size), F32, memory)
        self._inputs = Mirror(runtime.device, [("pieces", (count, 4), I32)])  # a step has one part of a sequence each

    def step(self, parts: Sequence[SequenceInput], pieces: np.ndarray) -> None:
        hidden = self._forward(parts)
        runtime = self._runtime
        with runtime.device:
            image = self._inputs.host()["pieces"]
            image[: len(pieces)] = pieces
            image[len(pieces) :] = 0
            self._inputs.upload(runtime.stream)
        self._run("pool_rows", {"x": hidden, "pieces": self._inputs.tensor("pieces"), "sums": self._sums})

    def sums(self) -> np.ndarray:
        return self._to_host(self._sums)

    def products(self, weight: Tensor) -> np.ndarray:
        out = self._new(self._sums.shape[0], weight.shape[0])
        self._run("linear", {"x": self._sums, "weight": weight, "out": out})
        return self._to_host(out)

    def rows(self, weight: Tensor, ids: Sequence[int]) -> Tensor:
        wanted = np.array(ids, np.int32)
        memory = reserve(self._runtime.device, wanted.nbytes, "token ids")
        with self._runtime.device:
            self._runtime.device.copy_h2d(memory.address, wanted.ctypes.data, wanted.nbytes, self._runtime.stream)
            self._runtime.stream.synchronize()  # the host's array is pageable
        found = self._new(len(ids), weight.shape[-1])
        self._run(
            "embedding", {"ids": Tensor(memory.address, wanted.shape, I32, memory), "weight": weight, "out": found}
        )
        return found

    def close(self) -> None:
        self._inputs.close()

    def _new(self, *shape: int) -> Tensor:
        memory = reserve(self._runtime.device, 4 * shape[0] * shape[1], "scores")
        return Tensor(memory.address, shape, F32, memory)

    def _run(self, op: str, arrays: dict[str, Tensor | None]) -> None:
        program = self._runtime.program()
        program.add(op, arrays)
        with self._runtime.device:
            program.finish().issue()
            self._runtime.stream.synchronize()  # the program's memory goes with it

    def _to_host(self, tensor: Tensor) -> np.ndarray:
        out = np.empty(tensor.shape, np.float32)
        with self._runtime.device:
            self._runtime.stream.synchronize()
            self._runtime.device.copy_d2h(out.ctypes.data, tensor.address, out.nbytes)
        return out
