"""Quantizing a model: read, encode, write, one tensor after another, each by all threads."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from pathlib import Path

import numpy as np

from ..backends.select import num_processors
from ..errors import ModelFormatError, RequestError
from ..loaders.mapping import release
from ..loaders.open import open_checkpoint
from ..models.checkpoint import Checkpoint
from ..quant.gptq import Curvature, gptq
from ..quant.grid import GRIDS
from . import calibration
from .activations import Call, Stream, calls_of
from .encode import Encoded, check_method, encode, float_bytes, measured, source_rows
from .kinds import dtype_named, is_gguf_name
from .plan import Output, Plan, plan_of
from .report import Report, Row, row
from .target import TensorWriter, check_target, target

Progress = Callable[[str, int, int], None]
PIECE_ELEMENTS = 1 << 18  # of a thread at a time


@dataclass(frozen=True)
class Options:
    """method None: gptq with a calibration text, else search. keep: (glob, type), the first that matches decides."""

    type_name: str
    block: int | None = None
    method: str | None = None
    calib: Path | None = None
    calib_tokens: int = calibration.DEFAULT_TOKENS
    keep: Sequence[tuple[str, str]] = ()
    force: bool = False
    threads: int | None = None


def quantize(source: str, out: Path, options: Options, progress: Progress | None = None) -> Report:
    """Write the model `source` (a path or a hub id) as `out`.

    Raises RequestError for options that contradict each other or the model, ModelFormatError for a model that cannot be
    read, WriteError for an output that cannot be written; nothing is left of it then.
    """
    if options.method in ("rtn", "hqq") and options.calib is not None:
        raise RequestError(f"{options.method} looks at weights alone: leave out --calib, or take gptq or search")
    if options.method == "gptq" and options.calib is None:
        raise RequestError("gptq needs a text: give one with --calib")
    dtype_named(options.type_name, options.block)  # unknown ones are refused before anything is opened
    is_gguf = is_gguf_name(options.type_name)
    text = None if options.calib is None else calibration.read_text(options.calib)
    check_target(Path(source).expanduser(), out, is_gguf=is_gguf, force=options.force)
    checkpoint = open_checkpoint(source, progress=None if progress else False)
    plan = plan_of(checkpoint, options.type_name, options.block, options.keep)
    method = options.method or ("search" if text is None else _calibrated_method(plan))
    check_method(method, [output.dtype for output in plan.matrices])
    ids = None if text is None else _windows(checkpoint, text, options.calib_tokens)
    with _threads(options.threads) as pool, target(checkpoint, plan, out) as writer:
        job = Job(checkpoint, plan, method, pool, writer, progress)
        job.vectors()
        if ids is None:
            job.matrices(plan.matrices)
        else:
            job.calibrated(ids)
    return job.report(out)


def _calibrated_method(plan: Plan) -> str:
    """K-quants and the like choose scales by a rule of their own, which takes importance."""
    return "gptq" if plan.dtype.name in GRIDS else "search"


def _windows(checkpoint: Checkpoint, text: str, num_tokens: int) -> np.ndarray:
    from ..loaders.tokenizer import Tokenizer

    path, metadata = checkpoint.path, checkpoint.metadata
    if "tokenizer.ggml.model" in metadata:
        tokenizer = Tokenizer.from_gguf(metadata, path)
    else:
        tokenizer = Tokenizer.from_directory(path if path.is_dir() else path.parent)
    arch = checkpoint.arch
    return calibration.windows_of(tokenizer.encode(text), num_tokens, arch.context_length, arch.vocab_size)


@contextmanager
def _threads(count: int | None) -> Iterator[ThreadPoolExecutor]:
    pool = ThreadPoolExecutor(count or num_processors())
    try:
        yield pool
    finally:  # after an interrupt what has not begun does not begin
        pool.shutdown(wait=True, cancel_futures=True)


class Job:
    """One model on its way into one file. Slots are encoded in the source's order of rows."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        plan: Plan,
        method: str,
        pool: ThreadPoolExecutor,
        writer: TensorWriter,
        progress: Progress | None,
    ) -> None:
        self._checkpoint, self._plan, self._method = checkpoint, plan, method
        self._pool, self._writer, self._progress = pool, writer, progress
        self._total = sum(prod(output.shape) for output in plan.matrices)
        self._done = 0
        self._rows: list[Row] = []

    def vectors(self) -> None:
        """Norms and biases, which are floats."""
        for output in self._plan.outputs:
            if not output.is_matrix:
                values = np.concatenate([self._vector(slot) for slot in output.slots])
                values = values if output.order is None else values[output.order]
                self._writer.write(output.name, float_bytes(output.dtype, values.reshape(1, -1)))

    def matrices(self, outputs: Iterable[Output]) -> None:
        """Matrices by their weights alone."""
        for output in outputs:
            self._write(output, [self._encoded(output, slot, self._method, None) for slot in output.slots])

    def calibrated(self, ids: np.ndarray) -> None:
        """All matrices, in the order of a forward pass over the windows `ids` i32 [S, L]: each is rounded for the
        inputs that the quantized ones before it give."""
        arch, by_slot = self._checkpoint.arch, {slot: o for o in self._plan.matrices for slot in o.slots}
        embed = self._encoded(by_slot["embed"], "embed", "search", None)
        self._write(by_slot["embed"], [embed], "search")
        vectors = {slot: self._vector(slot) for slot, t in self._checkpoint.tensors.items() if len(t.shape) == 1}
        embedded = embed.values(ids.reshape(-1)).reshape(*ids.shape, arch.hidden_size)
        stream = Stream(arch, vectors, embedded, self._pool)
        del embed
        for call in calls_of(arch):
            slots = {name: slot for name, slot in call.slots.items() if slot != "embed"}
            encoded = self._rounded(stream, call, list(slots.values()), by_slot, ids.shape) if slots else {}
            stream.apply(call, {name: encoded[slot].values() for name, slot in slots.items()})

    def _rounded(
        self, stream: Stream, call: Call, slots: list[str], by_slot: Mapping[str, Output], shape: tuple[int, int]
    ) -> dict[str, Encoded]:
        """The matrices of a call, rounded for its inputs and written."""
        rows, (num_windows, length) = stream.inputs(call), shape
        by_gptq = {slot for slot in slots if self._method == "gptq" and by_slot[slot].dtype.name in GRIDS}
        curvature = None
        try:
            if by_gptq:
                curvature = Curvature(calibration.input_products(rows, num_windows, length, self._pool))
                importance = np.diag(curvature.h)
            else:
                importance = calibration.input_squares(rows, num_windows, self._pool)
        except ValueError as error:
            name = self._checkpoint.sources[slots[0]]
            raise RequestError(f"the calibration text cannot be used: entering {name!r}, {error}") from error
        importance = importance + np.float32(importance.mean() * 1e-3 or 1)  # no column is free
        encoded = {
            slot: self._encoded(by_slot[slot], slot, "gptq", None, curvature)
            if slot in by_gptq
            else self._encoded(by_slot[slot], slot, "search", importance)
            for slot in slots
        }
        for output in dict.fromkeys(by_slot[slot] for slot in slots):
            method = "gptq" if output.slots[0] in by_gptq else "search"
            self._write(output, [encoded[slot] for slot in output.slots], method)
        return encoded

    def _encoded(
        self,
        output: Output,
        slot: str,
        method: str,
        importance: np.ndarray | None,
        curvature: Curvature | None = None,
    ) -> Encoded:
        """One slot in the type of its output, in pieces, by all threads."""
        tensor, dtype = self._checkpoint.tensors[slot], output.dtype
        N, K = tensor.shape
        data = np.empty((N, dtype.row_nbytes(K)), np.uint8)

        def piece(first: int) -> tuple[float, float, int]:
            end = min(first + step, N)
            rows = source_rows(tensor, first, end)
            if curvature is None:
                part = encode(dtype, method, rows, importance)
            else:
                part = measured(dtype, gptq(GRIDS[dtype.name], rows, curvature), rows)
            data[first:end] = part.data
            return part.squared_error, part.squares, rows.size

        step = max(1, PIECE_ELEMENTS // K)
        error = squares = 0.0
        try:
            for piece_error, piece_squares, size in self._pool.map(piece, range(0, N, step)):
                error, squares = error + piece_error, squares + piece_squares
                self._advance(size)
        except ValueError as problem:
            name = self._checkpoint.sources[slot]
            raise ModelFormatError(str(problem), path=self._checkpoint.path, tensor=name) from problem
        release(tensor)
        return Encoded(dtype, data, error, squares)

    def _write(self, output: Output, parts: Sequence[Encoded], method: str | None = None) -> None:
        data = parts[0].data if len(parts) == 1 else np.concatenate([part.data for part in parts])
        self._writer.write(output.name, data if output.order is None else data[output.order])
        error, squares = sum(part.squared_error for part in parts), sum(part.squares for part in parts)
        shown = (method or self._method) if output.dtype.is_quantized else "-"
        self._rows.append(row(output, output.dtype, shown, error, squares))

    def _vector(self, slot: str) -> np.ndarray:
        tensor = self._checkpoint.tensors[slot]
        try:
            return source_rows(tensor, 0, 1)[0]
        except ValueError as problem:
            name = self._checkpoint.sources[slot]
            raise ModelFormatError(str(problem), path=self._checkpoint.path, tensor=name) from problem

    def _advance(self, size: int) -> None:
        self._done += size
        if self._progress:
            self._progress("quantize", self._done, self._total)

    def report(self, out: Path) -> Report:
        """What was written."""
        files = [out] if out.is_file() else sorted(out.iterdir())
        weights = sum(prod(output.shape) for output in self._plan.outputs)
        nbytes = sum(os.stat(file).st_size for file in files)
        return Report(str(out), nbytes, weights, 8 * self._plan.nbytes / weights, tuple(self._rows))
