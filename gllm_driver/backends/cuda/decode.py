"""Decoding sequences side by side: a graph of forward pass and sampling, replayed for every step, and its results."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

import numpy as np

from ...config import SamplingConfig
from ...driver.memory import DeviceBuffer
from ...ops.sample import PARAM_WORDS, pack_params
from ...types import F32, I32, I64, Tensor
from ..base import DecodeRow, KvCacheHandle, StepTensors, WeightsHandle
from .memory import Mirror, reserve
from .runtime import Runtime
from .sampling import upload_counts
from .shapes import bucket, table_width

MAX_IDLE_DECODERS = 32
SLOTS = 2  # results of the step before may be read while a step runs
NEUTRAL = SamplingConfig()

Key = tuple[int, int, int, int, bool]  # ids of weights and cache, rows, page-table width, penalties


class Decoder:
    """The graph for a number of rows and a page-table width, with the device state it advances.

    Serves one loop at a time. Rows without a sequence decode token 0 into the cache's spare page.
    """

    def __init__(
        self,
        runtime: Runtime,
        weights: WeightsHandle,
        kv: KvCacheHandle,
        num_rows: int,
        table_width: int,
        has_penalties: bool,
    ) -> None:
        self._runtime = runtime
        S, V = num_rows, weights.vocab_size
        self._shape = S, V
        self.key: Key = (id(weights), id(kv), num_rows, table_width, has_penalties)
        self.table_width = table_width
        self._spare_page = kv.config.num_pages
        device = runtime.device
        self._state = Mirror(
            device,
            [
                ("ids", (S,), I32),
                ("positions", (S,), I64),
                ("seq", (S,), I32),
                ("offsets", (S + 1,), I32),
                ("page_table", (S, table_width), I32),
                ("params", (S, PARAM_WORDS), I32),
            ],
        )
        self._tokens = reserve(device, 4 * S, "the chosen tokens")
        counts_nbytes = 4 * S * V
        self._counts: DeviceBuffer | None = (
            reserve(device, counts_nbytes, "counts of tokens") if has_penalties else None
        )
        self._chosen = device.pinned(SLOTS * 4 * S)
        self._chosen_view = self._chosen.view(np.int32).reshape(SLOTS, S)
        self._done = [device.event() for _ in range(SLOTS)]
        try:
            self._record(weights, kv)
        except BaseException:
            self.close()
            raise

    def _record(self, weights: WeightsHandle, kv: KvCacheHandle) -> None:
        runtime, state, (S, V) = self._runtime, self._state.tensor, self._shape
        self.generation = -1
        while self.generation != runtime.workspace.generation:
            self.generation = runtime.workspace.generation
            logits = runtime.workspace.tensor("logits", (S, V), F32)
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
                    "counts": Tensor(self._counts.address, (S, V), I32, self._counts) if self._counts else None,
                    "tokens": Tensor(self._tokens.address, (S,), I32, self._tokens),
                    "ids": ids,
                    "positions": positions,
                },
            )
            program.finish()
        if runtime.use_graphs:
            with runtime.device:
                program.capture()

    def start(self, rows: Sequence[DecodeRow]) -> None:
        """Take on sequences; their next step is the first. Needs the device's context."""
        self._write([row.pages for row in rows])
        host, S = self._state.host(), len(rows)
        host["ids"][:S] = [row.token for row in rows]
        host["positions"][:S] = [row.position for row in rows]
        host["params"][:S] = pack_params(row.sampling for row in rows)
        self._state.upload(self._runtime.stream)
        if self._counts:
            for i, row in enumerate(rows):
                upload_counts(self._runtime, self._counts, i, row.sampling, row.prompt, row.output, self._shape[1])

    def take_over(self, other: Decoder, pages: Sequence[Sequence[int]]) -> None:
        """Go on where `other`, of a narrower page table, stands. Needs the device's context."""
        self._write(pages)
        stream = self._runtime.stream
        self._state.upload(stream)
        copies = [(self._state.tensor(name), other._state.tensor(name)) for name in ("ids", "positions", "params")]
        for mine, theirs in copies:
            self._runtime.device.copy_d2d(mine.address, theirs.address, mine.nbytes, stream)
        if self._counts and other._counts:
            self._runtime.device.copy_d2d(self._counts.address, other._counts.address, self._counts.nbytes, stream)

    def _write(self, pages: Sequence[Sequence[int]]) -> None:
        """The image for sequences with these pages, at first with the state of rows without a sequence."""
        host, (S, _) = self._state.host(), self._shape
        host["ids"][:] = 0
        host["positions"][:] = 0
        host["seq"][:] = np.arange(S)
        host["offsets"][:] = np.arange(S + 1)
        host["params"][:] = pack_params([NEUTRAL])
        host["page_table"][:] = self._spare_page
        for table, own in zip(host["page_table"], pages, strict=False):
            table[: len(own)] = own

    def set_pages(self, changes: Sequence[tuple[int, int, Sequence[int]]]) -> None:
        """Write (row, first entry, pages) into page tables before the next step. Needs the device's context."""
        table = self._state.host()["page_table"]
        for row, first, pages in changes:
            table[row, first : first + len(pages)] = pages
        at = [(row * self.table_width + first, len(pages)) for row, first, pages in changes]
        self._state.upload_parts("page_table", at, self._runtime.stream)

    def launch(self, slot: int) -> None:
        """Queue one step, whose tokens go to `slot`. Needs the device's context."""
        stream = self._runtime.stream
        if self.program.is_captured:
            self.program.replay()
        else:
            self.program.issue()
        nbytes = self._tokens.nbytes
        self._runtime.device.copy_d2h(self._chosen.address + slot * nbytes, self._tokens.address, nbytes, stream)
        self._done[slot].record(stream)

    def tokens(self, slot: int, num_rows: int) -> list[int]:
        """What the step into `slot` has chosen, −1 where the logits hold no number. Needs the device's context."""
        self._done[slot].synchronize()
        found: list[int] = self._chosen_view[slot, :num_rows].tolist()
        return found

    def close(self) -> None:
        """Give everything back."""
        self.program.close()
        self._state.close()
        self._chosen_view = np.zeros((SLOTS, 0), np.int32)
        for event in self._done:
            event.close()
        self._chosen.free()


class DecoderPool:
    """Decoders that wait for their next sequences: recorded once each, the one idle longest dropped when too many."""

    def __init__(self, runtime: Runtime) -> None:
        self._runtime = runtime
        self._idle: OrderedDict[int, Decoder] = OrderedDict()  # by id, the one idle longest first
        runtime.recorded.append(self._idle)

    def take(
        self, weights: WeightsHandle, kv: KvCacheHandle, num_rows: int, num_pages: int, has_penalties: bool
    ) -> Decoder:
        """A decoder for so many sequences of at most `num_pages` pages."""
        width = table_width(num_pages, kv.config.num_pages)
        key = (id(weights), id(kv), bucket(num_rows), width, has_penalties)
        for decoder in reversed(self._idle.values()):
            if decoder.key == key:
                del self._idle[id(decoder)]
                return decoder
        return Decoder(self._runtime, weights, kv, key[2], width, has_penalties)

    def give_back(self, decoder: Decoder) -> None:
        """`decoder` serves no loop any more; a step under way may finish."""
        if decoder.generation != self._runtime.workspace.generation:
            decoder.close()  # it would keep memory that the workspace has left
            return
        self._idle[id(decoder)] = decoder
        while len(self._idle) > MAX_IDLE_DECODERS:
            self._idle.popitem(last=False)[1].close()

    def forget(self, handle: int) -> None:
        """Close the idle decoders of weights or a cache (its id) that are gone."""
        for decoder in [d for d in self._idle.values() if handle in d.key[:2]]:
            self._idle.pop(id(decoder)).close()
