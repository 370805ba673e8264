"""Choosing tokens from logits that lie on the device: one launch and one wait for any number of rows."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

import numpy as np

from ...config import SamplingConfig
from ...driver.memory import DeviceBuffer
from ...ops.sample import PARAM_WORDS, pack_params, token_counts
from ...types import F32, I32, I64, Tensor
from ..base import SampleRow
from .memory import Mirror, reserve
from .program import Program
from .runtime import Runtime
from .shapes import bucket

MAX_CACHED_SAMPLINGS = 32
NEUTRAL = SamplingConfig()  # of rows nobody asked about


class Sampling:
    """The sample op over rows of logits that lie one after another, with its inputs and the place of its results."""

    def __init__(self, runtime: Runtime, logits: Tensor, has_penalties: bool) -> None:
        S, V = logits.shape
        self._runtime = runtime
        device = runtime.device
        self._inputs = Mirror(device, [("params", (S, PARAM_WORDS), I32), ("positions", (S,), I64)])
        self._counts: DeviceBuffer | None = None
        try:
            self._counts = reserve(device, 4 * S * V, "the counts of tokens") if has_penalties else None
            self._tokens = reserve(device, 4 * S, "the chosen tokens")
            self._chosen = device.pinned(4 * S)
            self._program: Program = runtime.program()
            self._program.add(
                "sample",
                {
                    "logits": logits,
                    "params": self._inputs.tensor("params"),
                    "counts": Tensor(self._counts.address, (S, V), I32, self._counts) if self._counts else None,
                    "tokens": Tensor(self._tokens.address, (S,), I32, self._tokens),
                    "positions": self._inputs.tensor("positions"),
                },
            )
            self._program.finish()
        except BaseException:
            self._inputs.close()
            raise
        self.generation = runtime.workspace.generation  # now that the scratch has its size
        self._shape = S, V

    def run(self, rows: dict[int, SampleRow]) -> dict[int, int]:
        """The token chosen for each row, by its number."""
        runtime, (S, V) = self._runtime, self._shape
        with runtime.device:
            host = self._inputs.host()
            host["params"][:] = pack_params(rows[i].sampling if i in rows else NEUTRAL for i in range(S))
            host["positions"][:] = [rows[i].position if i in rows else 0 for i in range(S)]
            self._inputs.upload(runtime.stream)
            if self._counts:
                for i, row in rows.items():
                    upload_counts(runtime, self._counts, i, row.sampling, row.prompt, row.output, V)
            self._program.issue()
            runtime.device.copy_d2h(self._chosen.address, self._tokens.address, 4 * S, runtime.stream)
            runtime.stream.synchronize()
        chosen = self._chosen.view(np.int32)
        return {i: int(chosen[i]) for i in rows}

    def close(self) -> None:
        """Give everything back."""
        self._program.close()
        self._inputs.close()
        self._chosen.free()


class Sampler:
    """Samplings by where the logits are, how many rows, and whether there are penalties."""

    def __init__(self, runtime: Runtime) -> None:
        self._runtime = runtime
        self._cached: OrderedDict[tuple[int, int, int, bool], Sampling] = OrderedDict()
        runtime.recorded.append(self._cached)

    def sample(self, rows: Sequence[SampleRow]) -> list[int]:
        """One token per row of logits, all of one forward pass; −1 where the logits hold no number.

        Logits may come several times: each is sampled once per launch.
        """
        tokens = [-1] * len(rows)
        base = min(row.logits.row.address for row in rows)
        left = list(range(len(rows)))
        while left:
            taken: dict[int, int] = {}  # row of logits → index in rows
            again: list[int] = []
            for i in left:
                logits = rows[i].logits.row
                at = (logits.address - base) // logits.row_nbytes
                if taken.setdefault(at, i) != i:
                    again.append(i)
            sampling = self._sampling(rows[left[0]].logits.row, base, max(taken) + 1, [rows[i] for i in taken.values()])
            for at, token in sampling.run({at: rows[i] for at, i in taken.items()}).items():
                tokens[taken[at]] = token
            left = again
        return tokens

    def _sampling(self, logits: Tensor, base: int, num_rows: int, rows: Sequence[SampleRow]) -> Sampling:
        (V,), memory = logits.shape, logits.owner
        assert isinstance(memory, DeviceBuffer)
        num_rows = min(bucket(num_rows), (memory.address + memory.nbytes - base) // (4 * V))
        key = (base, num_rows, V, any(row.sampling.has_penalties for row in rows))
        sampling = self._cached.pop(key, None)
        if sampling is None:
            sampling = Sampling(self._runtime, Tensor(base, (num_rows, V), F32, memory), key[3])
            if len(self._cached) == MAX_CACHED_SAMPLINGS:
                self._cached.popitem(last=False)[1].close()
        self._cached[key] = sampling
        return sampling


def upload_counts(
    runtime: Runtime,
    counts: DeviceBuffer,
    row: int,
    config: SamplingConfig,
    prompt: Sequence[int],
    output: Sequence[int],
    vocab_size: int,
) -> None:
    """Bring row `row` of the `counts` of op sample, i32 [S, vocab], up to date. Needs the device's context."""
    if not config.has_penalties:
        return  # its counts are never looked at
    found = token_counts(prompt, output, vocab_size)
    runtime.device.copy_h2d(counts.address + row * found.nbytes, found.ctypes.data, found.nbytes, runtime.stream)
