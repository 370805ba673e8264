"""Speed of gllm-driver beside llama.cpp: same GGUF file, same threads, the two in turn, round after round.

    pip install ".[bench]"
    python benchmarks/compare_llama_cpp.py MODEL.gguf [MODEL.gguf …] [--threads N] [--rounds 5]

Each round starts each engine in a fresh process, which times a prefill of --prompt tokens and a decode of --decode
tokens a few times and keeps the best. Printed: the median over rounds, and the median of the ratio within each round,
so that drift of the machine cancels out. The last columns are the share of this machine's read bandwidth that decoding
reaches.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

REPEATS = 3


def prompt_ids(count: int) -> list[int]:
    return np.random.default_rng(0).integers(0, 4000, count).tolist()


def run_gllm(model: str, threads: int, prompt: int, decode: int) -> dict[str, float]:
    import gllm_driver as gllm

    start = time.perf_counter()
    with gllm.load(model, device="cpu", threads=threads, context_length=prompt + decode + 16) as llm:
        load_s = time.perf_counter() - start
        best = {"prefill": 0.0, "decode": 0.0}
        for _ in range(REPEATS):
            prefill = llm.generate(prompt_ids(prompt), max_tokens=1, temperature=0, ignore_eos=True).timings
            generation = llm.generate([1, 2, 3], max_tokens=decode, temperature=0, ignore_eos=True).timings
            best["prefill"] = max(best["prefill"], prefill.prefill_tokens_per_s)
            best["decode"] = max(best["decode"], generation.decode_tokens_per_s)
    return {**best, "load_s": load_s}


def run_llama_cpp(model: str, threads: int, prompt: int, decode: int) -> dict[str, float]:
    import llama_cpp

    start = time.perf_counter()
    llama = llama_cpp.Llama(
        model,
        n_ctx=prompt + decode + 16,
        n_batch=prompt,
        n_ubatch=min(prompt, 512),
        n_threads=threads,
        n_threads_batch=threads,
        verbose=False,
    )
    load_s = time.perf_counter() - start
    best = {"prefill": 0.0, "decode": 0.0}
    for _ in range(REPEATS):
        llama.reset()
        start = time.perf_counter()
        llama.eval(prompt_ids(prompt))
        best["prefill"] = max(best["prefill"], prompt / (time.perf_counter() - start))
        llama.reset()
        llama.eval([1, 2, 3])
        start = time.perf_counter()
        for token in range(decode):
            llama.eval([token])
        best["decode"] = max(best["decode"], decode / (time.perf_counter() - start))
    return {**best, "load_s": load_s}


ENGINES = {"gllm": run_gllm, "llama.cpp": run_llama_cpp}


def read_bandwidth(threads: int) -> float:
    """Bytes per second this machine reads from memory: the best of some passes of numpy over 1 GiB, by threads."""
    from concurrent.futures import ThreadPoolExecutor

    parts = np.ones((threads, (1 << 30) // 8 // threads))
    with ThreadPoolExecutor(threads) as pool:
        best = 0.0
        for _ in range(8):
            start = time.perf_counter()
            list(pool.map(np.max, parts))
            best = max(best, parts.nbytes / (time.perf_counter() - start))
    return best


def in_fresh_process(engine: str, model: str, arguments: argparse.Namespace) -> dict[str, float]:
    command = [sys.executable, __file__, model, "--engine", engine, "--threads", str(arguments.threads)]
    command += ["--prompt", str(arguments.prompt), "--decode", str(arguments.decode)]
    run = subprocess.run(command, capture_output=True, text=True)
    if run.returncode:
        sys.exit(f"{engine} failed on {model}:\n{run.stderr[-2000:]}")
    return json.loads(run.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", nargs="+")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--prompt", type=int, default=512)
    parser.add_argument("--decode", type=int, default=32)
    parser.add_argument("--engine", choices=ENGINES, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.engine:
        engine = ENGINES[arguments.engine]
        print(json.dumps(engine(arguments.models[0], arguments.threads, arguments.prompt, arguments.decode)))
        return
    bandwidth = read_bandwidth(arguments.threads)
    print(f"read bandwidth with {arguments.threads} threads: {bandwidth / 1e9:.1f} GB/s; {arguments.rounds} rounds\n")
    print("| file | phase | gllm tok/s | llama.cpp tok/s | ratio (min–max) | share of bandwidth: gllm | llama.cpp |")
    print("|---|---|---|---|---|---|---|")
    for model in arguments.models:
        rounds = [{e: in_fresh_process(e, model, arguments) for e in ENGINES} for _ in range(arguments.rounds)]
        nbytes = Path(model).stat().st_size
        for phase in ("decode", "prefill"):
            speed = {e: statistics.median(r[e][phase] for r in rounds) for e in ENGINES}
            ratios = sorted(r["gllm"][phase] / r["llama.cpp"][phase] for r in rounds)
            shares = [f"{100 * speed[e] * nbytes / bandwidth:.0f} %" if phase == "decode" else "" for e in ENGINES]
            print(
                f"| {Path(model).name} | {phase} | {speed['gllm']:.1f} | {speed['llama.cpp']:.1f} | "
                f"{statistics.median(ratios):.2f} ({ratios[0]:.2f}–{ratios[-1]:.2f}) | {shares[0]} | {shares[1]} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
