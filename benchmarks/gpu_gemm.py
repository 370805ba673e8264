#!/usr/bin/env python3
"""Check and time the products of many tokens on a GPU: warpgroup kernels (sm_90a), mma kernels, torch's library beside.

First every kernel at ragged shapes against float64: where a result is wrong, which tiles and elements. Then TFLOP/s at
the shapes of an 8B, weights in rotation so that none is found in the L2 cache. Needs torch with CUDA, the reference.

python benchmarks/gpu_gemm.py [--quick] [--variants FILE.cubin]
"""

from __future__ import annotations

import re
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import click
import numpy as np

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from gllm_driver.driver import open_device  # noqa: E402
from gllm_driver.driver.launch import Function, PackedParams  # noqa: E402
from gllm_driver.driver.module import KernelLibrary  # noqa: E402
from gllm_driver.driver.tensor_map import encode_tensor_map  # noqa: E402
from gllm_driver.launch import DeviceProps, Launch, _wgmma, launches  # noqa: E402
from gllm_driver.launch.base import TensorMap, ceil_div  # noqa: E402
from gllm_driver.ops import CONTRACTS  # noqa: E402
from gllm_driver.types import DTYPES, Tensor  # noqa: E402

ROTATION_NBYTES = 256 << 20  # of weights: several times the L2 cache
TOLERANCE = 1e-4  # ‖out − reference‖ / ‖reference‖, the reference being of operands rounded alike
NAMES = {"float32": "f32", "float16": "f16", "bfloat16": "bf16", "int32": "i32", "int64": "i64"}
PRODUCTS = (
    ("qkv", 4096, 6144),
    ("output", 4096, 4096),
    ("gate+up", 4096, 28672),
    ("down", 14336, 4096),
)  # K, N of an 8B

Arrays = Mapping[str, Any]  # torch tensors


class Bench:
    """One device, whose memory torch manages, and the kernels."""

    def __init__(self) -> None:
        import torch

        self.torch = torch
        torch.zeros(1, device="cuda")  # the primary context, which the driver package shares
        self.device = open_device()
        self.library = KernelLibrary(self.device)
        self.stream = self.device.stream()
        p = self.device.properties
        self.props = DeviceProps(p.cc, p.num_sms, p.max_smem_optin)
        self.scratch = torch.empty(1 << 30, dtype=torch.uint8, device="cuda")

    def normal(self, *shape: int, dtype: str = "f32", scale: float = 1.0) -> Any:
        kinds = {"f32": self.torch.float32, "f16": self.torch.float16, "bf16": self.torch.bfloat16}
        values = self.torch.randn(*shape, device="cuda", dtype=self.torch.float32) * scale
        return values.to(kinds[dtype])

    def tensor(self, array: Any) -> Tensor:
        return Tensor(array.data_ptr(), tuple(array.shape), DTYPES[NAMES[str(array.dtype).removeprefix("torch.")]])

    def plan(
        self, op: str, arrays: Arrays, scalars: Mapping[str, float], shape: _wgmma.WgmmaShape | None
    ) -> tuple[np.ndarray, list[Launch]]:
        """The launches of a call with one tile shape for its warpgroup kernel; None: with the mma kernels."""
        tensors = {name: self.tensor(array) for name, array in arrays.items()}
        dtypes = {name: t.dtype.name for name, t in tensors.items()}
        args = CONTRACTS[op].bind(tensors, scalars)
        kept = _wgmma.SHAPES, _wgmma.MIN_TOKENS
        _wgmma.SHAPES, _wgmma.MIN_TOKENS = ((shape,), 1) if shape else (kept[0], 1 << 30)
        try:
            return args, launches(op, args, dtypes, self.props, deterministic=False)
        finally:
            _wgmma.SHAPES, _wgmma.MIN_TOKENS = kept

    def ready(
        self, args: np.ndarray, todo: Sequence[Launch], find: Callable[[str], Function] | None = None
    ) -> Callable[[], None]:
        """What issues the launches."""
        find = find or self.library.function
        extra = self.scratch.data_ptr(), 0, encode_tensor_map
        with self.device:
            calls = [(find(x.symbol), x, PackedParams(*x.params(args, *extra))) for x in todo]

        def issue() -> None:
            for function, x, params in calls:
                function.launch(x.grid, x.block, x.smem_nbytes, self.stream, params)

        return issue

    def run(self, issue: Callable[[], None]) -> None:
        self.torch.cuda.synchronize()
        with self.device:
            issue()
            self.stream.synchronize()

    def seconds(self, issues: Sequence[Callable[[], None]], replays: int = 7) -> float:
        """Median time of one of `issues`, which are run one after another as a graph."""

        def record() -> None:
            for issue in issues:
                issue()

        times = []
        self.torch.cuda.synchronize()
        with self.device:
            record()
            graph = self.stream.capture(record)
            begin, end = self.device.event(timing=True), self.device.event(timing=True)
            for _ in range(replays + 2):
                begin.record(self.stream)
                graph.launch(self.stream)
                end.record(self.stream)
                end.synchronize()
                times.append(end.elapsed_ms(begin) / 1e3 / len(issues))
            graph.close()
        return statistics.median(times[2:])

    def torch_seconds(self, calls: Sequence[Callable[[], object]], replays: int = 5) -> float:
        """The same for torch calls, without a graph."""
        times = []
        for _ in range(replays + 2):
            begin, end = (self.torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            for call in calls:
                call()
            end.record()
            end.synchronize()
            times.append(begin.elapsed_time(end) / 1e3 / len(calls))
        return statistics.median(times[2:])


def error_of(out: Any, reference: Any) -> float:
    """Relative error in the norm; infinite where anything is not finite."""
    difference = (out.double() - reference).norm() / reference.norm()
    value = float(difference)
    return value if np.isfinite(value) else float("inf")


def diagnose(out: Any, reference: Any, tokens: int, rows: int) -> None:
    """Which tiles and elements of a wrong result are wrong, and how."""
    wrong = ((out.double() - reference).abs() > 1e-2 * reference.abs().max()) | ~out.isfinite()
    t, n = out.shape
    strange = int((~out.isfinite()).sum()), int((out == 0).sum())
    print(f"    {int(wrong.sum())} of {t * n} elements wrong; {strange[0]} not finite, {strange[1]} zero")
    grid = [
        "".join(
            "x" if bool(wrong[i : i + tokens, j : j + rows].any()) else "." for j in range(0, min(n, 40 * rows), rows)
        )
        for i in range(0, min(t, 12 * tokens), tokens)
    ]
    print("    tiles: " + " ".join(grid))
    tile = wrong[:tokens, :rows]
    print("    first tile, rows wrong: " + "".join("x" if bool(row.any()) else "." for row in tile[:128]))
    print("    first tile, columns wrong: " + "".join("x" if bool(c.any()) else "." for c in tile.T[:256]))
    for i, j in wrong.nonzero()[:6].tolist():
        got, want = float(out[i, j]), float(reference[i, j])
        print(f"    [{i}, {j}] = {got:.5g}, expected {want:.5g}")


def report(name: str, out: Any, reference: Any, shape: _wgmma.WgmmaShape) -> bool:
    error = error_of(out, reference)
    is_right = error <= TOLERANCE
    print(f"  {name:<58} {error:.1e}{'' if is_right else '  WRONG'}", flush=True)
    if not is_right:
        diagnose(out, reference, shape.tokens, shape.rows)
    return is_right


def check_linear(b: Bench) -> bool:
    """Every kernel of linear at ragged shapes."""
    right = True
    for dtype in ("bf16", "f16"):
        for shape in _wgmma.SHAPES:
            for T, K, N in ((128, 64, 256), (128, 1024, 256), (130, 200, 302), (513, 1032, 1026), (2048, 4096, 4096)):
                full = T != 128
                a = {"x": b.normal(T, K), "weight": b.normal(N, K, dtype=dtype)}
                if full:
                    a |= {"bias": b.normal(N, scale=10), "residual": b.normal(T, N, scale=10)}
                a["out"] = b.normal(T, N) * float("nan")
                args, todo = b.plan("linear", a, {}, shape)
                b.run(b.ready(args, todo))
                reference = a["x"].to(a["weight"].dtype).double() @ a["weight"].double().T
                if dtype == "f16":  # rows are scaled by powers of two before they are rounded
                    top = a["x"].abs().amax(1, keepdim=True)
                    scale = b.torch.exp2(14 - b.torch.floor(b.torch.log2(top)))
                    reference = ((a["x"] * scale).half().double() / scale.double()) @ a["weight"].double().T
                if full:
                    reference = reference + a["bias"].double() + a["residual"].double()
                right &= report(
                    f"{todo[-1].symbol} {T}x{K}x{N}{' +bias+residual' if full else ''}", a["out"], reference, shape
                )
    return right


def gate_up_arrays(b: Bench, T: int, D: int, F: int, dtype: str) -> dict[str, Any]:
    weights = {name: b.normal(F, D, dtype=dtype, scale=D**-0.5) for name in ("gate", "up")}
    return {"x": b.normal(T, D), "norm": b.normal(D), **weights, "out": b.normal(T, F) * float("nan")}


def qkv_arrays(b: Bench, T: int, D: int, heads: int, kv_heads: int, dtype: str, head_dim: int = 128) -> dict[str, Any]:
    torch, pages = b.torch, ceil_div(T, 16)
    sizes = {"wq": heads * head_dim, "wk": kv_heads * head_dim, "wv": kv_heads * head_dim}
    angles = torch.outer(
        torch.arange(T, device="cuda"), 1e4 ** -(torch.arange(head_dim // 2, device="cuda") / head_dim * 2)
    )
    return {
        "x": b.normal(T, D),
        "norm": b.normal(D),
        **{name: b.normal(n, D, dtype=dtype, scale=D**-0.5) for name, n in sizes.items()},
        "q_norm": b.normal(head_dim),
        "k_norm": b.normal(head_dim),
        "cos_sin": torch.stack((angles.cos(), angles.sin()), 1).float().contiguous(),
        "positions": torch.arange(T, device="cuda"),
        "seq": torch.zeros(T, dtype=torch.int32, device="cuda"),
        "page_table": torch.randperm(pages, device="cuda").to(torch.int32)[None].contiguous(),
        "kv": b.normal(pages, 1, 2, kv_heads, 16, head_dim, dtype=dtype),
        "q": b.normal(T, heads * head_dim) * float("nan"),
    }


FUSED: tuple[tuple[str, dict[str, float], str], ...] = (
    ("fused_gate_up_silu", {"eps": 1e-5, "activation": 0}, "out"),
    ("fused_gate_up_silu", {"eps": 1e-5, "activation": 1}, "out"),
    ("fused_qkv_rope", {"layer": 0, "rope_style": 0, "eps": 1e-5, "qk_eps": 1e-6}, "q"),
)


def check_fused(b: Bench) -> bool:
    """The fused ops against their mma kernels."""
    right = True
    for op, scalars, out in FUSED:
        for dtype in ("bf16", "f16"):
            for shape in _wgmma.SHAPES:
                for T in (130, 1000):
                    a = gate_up_arrays(b, T, 1032, 514, dtype) if out == "out" else qkv_arrays(b, T, 1032, 6, 2, dtype)
                    b.run(b.ready(*b.plan(op, a, scalars, None)))
                    expected = {name: a[name].double().clone() for name in (out, "kv") if name in a}
                    a[out].fill_(float("nan"))
                    args, todo = b.plan(op, a, scalars, shape)
                    b.run(b.ready(args, todo))
                    for name, reference in expected.items():
                        got, want = (x.reshape(x.shape[0], -1) for x in (a[name], reference))
                        if name == "kv":  # rounded to 16 bits, and a last bit may fall the other way
                            ok = error_of(got, want) < 2e-3
                            print(f"  {op} kv {'ok' if ok else 'WRONG'} {error_of(got, want):.1e}")
                            right &= ok
                        else:
                            right &= report(
                                f"{todo[1].symbol} {T}{' gelu' if scalars.get('activation') else ''}", got, want, shape
                            )
    return right


def rotated(b: Bench, K: int, N: int, dtype: str) -> list[Any]:
    count = max(1, min(8, ceil_div(ROTATION_NBYTES, N * K * 2)))
    return [b.normal(N, K, dtype=dtype) for _ in range(count)]


def time_products(b: Bench, tokens: Sequence[int], dtype: str, variants: Mapping[str, Function]) -> None:
    """TFLOP/s of linear: whole op, the product alone, other variants, the library."""
    for name, K, N in PRODUCTS:
        weights = rotated(b, K, N, dtype)
        for T in tokens:
            x, out, half = b.normal(T, K), b.normal(T, N), b.normal(T, K, dtype=dtype)
            residual = b.normal(T, N)
            flops = 2 * T * K * N
            plans = {}
            for label, shape in (("mma", None), *((s.name, s) for s in _wgmma.SHAPES)):
                plans[label] = [
                    b.plan("linear", {"x": x, "weight": w, "residual": residual, "out": out}, {}, shape)
                    for w in weights
                ]
            line = [f"{name} T={T}"]
            for label, calls in plans.items():
                whole = b.seconds([b.ready(args, todo) for args, todo in calls])
                alone = b.seconds([b.ready(args, todo[1:]) for args, todo in calls])
                line.append(f"{label} {flops / whole / 1e12:.0f} (product {flops / alone / 1e12:.0f})")
            library = b.torch_seconds([partial(b.torch.matmul, half, w.T) for w in weights])
            line.append(f"library {flops / library / 1e12:.0f}")
            print("  " + ", ".join(line), flush=True)
            if variants and T >= 2048 and dtype == "bf16":
                time_variants(b, variants, plans[_wgmma.LARGE.name], T, K, N, flops)


def time_variants(
    b: Bench,
    variants: Mapping[str, Function],
    calls: list[tuple[np.ndarray, list[Launch]]],
    T: int,
    K: int,
    N: int,
    flops: int,
) -> None:
    """Kernels of a file of experiments, whose names say their tiles: <what>_<tokens>x<rows>_s<stages>…"""
    line = []
    for name, function in variants.items():
        tokens, rows, stages = map(int, re.findall(r"(\d+)x(\d+)_s(\d+)", name)[0])
        shape = _wgmma.WgmmaShape(tokens, rows, stages)
        issues = []
        for args, _ in calls:
            maps = [TensorMap(int(args["weight"]), N, K, "bf16", rows)]
            nbytes = _wgmma.rows_nbytes(T, K)
            x = _wgmma.product("linear", "bf16", T, K, ceil_div(N, rows), shape, maps, b.props, nbytes)
            issues.append(b.ready(args, [x], lambda _, f=function: f))
        line.append(f"{name.partition('__')[2]} {flops / b.seconds(issues, 5) / 1e12:.0f}")
    print("      " + ", ".join(line), flush=True)


def time_fused(b: Bench, T: int, dtype: str) -> None:
    """Microseconds of the fused ops, kernel by kernel."""
    for op, scalars, out in FUSED[::2]:
        a = gate_up_arrays(b, T, 4096, 14336, dtype) if out == "out" else qkv_arrays(b, T, 4096, 32, 8, dtype)
        flops = 2 * T * 4096 * (28672 if out == "out" else 6144)
        for label, shape in (("mma", None), *((s.name, s) for s in _wgmma.SHAPES)):
            args, todo = b.plan(op, a, scalars, shape)
            whole = b.seconds([b.ready(args, todo)] * 4)
            parts = [b.seconds([b.ready(args, [x])] * 4) for x in todo]
            each = ", ".join(f"{x.symbol.partition('__')[2]} {s * 1e6:.0f}" for x, s in zip(todo, parts, strict=True))
            print(
                f"  {op} T={T} {label}: {flops / whole / 1e12:.0f} TFLOP/s, {whole * 1e6:.0f} us ({each})", flush=True
            )


@click.command(help=(__doc__ or "").split("\n\n")[0])
@click.option("--quick", is_flag=True, help="Correctness, and 2048 tokens in bf16 only.")
@click.option(
    "--variants", "file", type=click.Path(exists=True, path_type=Path), help="A cubin of experiments to time."
)
def main(quick: bool, file: Path | None) -> None:
    b = Bench()
    b.torch.manual_seed(0)
    print(f"{b.torch.cuda.get_device_name()}, {b.props.num_sms} SMs, kernels of {', '.join(b.library.archs)}")
    print("relative errors")
    is_right = check_linear(b)
    is_right &= check_fused(b)
    print("TFLOP/s")
    variants: dict[str, Function] = {}
    if file is not None:
        with b.device:
            module = b.device.load(file.read_bytes(), file.name)
            variants = {symbol: module.function(symbol) for symbol in module.symbols()}
    time_products(b, (2048,) if quick else (512, 2048, 8192), "bf16", variants)
    time_fused(b, 2048, "bf16")
    if not quick:
        time_products(b, (2048,), "f16", {})
    print("all right" if is_right else "WRONG results above")
    sys.exit(0 if is_right else 1)


if __name__ == "__main__":
    main()
