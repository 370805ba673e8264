#!/usr/bin/env python3
"""Time the attention kernels on a GPU: decode against the memory's bandwidth, prefill against the tensor cores' peak.

Each figure is the median over replays of a CUDA graph that runs the op once per layer of a cache larger than the L2
cache, so that no launch finds the last one's keys there.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import click
import numpy as np

from gllm_driver.driver import open_device
from gllm_driver.driver.launch import PackedParams
from gllm_driver.driver.manifest import FOLDER
from gllm_driver.driver.memory import DeviceBuffer
from gllm_driver.driver.module import KernelLibrary
from gllm_driver.driver.tensor_map import encode_tensor_map
from gllm_driver.launch import DeviceProps, launches
from gllm_driver.ops import CONTRACTS
from gllm_driver.types import DTYPES, F32, I32, I64, Tensor

CACHE_NBYTES = 256 << 20  # at least: several times any L2 cache
PAGE_SIZE = 16


@dataclass(frozen=True)
class Shape:
    """A step: `sequences` of `tokens` new tokens each, after `context` cached ones."""

    sequences: int
    tokens: int
    context: int
    heads: int = 32
    kv_heads: int = 8
    head_dim: int = 128
    window: int = 0

    @property
    def total(self) -> int:
        return self.context + self.tokens

    @property
    def seen(self) -> int:
        """(query, key) pairs of all sequences."""
        ends = np.arange(self.context, self.total, dtype=np.int64) + 1
        return self.sequences * int((np.minimum(ends, self.window) if self.window else ends).sum())

    @property
    def flops(self) -> int:
        return 4 * self.seen * self.heads * self.head_dim

    @property
    def cache_nbytes(self) -> int:
        """Bytes of keys and values that one decode step has to read, in 16-bit types."""
        return self.sequences * min(self.total, self.window or self.total) * self.kv_heads * self.head_dim * 2 * 2

    @property
    def op(self) -> str:
        return "paged_attention" if self.tokens == 1 else "flash_attention"


DECODE = (
    *(Shape(1, 1, n - 1) for n in (512, 4096, 32_768, 131_072, 1_000_000)),
    *(Shape(n, 1, 4095) for n in (8, 32, 128)),
    Shape(1, 1, 8191, heads=64),
    Shape(1, 1, 8191, heads=16),
    Shape(1, 1, 8191, heads=14, kv_heads=2, head_dim=64),
    Shape(1, 1, 8191, heads=16, kv_heads=8, head_dim=256),
    Shape(1, 1, 131_071, window=4096),
)
PREFILL = (
    *(Shape(1, n, 0) for n in (512, 2048, 8192, 16_384)),
    Shape(16, 512, 0),
    Shape(1, 512, 32_256),
    Shape(1, 8192, 0, kv_heads=32),
    Shape(1, 8192, 0, heads=32, head_dim=64),
    Shape(1, 8192, 0, heads=16, head_dim=256),
    Shape(1, 8192, 0, window=1024),
)


class Bench:
    """One device, its kernels, and memory for the arrays of a call."""

    def __init__(self, cubins: Path) -> None:
        self.device = open_device()
        self.library = KernelLibrary(self.device, cubins)
        self.stream = self.device.stream()
        p = self.device.properties
        self.props = DeviceProps(p.cc, p.num_sms, p.max_smem_optin)

    def upload(self, values: np.ndarray, copies: int = 1) -> DeviceBuffer:
        """The bytes of `values`, several times over."""
        buffer = self.device.alloc(values.nbytes * copies)
        for i in range(copies):
            self.device.copy_h2d(buffer.address + i * values.nbytes, values.ctypes.data, values.nbytes)
        return buffer

    def arrays(self, shape: Shape, dtype: str) -> tuple[dict[str, Tensor], list[DeviceBuffer], int]:
        """Tensors of one call, the memory to free afterwards, and the number of layers."""
        g = np.random.default_rng(0)
        pages_per_sequence = -(-shape.total // PAGE_SIZE)
        num_pages = pages_per_sequence * shape.sequences
        page = 2 * shape.kv_heads * PAGE_SIZE * shape.head_dim
        layers = max(1, min(16, CACHE_NBYTES // (num_pages * page * 2)))
        numbers = g.standard_normal(layers * page, dtype=np.float32)
        halves = numbers.astype(np.float16) if dtype == "f16" else (numbers.view(np.uint32) >> 16).astype(np.uint16)
        T = shape.sequences * shape.tokens
        positions = np.tile(np.arange(shape.context, shape.total, dtype=np.int64), shape.sequences)
        table = g.permutation(num_pages).astype(np.int32).reshape(shape.sequences, -1)
        q = g.standard_normal((T, shape.heads * shape.head_dim), dtype=np.float32)
        offsets = np.arange(shape.sequences + 1, dtype=np.int32) * shape.tokens
        hosts: dict[str, np.ndarray] = {
            "q": q,
            "page_table": table,
            "positions": positions,
            "offsets": offsets,
            "out": q,
        }
        types = {"q": F32, "page_table": I32, "positions": I64, "offsets": I32, "out": F32}
        buffers = {name: self.upload(values) for name, values in hosts.items()}
        buffers["kv"] = self.upload(halves, num_pages)
        tensors = {name: Tensor(buffers[name].address, values.shape, types[name]) for name, values in hosts.items()}
        kv_shape = (num_pages, layers, 2, shape.kv_heads, PAGE_SIZE, shape.head_dim)
        tensors["kv"] = Tensor(buffers["kv"].address, kv_shape, DTYPES[dtype])
        if shape.op == "paged_attention":
            del tensors["offsets"]
        return tensors, list(buffers.values()), layers

    def time(self, shape: Shape, dtype: str, replays: int, *, deterministic: bool) -> tuple[float, str]:
        """Seconds per call, and the kernels that ran."""
        tensors, buffers, layers = self.arrays(shape, dtype)
        dtypes: Mapping[str, str] = {name: t.dtype.name for name, t in tensors.items()}
        todo, workspace = [], 0
        for layer in range(layers):
            scalars = {"layer": layer, "window": shape.window, "scale": shape.head_dim**-0.5}
            args = CONTRACTS[shape.op].bind(tensors, scalars)
            for launch in launches(shape.op, args, dtypes, self.props, deterministic):
                todo.append((args, launch))
                workspace = max(workspace, launch.workspace_nbytes)
        buffers.append(self.device.alloc(max(256, workspace)))
        counters = np.zeros(1 + max(x.num_counters for _, x in todo), np.int32)
        buffers.append(self.upload(counters))
        extra = buffers[-2].address, buffers[-1].address, encode_tensor_map
        calls = [(self.library.function(x.symbol), x, PackedParams(*x.params(args, *extra))) for args, x in todo]

        def record() -> None:
            for function, x, params in calls:
                function.launch(x.grid, x.block, x.smem_nbytes, self.stream, params)

        seconds = []
        with self.device:
            record()  # opts in to shared memory, which a capture may not
            graph = self.stream.capture(record)
            begin, end = self.device.event(timing=True), self.device.event(timing=True)
            for _ in range(replays + 1):
                begin.record(self.stream)
                graph.launch(self.stream)
                end.record(self.stream)
                end.synchronize()
                seconds.append(end.elapsed_ms(begin) / 1e3 / layers)
            graph.close()
        for buffer in buffers:
            buffer.free()
        return statistics.median(seconds[1:]), " + ".join(
            x.symbol.partition("__")[2] for _, x in todo[: len(todo) // layers]
        )


@click.command()
@click.option("--dtype", type=click.Choice(["f16", "bf16"]), default="bf16", help="Element type of the cache.")
@click.option("--bandwidth", default=4.8e12, help="Memory bandwidth in bytes a second (default: H200).")
@click.option("--peak", default=989e12, help="Dense 16-bit tensor-core peak in FLOP a second (default: H200).")
@click.option("--cubins", type=click.Path(path_type=Path), default=FOLDER, help="Folder of the manifest.")
@click.option("--replays", default=20, help="Timed replays per figure.")
@click.option("--deterministic/--fast", default=False, help="Mode of the launch arithmetic.")
@click.option("--tiny", is_flag=True, help="One small shape of each kind: for the simulated device.")
def main(
    dtype: str, bandwidth: float, peak: float, cubins: Path, replays: int, *, deterministic: bool, tiny: bool
) -> None:
    """Print a table of attention timings on the first GPU."""
    bench = Bench(cubins)
    click.echo(f"{bench.device.name}, cc {bench.props.cc[0]}.{bench.props.cc[1]}, cache {dtype}")
    click.echo(f"{'seqs':>5} {'tokens':>6} {'context':>8} {'heads':>7} {'dim':>4} {'window':>6} {'us':>10}  rate")
    shapes = (Shape(2, 1, 30, 4, 2, 64), Shape(1, 20, 5, 4, 2, 64)) if tiny else (*DECODE, *PREFILL)
    for shape in shapes:
        seconds, kernels = bench.time(shape, dtype, replays, deterministic=deterministic)
        heads = f"{shape.heads}/{shape.kv_heads}"
        if shape.tokens == 1:
            rate = shape.cache_nbytes / seconds
            said = f"{rate / 1e9:8.1f} GB/s    {rate / bandwidth:5.1%} of bandwidth"
        else:
            rate = shape.flops / seconds
            said = f"{rate / 1e12:8.1f} TFLOP/s {rate / peak:5.1%} of peak"
        click.echo(
            f"{shape.sequences:5} {shape.tokens:6} {shape.context:8} {heads:>7} {shape.head_dim:4} {shape.window:6} "
            f"{seconds * 1e6:10.1f}  {said}  {kernels}"
        )


if __name__ == "__main__":
    main()
