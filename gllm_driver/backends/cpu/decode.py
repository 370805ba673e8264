"""The fast path of decoding: forward pass and sampling are one program, which also advances ids and positions."""

from __future__ import annotations

import weakref
from collections.abc import Sequence

import numpy as np

from cpu_backend.program import Program
from cpu_backend.team import Team

from ...config import SamplingConfig
from ...ops.sample import PARAM_WORDS, pack_params, token_counts
from ...types import F32, Tensor
from ..base import DecodeRow, KvCacheHandle, StepTensors, WeightsHandle
from .steps import Compiling, Recorder, Workspace


class Decoder:
    """The program for a number of rows, with the state it advances. Serves one loop at a time."""

    def __init__(
        self,
        team: Team,
        workspace: Workspace,
        compiling: Compiling,
        weights: WeightsHandle,
        kv: KvCacheHandle,
        num_rows: int,
        has_penalties: bool,
    ) -> None:
        S, V = num_rows, weights.vocab_size
        self._handles = weights, kv  # their ids are this decoder's key: they must not come to mean others
        self._vocab_size = V
        self.tokens = np.zeros(S, np.int32)
        self._ids = np.zeros(S, np.int32)
        self._positions = np.zeros(S, np.int64)
        self._seq = np.arange(S, dtype=np.int32)
        self._offsets = np.arange(S + 1, dtype=np.int32)
        self._page_table = np.zeros((S, kv.config.num_pages), np.int32)
        self._params = np.zeros((S, PARAM_WORDS), np.int32)
        self._counts = np.zeros((S, V), np.int32) if has_penalties else None
        ids, positions = Tensor.from_numpy(self._ids), Tensor.from_numpy(self._positions)
        seq, offsets = Tensor.from_numpy(self._seq), Tensor.from_numpy(self._offsets)
        page_table = Tensor.from_numpy(self._page_table)
        self.generation = -1
        while self.generation != workspace.generation:
            self.generation = workspace.generation
            logits = workspace.tensor("logits", (S, V), F32)
            step = StepTensors(ids, positions, seq, offsets, page_table, None, logits, is_decode=True)
            program = Program(team)
            weights.forward(Recorder(program, workspace), weights.tensors, kv.tensor, step)
        program.add(
            "sample",
            {
                "logits": logits,
                "params": Tensor.from_numpy(self._params),
                "counts": None if self._counts is None else Tensor.from_numpy(self._counts),
                "tokens": Tensor.from_numpy(self.tokens),
                "ids": ids,
                "positions": positions,
            },
        )
        self.program = program.finish(compiling)

    def start(self, rows: Sequence[DecodeRow]) -> None:
        """Take on these sequences, as many as the decoder has rows."""
        self._ids[:] = [row.token for row in rows]
        self._positions[:] = [row.position for row in rows]
        self._params[:] = pack_params([row.sampling for row in rows])
        for i, row in enumerate(rows):
            self.set_pages(i, row.pages)
            if self._counts is not None:
                self._counts[i] = token_counts(row.prompt, row.output, self._vocab_size)

    def set_pages(self, row: int, pages: Sequence[int]) -> None:
        self._page_table[row, : len(pages)] = pages


class Decoders:
    """Decoders that wait for their next loop, by (weights, cache, rows, penalties): recorded once each."""

    def __init__(self, team: Team, workspace: Workspace, compiling: Compiling) -> None:
        self._parts = team, workspace, compiling
        self._idle: dict[tuple[int, int, int, bool], list[Decoder]] = {}

    def take(
        self, weights: WeightsHandle, kv: KvCacheHandle, configs: Sequence[SamplingConfig]
    ) -> tuple[Decoder, list[Decoder]]:
        """A decoder, and the list to put it back to when its loop has ended."""
        has_penalties = any(config.has_penalties for config in configs)
        idle = self._idle.setdefault((id(weights), id(kv), len(configs), has_penalties), [])
        _, workspace, _ = self._parts
        while idle:
            decoder = idle.pop()
            if decoder.generation == workspace.generation:
                return decoder, idle
        return Decoder(*self._parts, weights, kv, len(configs), has_penalties), idle

    def clear(self) -> None:
        self._idle.clear()


class CpuDecodeLoop:
    """Sequences being continued: one entry into compiled code per step."""

    def __init__(self, decoder: Decoder, idle: list[Decoder], rows: Sequence[DecodeRow]) -> None:
        self._decoder: Decoder | None = decoder
        self._give_back = weakref.finalize(self, idle.append, decoder)
        self._give_back.atexit = False
        decoder.start(rows)

    def _open(self) -> Decoder:
        if self._decoder is None:
            raise ValueError("this decode loop is closed")
        return self._decoder

    def step(self) -> list[int]:
        decoder = self._open()
        decoder.program.run()
        return decoder.tokens.tolist()

    def set_pages(self, row: int, pages: Sequence[int]) -> None:
        self._open().set_pages(row, pages)

    def close(self) -> None:
        self._decoder = None
        self._give_back()
