"""Decoding one sequence: a graph of forward pass, sampling and the copy of the token, replayed for every step."""

from __future__ import annotations

import weakref
from collections.abc import Sequence

import numpy as np

from ...driver.memory import DeviceBuffer
from ...errors import UnsupportedError
from ...ops.sample import PARAM_WORDS, pack_params, token_counts
from ...types import F32, I32, I64, Tensor
from ..base import DecodeRow, KvCacheHandle, StepTensors, WeightsHandle
from .memory import Mirror, reserve
from .runtime import Runtime


class Decoder:
    """The graph for one page-table width, with the device state it advances. Serves one sequence at a time."""

    def __init__(
        self, runtime: Runtime, weights: WeightsHandle, kv: KvCacheHandle, table_width: int, has_penalties: bool
    ) -> None:
        self._runtime = runtime
        V = self._vocab_size = weights.vocab_size
        device = runtime.device
        self._state = Mirror(
            device,
            [
                ("ids", (1,), I32),
                ("positions", (1,), I64),
                ("seq", (1,), I32),
                ("offsets", (2,), I32),
                ("page_table", (1, table_width), I32),
                ("params", (1, PARAM_WORDS), I32),
            ],
        )
        self._tokens = reserve(device, 4, "the chosen token")
        self._counts: DeviceBuffer | None = reserve(device, 4 * V, "the counts of tokens") if has_penalties else None
        self._token = device.pinned(4)
        self._token_view = self._token.view(np.int32)
        try:
            self._record(weights, kv)
        except BaseException:
            self.close()
            raise

    def _record(self, weights: WeightsHandle, kv: KvCacheHandle) -> None:
        runtime, state, V = self._runtime, self._state.tensor, self._vocab_size
        self.generation = -1
        while self.generation != runtime.workspace.generation:
            self.generation = runtime.workspace.generation
            logits = runtime.workspace.tensor("logits", (1, V), F32)
            ids, positions = state("ids"), state("positions")
            step = StepTensors(
                ids, positions, state("seq"), state("offsets"), state("page_table"), None, logits, is_decode=True
            )
            self.program = program = runtime.program()
            weights.forward(program, weights.tensors, kv.tensor, step)
            program.add(
                "sample",
                {
                    "logits": logits,
                    "params": state("params"),
                    "counts": Tensor(self._counts.address, (1, V), I32, self._counts) if self._counts else None,
                    "tokens": Tensor(self._tokens.address, (1,), I32, self._tokens),
                    "ids": ids,
                    "positions": positions,
                },
            )
            program.finish()
        if runtime.use_graphs:
            with runtime.device:
                program.capture(after=self._fetch)

    def _fetch(self) -> None:
        self._runtime.device.copy_d2h(self._token.address, self._tokens.address, 4, self._runtime.stream)

    def start(self, row: DecodeRow) -> None:
        """Take on a sequence whose one new token is given."""
        runtime = self._runtime
        with runtime.device:
            host = self._state.host()
            host["ids"][:] = row.token
            host["positions"][:] = row.position
            host["seq"][:] = 0
            host["offsets"][:] = 0, 1
            host["page_table"][:] = 0
            host["page_table"][0, : len(row.pages)] = row.pages
            host["params"][:] = pack_params([row.sampling])
            self._state.upload(runtime.stream)
            if self._counts:
                runtime.stream.synchronize()  # the copy below is in no stream's order
                counts = token_counts(row.prompt, row.output, self._vocab_size)
                runtime.device.copy_h2d(self._counts.address, counts.ctypes.data, counts.nbytes)

    def step(self) -> int:
        """One forward pass and the token chosen from it, −1 if the logits hold no number."""
        runtime = self._runtime
        with runtime.device:
            if self.program.is_captured:
                self.program.replay()
            else:
                self.program.issue()
                self._fetch()
            runtime.stream.synchronize()
        return int(self._token_view[0])

    def close(self) -> None:
        """Give everything back."""
        self.program.close()
        self._state.close()
        self._token_view = np.zeros(0, np.int32)
        self._token.free()


class DecoderPool:
    """Decoders that wait for their next sequence, by (weights, cache, table width, penalties): recorded once each."""

    def __init__(self, runtime: Runtime) -> None:
        self._runtime = runtime
        self._idle: dict[tuple[int, int, int, bool], list[Decoder]] = {}

    def take(
        self, weights: WeightsHandle, kv: KvCacheHandle, table_width: int, has_penalties: bool
    ) -> tuple[Decoder, list[Decoder]]:
        """A decoder, and the list to put it back to when its sequence has ended."""
        idle = self._idle.setdefault((id(weights), id(kv), table_width, has_penalties), [])
        while idle:
            decoder = idle.pop()
            if decoder.generation == self._runtime.workspace.generation:
                return decoder, idle
            decoder.close()  # it would keep memory that the workspace has left
        return Decoder(self._runtime, weights, kv, table_width, has_penalties), idle

    def forget(self, handle: int) -> None:
        """Close the idle decoders of weights or a cache (its id) that are gone."""
        for key in [k for k in self._idle if handle in k[:2]]:
            for decoder in self._idle.pop(key):
                decoder.close()


class CudaDecodeLoop:
    """One sequence being continued: a graph launch and four bytes back per step."""

    def __init__(self, decoder: Decoder, idle: list[Decoder]) -> None:
        self._decoder = decoder
        self._give_back = weakref.finalize(self, idle.append, decoder)
        self._give_back.atexit = False

    def step(self) -> list[int]:
        return [self._decoder.step()]

    def set_pages(self, row: int, pages: Sequence[int]) -> None:
        raise UnsupportedError("on CUDA a decode loop's pages are all given at its start")

    def close(self) -> None:
        self._give_back()
