"""The sections of benchmarks/gpu.py."""

from __future__ import annotations

import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
from gpu_models import ARCHS, DeviceArrays, copy_bandwidth, held_as, random_model, read_nbytes, seconds_of

import gllm_driver as gllm
from gllm_driver.backends.base import DecodeRow, KvCacheHandle, ModelWeights, WeightsHandle
from gllm_driver.backends.cuda import CudaBackend
from gllm_driver.config import KvCacheConfig, SamplingConfig
from gllm_driver.driver import probe
from gllm_driver.errors import GllmError
from gllm_driver.types import BatchInput, SequenceInput, Tensor

L2_NBYTES = 256 << 20  # weights a timing cycles through: several times any L2 cache


@dataclass(frozen=True)
class Settings:
    """What the command line asked for."""

    models: tuple[str, ...]
    shapes: tuple[str, ...]
    dtypes: tuple[str, ...]
    quick: bool
    deterministic: bool

    @property
    def repeats(self) -> int:
        return 3 if self.quick else 10

    def open(self, **options: Any) -> CudaBackend:
        return CudaBackend(deterministic=self.deterministic, **options)


def say(text: str) -> None:
    print(text, flush=True)


Body = Callable[[str, WeightsHandle, KvCacheHandle], None]


def each_model(settings: Settings, backend: CudaBackend, context: int, body: Body) -> None:
    """Calls `body` for random models of every shape and dtype, one at a time; says which ones fail."""
    for shape in settings.shapes:
        for dtype in settings.dtypes:
            name = f"{shape} {dtype}"
            try:
                body(name, *random_model(backend, ARCHS[shape], dtype, context))
            except GllmError as error:
                say(f"{name}: {type(error).__name__}: {error}")
            backend.runtime.workspace.clear()
            backend.device.trim()


def device(settings: Settings) -> None:
    for gpu in probe():
        say(f"{gpu.device}: {gpu.name}, {'usable' if gpu.usable else 'not usable'}: {gpu.reason}")
    backend = settings.open()
    p = backend.device.properties
    say(
        f"{p.num_sms} SMs, {p.total_nbytes / 2**30:.1f} GiB, L2 {p.l2_nbytes / 2**20:.0f} MiB, "
        f"{p.max_smem_optin >> 10} kB shared memory per block, kernels of sm_{backend.runtime.library.archs[0]}"
    )
    start = time.perf_counter()
    backend.prepare(())
    say(f"all kernel modules loaded in {(time.perf_counter() - start) * 1e3:.0f} ms")
    backend.close()


def copy(settings: Settings) -> None:
    backend = settings.open()
    nbytes = 64 << 20 if settings.quick else 1 << 30
    say(f"device to device  {copy_bandwidth(backend, nbytes) / 1e9:8.1f} GB/s read and written")
    device, stream = backend.device, backend.runtime.stream
    host, memory = device.pinned(nbytes), device.alloc(nbytes)
    for name, work in (
        ("host to device", lambda: device.copy_h2d(memory.address, host.address, nbytes, stream)),
        ("device to host", lambda: device.copy_d2h(host.address, memory.address, nbytes, stream)),
    ):
        say(f"{name:<17} {nbytes / seconds_of(backend, work, 3) / 1e9:8.1f} GB/s pinned")
    backend.close()


def decode(settings: Settings) -> None:
    """Decoding one sequence: wall time of a step, the graph's own time, bytes against the copy bandwidth."""
    backend = settings.open()
    peak = copy_bandwidth(backend, 64 << 20 if settings.quick else 1 << 30)
    say(f"{'model':<22}{'context':>8}{'tok/s':>9}{'step us':>9}{'graph us':>9}{'GB/s':>8}{'of copy':>8}{'kernels':>8}")
    steps = 20 if settings.quick else 100
    contexts = (128,) if settings.quick else (128, 4096)

    def rows(name: str, weights: WeightsHandle, kv: KvCacheHandle) -> None:
        for context in contexts:
            _decode_row(name, backend, weights, kv, context, steps, peak)

    each_model(settings, backend, max(contexts) + steps + 64, rows)
    backend.close()
    for path in settings.models:
        with gllm.load(path, device="cuda") as llm:
            for sampling in ({"temperature": 0}, {"temperature": 0.8, "top_k": 40, "top_p": 0.95, "seed": 1}):
                llm.generate([1, 2, 3], max_tokens=8, ignore_eos=True, **sampling)
                result = llm.generate([1] * 64, max_tokens=steps, ignore_eos=True, **sampling)
                t = result.timings
                rates = f"{t.decode_tokens_per_s:.1f} tok/s, prefill {t.prefill_tokens_per_s:.0f} tok/s"
                say(f"{Path(path).name}: {rates}, load {llm.load_s:.2f} s, {result.traffic}")


def _decode_row(
    name: str, backend: CudaBackend, weights: WeightsHandle, kv: KvCacheHandle, context: int, steps: int, peak: float
) -> None:
    pages = list(range(-(-(context + steps + 8) // 16)))
    loop = backend.start_decode(weights, kv, [DecodeRow(1, context, pages, SamplingConfig())])
    program = loop.decoder.program  # type: ignore[attr-defined]
    for _ in range(3):
        loop.step()
    before = backend.traffic()
    step = _median_seconds(loop.step, steps)
    moved = backend.traffic()
    graph = seconds_of(backend, program.replay, 5)
    kv_nbytes = kv.config.page_nbytes // 16 * context
    rate = (read_nbytes(weights) + kv_nbytes) / step
    traffic = (moved.h2d_bytes - before.h2d_bytes + moved.d2h_bytes - before.d2h_bytes) / steps
    say(
        f"{name:<22}{context:8}{1 / step:9.1f}{step * 1e6:9.1f}{graph * 1e6:9.1f}{rate / 1e9:8.0f}{rate / peak:8.1%}"
        f"{len(program.symbols):8}   {traffic:.0f} bytes/step over the bus"
    )


def _median_seconds(work: Callable[[], object], repeats: int) -> float:
    """Wall time of a call that waits for its own result."""
    found = []
    for _ in range(repeats):
        start = time.perf_counter()
        work()
        found.append(time.perf_counter() - start)
    return statistics.median(found)


def swap(settings: Settings) -> None:
    """KV pages to host slots and back, alone and while four sequences decode; a page of the 8B shape is 2.4 MB."""
    backend = settings.open()
    config = KvCacheConfig(200, 36, 8, 128, 16, "bf16")
    kv = backend.alloc_kv_cache(config)
    count = 32 if settings.quick else 64
    backend.alloc_swap_space(kv, count)
    for what, pages in (("in a row", range(count)), ("scattered", range(0, 3 * count, 3))):
        for _ in range(2):
            backend.swap_out_pages(kv, pages, range(count))
            backend.swap_in_pages(kv, range(count), pages)
            backend.copy_pages_to_host(kv, [0])  # after the copies
        stats = backend.swap_stats(kv)
        say(f"{count} pages {what}: {stats.gb_per_s_out:.1f} GB/s out, {stats.gb_per_s_in:.1f} GB/s in, so far")
    start = time.perf_counter()
    data = backend.copy_pages_to_host(kv, range(count))
    middle = time.perf_counter()
    backend.copy_pages_from_host(kv, range(count), data)
    rates = [data.nbytes / s / 1e9 for s in (middle - start, time.perf_counter() - middle)]
    say(f"{count} pages as an array: {rates[0]:.1f} GB/s to the host, {rates[1]:.1f} GB/s from it")
    backend.close()


def prefill(settings: Settings) -> None:
    """A prompt of one sequence, its last token's logits included."""
    backend = settings.open()
    say(f"{'model':<22}{'tokens':>8}{'tok/s':>10}{'ms':>9}{'TFLOP/s':>9}")

    def rows(name: str, weights: WeightsHandle, kv: KvCacheHandle) -> None:
        matrices = [t.shape for slot, t in weights.tensors.items() if slot.startswith("layers.") and len(t.shape) > 1]
        for tokens in (256,) if settings.quick else (256, 512, 2048, 4096):
            sequence = SequenceInput([7] * tokens, 0, list(range(-(-tokens // 16))))
            work = partial(backend.generator_forward_gpu_pure, weights, kv, sequence)
            seconds = seconds_of(backend, work, max(1, settings.repeats // 2))
            flops = 2 * tokens * sum(prod(shape) for shape in matrices) / seconds
            say(f"{name:<22}{tokens:8}{tokens / seconds:10.0f}{seconds * 1e3:9.2f}{flops / 1e12:9.1f}")

    each_model(settings, backend, 4096, rows)
    backend.close()


def batch(settings: Settings) -> None:
    """Decode steps of several sequences, each from its own 512 tokens of context: single steps, and loops."""
    backend = settings.open()
    say(f"{'model':<22}{'seqs':>6}{'tok/s':>10}{'step us':>9}{'in a loop':>11}{'step us':>9}")
    steps = 10 if settings.quick else 50
    pages = -(-(512 + steps + 8) // 16)
    sizes = (4,) if settings.quick else (1, 4, 8, 16, 32, 64)

    def rows(name: str, weights: WeightsHandle, kv: KvCacheHandle) -> None:
        for size in sizes:
            sequences = [SequenceInput([3], 512, list(range(i * pages, (i + 1) * pages))) for i in range(size)]
            work = partial(backend.batch_forward_gpu_pure, weights, kv, BatchInput(sequences))
            work()  # the second time makes the graph
            seconds = seconds_of(backend, work, settings.repeats)
            loop = backend.start_decode(weights, kv, [DecodeRow(3, 512, s.pages, SamplingConfig()) for s in sequences])
            step = _median_seconds(loop.step, steps)
            loop.close()
            rates = f"{size / seconds:10.0f}{seconds * 1e6:9.1f}{size / step:11.0f}{step * 1e6:9.1f}"
            say(f"{name:<22}{size:6}{rates}")

    each_model(settings, backend, max(sizes) * pages * 16, rows)
    backend.close()


def ops(settings: Settings) -> None:
    """Products at the sizes of an 8B layer, each call on other weights, as one graph."""
    backend = settings.open()
    peak = copy_bandwidth(backend, 64 << 20 if settings.quick else 1 << 30)
    say(f"copy {peak / 1e9:.0f} GB/s")
    say(f"{'op':<20}{'dtype':>6}{'T':>6}{'us':>9}{'GB/s':>8}{'of copy':>8}{'TFLOP/s':>9}  kernels")
    for dtype in settings.dtypes:
        for op in ("linear", "fused_gate_up_silu"):
            try:
                _op_rows(settings, backend, op, dtype, peak)
            except GllmError as error:
                say(f"{op:<20}{dtype:>6}  {type(error).__name__}: {error}")
            backend.device.trim()
    backend.close()


def _op_rows(settings: Settings, backend: CudaBackend, op: str, dtype: str, peak: float) -> None:
    arrays, kind = DeviceArrays(backend), held_as(dtype)
    D, F = (128, 256) if "tiny" in settings.shapes else (4096, 14_336)
    shape, per_call = ((D, F), 1) if op == "linear" else ((F, D), 2)
    nbytes = shape[0] * kind.row_nbytes(shape[1]) * per_call
    calls = 2 if settings.quick else -(-L2_NBYTES // nbytes)
    weights = [arrays.random(shape, kind) for _ in range(calls * per_call)]
    norm = arrays.ones(D)
    for T in (1, 64) if settings.quick else (1, 2, 4, 8, 16, 32, 128, 512, 2048):
        x, h = (arrays.upload(np.ones((T, n), np.float32)) for n in (D, F))
        program = backend.runtime.program()
        for i in range(calls):
            if op == "linear":
                program.add(op, {"x": h, "weight": weights[i], "residual": x, "out": x})
            else:
                gate, up = weights[2 * i : 2 * i + 2]
                arguments = {"x": x, "norm": norm, "gate": gate, "up": up, "out": h}
                program.add(op, arguments, {"eps": 1e-5, "activation": 0})
        program.finish()
        with backend.device:
            program.capture()
        seconds = seconds_of(backend, program.replay, settings.repeats) / calls
        kernels = [symbol.partition("__")[2] for symbol in program.symbols[: len(program.symbols) // calls]]
        program.close()
        rate, flops = nbytes / seconds, 2 * T * D * F * per_call / seconds
        say(
            f"{op:<20}{dtype:>6}{T:6}{seconds * 1e6:9.1f}{rate / 1e9:8.0f}{rate / peak:8.1%}{flops / 1e12:9.1f}"
            f"  {' + '.join(kernels)}"
        )


def load(settings: Settings) -> None:
    """Weights from a mapped file in the page cache to the device, against the bus."""
    nbytes = 32 << 20 if settings.quick else 4 << 30
    backend = settings.open()
    device, stream = backend.device, backend.runtime.stream
    host, memory = device.pinned(64 << 20), device.alloc(64 << 20)
    bus = (64 << 20) / seconds_of(backend, lambda: device.copy_h2d(memory.address, host.address, 64 << 20, stream), 5)
    with tempfile.NamedTemporaryFile() as file:
        chunk = np.random.default_rng(0).standard_normal(1 << 22, dtype=np.float32).astype(np.float16).tobytes()
        for _ in range(nbytes // len(chunk)):
            file.write(chunk)
        file.flush()
        mapped = np.memmap(file.name, np.float16, "r").reshape(-1, 4096)
        int(mapped[::1, 0].astype(np.int32).sum())  # into the page cache and this process's tables
        rows = len(mapped) // 8
        tensors = {f"t{i}": Tensor.from_numpy(mapped[i * rows : (i + 1) * rows]) for i in range(8)}
        for dtype in ("auto", "auto", "bf16"):
            model = ModelWeights(tensors, {}, file.name, {}, 1, lambda *_: None)
            start = time.perf_counter()
            handle = backend.upload_weights(model, dtype=dtype)
            rate = handle.nbytes / (time.perf_counter() - start)
            what = "as stored" if dtype == "auto" else f"converted to {dtype}"
            share = f"{rate / bus:.0%} of the bus ({bus / 1e9:.1f})"
            say(f"upload {handle.nbytes / 1e9:.1f} GB {what}: {rate / 1e9:.1f} GB/s, {share}")
            del handle
            device.trim()
    backend.close()


def cold(settings: Settings) -> None:
    """A new process from start to first token, with the demonstration model."""
    code = (
        "import time; t0 = time.perf_counter()\n"
        "import gllm_driver as g; t1 = time.perf_counter()\n"
        "llm = g.load(device='cuda', context_length=512); t2 = time.perf_counter()\n"
        "s = llm.stream('def f(', max_tokens=2, temperature=0, ignore_eos=True); next(s); t3 = time.perf_counter()\n"
        "print(f'import {t1 - t0:.3f} s, load {t2 - t1:.3f} s, first token {t3 - t2:.3f} s')\n"
    )
    for _ in range(2):
        start = time.perf_counter()
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
        say(f"{(done.stdout or done.stderr[-600:]).strip()}, whole process {time.perf_counter() - start:.2f} s")


SECTIONS: dict[str, Callable[[Settings], None]] = {
    "device": device,
    "copy": copy,
    "decode": decode,
    "ops": ops,
    "prefill": prefill,
    "batch": batch,
    "swap": swap,
    "load": load,
    "cold": cold,
}
