#!/usr/bin/env python3
"""Time the CUDA backend on a GPU: copies, ops against the roofline, decoding, prefill, loading, cold start.

Each section runs in a process of its own and prints as it goes, so that one that fails or hangs costs only itself.
Models without a file are random weights of a published shape, made on the device.

python benchmarks/gpu.py [--section copy …] [--model FILE.gguf …] [--shape 8b] [--dtype bf16] [--quick]
"""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import click

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

SECTIONS = ("device", "copy", "decode", "ops", "prefill", "batch", "swap", "load", "cold", "attention")
DTYPES = ("bf16", "f16", "q8_0", "q4_0", "q4_k", "q6_k", "q2_k", "int2_64", "int1_64")


def run_section(name: str, options: list[str], timeout_s: float) -> bool:
    """One section in a new process; its output goes straight through."""
    print(f"\n== {name}", flush=True)
    command = [sys.executable, str(Path(__file__)), "--inside", name, *options]
    if name == "attention":
        command = [sys.executable, str(ROOT / "benchmarks" / "gpu_attention.py"), "--replays", "10"]
    start = time.perf_counter()
    try:
        code = subprocess.run(command, cwd=ROOT, timeout=timeout_s, check=False).returncode
    except subprocess.TimeoutExpired:
        print(f"section {name} stopped after {timeout_s:.0f} s", flush=True)
        return False
    if code:
        print(f"section {name} failed with exit code {code}", flush=True)
    print(f"({time.perf_counter() - start:.1f} s)", flush=True)
    return code == 0


@click.command(help=(__doc__ or "").split("\n\n")[0])
@click.option("--section", "sections", multiple=True, type=click.Choice(SECTIONS), help="Repeatable; default: all.")
@click.option("--model", "models", multiple=True, help="A GGUF file or HF directory to decode with. Repeatable.")
@click.option("--shape", "shapes", multiple=True, default=("0.6b", "8b"), show_default=True, help="0.6b, 1b, 8b, tiny.")
@click.option(
    "--dtype", "dtypes", multiple=True, type=click.Choice(DTYPES), help="Weight types; default: bf16, f16, q8_0, q4_0."
)
@click.option("--quick", is_flag=True, help="Fewer repetitions and shapes.")
@click.option("--deterministic", is_flag=True, help="Time the deterministic mode.")
@click.option("--timeout", default=150.0, show_default=True, help="Seconds per section.")
@click.option("--inside", type=click.Choice(SECTIONS), hidden=True)
def main(
    sections: tuple[str, ...],
    models: tuple[str, ...],
    shapes: tuple[str, ...],
    dtypes: tuple[str, ...],
    quick: bool,
    deterministic: bool,
    timeout: float,
    inside: str | None,
) -> None:
    if inside:
        import gpu_sections

        settings = gpu_sections.Settings(models, shapes, dtypes or DTYPES[:4], quick, deterministic)
        gpu_sections.SECTIONS[inside](settings)
        return
    options = [word for model in models for word in ("--model", model)]
    options += [word for shape in shapes for word in ("--shape", shape)]
    options += [word for dtype in dtypes for word in ("--dtype", dtype)]
    options += ["--quick"] * quick + ["--deterministic"] * deterministic
    results = [run_section(name, options, timeout) for name in sections or SECTIONS]
    sys.exit(0 if all(results) else 1)


if __name__ == "__main__":
    main()
