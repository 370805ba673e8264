"""Tokens per second of several sequences against one, beside llama.cpp: same GGUF file, same threads, in turn.

    pip install ".[bench]"
    python benchmarks/batch_llama_cpp.py MODEL.gguf [MODEL.gguf …] [--sequences 8] [--threads 2] [--rounds 3]

Each engine runs in a fresh process, generates --tokens tokens greedily for one sequence and then for all of them
together, a few times, and keeps the best of each. gllm-driver goes through its whole engine (scheduler, sampling,
tokens to the caller); llama.cpp decodes batches of given tokens and reads no logits, as its own benchmark does.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

REPEATS = 3
PROMPT = 8


def prompt_of(sequence: int) -> list[int]:
    return [100 + 10 * sequence + i for i in range(PROMPT)]


def run_gllm(model: str, threads: int, sequences: int, tokens: int) -> dict[str, float]:
    import gllm_driver as gllm
    from gllm_driver.config import SamplingConfig
    from gllm_driver.engine import Request

    best = {"one": 0.0, "all": 0.0}
    context = PROMPT + tokens + 16
    with gllm.load(
        model,
        device="cpu",
        threads=threads,
        context_length=context,
        max_batch=sequences,
        kv_tokens=sequences * (context + 16),
        prefix_reuse=False,
    ) as llm:
        for _ in range(REPEATS):
            for name, count in (("one", 1), ("all", sequences)):
                times: list[list[float]] = [[] for _ in range(count)]
                requests = [
                    Request(
                        prompt_of(i), SamplingConfig(), tokens, on_token=lambda _, at=at: at.append(time.perf_counter())
                    )
                    for i, at in enumerate(times)
                ]
                for handle in [llm._engine.submit(request) for request in requests]:
                    handle.result()
                start = max(at[0] for at in times)  # from here on all of them decode
                done = sum(t > start for at in times for t in at)
                best[name] = max(best[name], done / (max(at[-1] for at in times) - start))
    return best


def run_llama_cpp(model: str, threads: int, sequences: int, tokens: int) -> dict[str, float]:
    import llama_cpp

    silent = llama_cpp.llama_log_callback(lambda *_: None)  # called as long as the process lives: a name keeps it
    llama_cpp.llama_log_set(silent, None)
    llama_cpp.llama_backend_init()
    loaded = llama_cpp.llama_model_load_from_file(model.encode(), llama_cpp.llama_model_default_params())
    params = llama_cpp.llama_context_default_params()
    params.n_ctx = sequences * (PROMPT + tokens + 16)
    params.n_batch = params.n_ubatch = max(512, sequences * PROMPT)
    params.n_seq_max = sequences
    params.n_threads = params.n_threads_batch = threads
    context = llama_cpp.llama_init_from_model(loaded, params)
    memory = llama_cpp.llama_get_memory(context)
    batch = llama_cpp.llama_batch_init(max(512, sequences * PROMPT), 0, 1)

    def decode(rows: list[tuple[int, int, int]]) -> None:  # (token, position, sequence)
        batch.n_tokens = len(rows)
        for i, (token, position, sequence) in enumerate(rows):
            batch.token[i], batch.pos[i] = token, position
            batch.n_seq_id[i], batch.seq_id[i][0] = 1, sequence
            batch.logits[i] = True
        if llama_cpp.llama_decode(context, batch):
            raise SystemExit("llama.cpp cannot decode this batch")

    best = {"one": 0.0, "all": 0.0}
    for _ in range(REPEATS):
        for name, count in (("one", 1), ("all", sequences)):
            llama_cpp.llama_memory_clear(memory, True)
            decode([(token, at, s) for s in range(count) for at, token in enumerate(prompt_of(s))])
            start = time.perf_counter()
            for step in range(tokens - 1):
                decode([(200 + step, PROMPT + step, s) for s in range(count)])
            best[name] = max(best[name], count * (tokens - 1) / (time.perf_counter() - start))
    return best


ENGINES = {"gllm": run_gllm, "llama.cpp": run_llama_cpp}


def in_fresh_process(engine: str, model: str, arguments: argparse.Namespace) -> dict[str, float]:
    command = [sys.executable, __file__, model, "--engine", engine, "--threads", str(arguments.threads)]
    command += ["--sequences", str(arguments.sequences), "--tokens", str(arguments.tokens)]
    run = subprocess.run(command, capture_output=True, text=True)
    if run.returncode:
        sys.exit(f"{engine} failed on {model}:\n{run.stderr[-2000:]}")
    return json.loads(run.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("models", nargs="+")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--sequences", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--engine", choices=ENGINES, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.engine:
        engine = ENGINES[arguments.engine]
        print(json.dumps(engine(arguments.models[0], arguments.threads, arguments.sequences, arguments.tokens)))
        return
    n = arguments.sequences
    print(
        f"| file | engine | 1 sequence, tok/s | {n} sequences, tok/s | ratio (min–max) | {n} sequences, to llama.cpp |"
    )
    print("|---|---|---|---|---|---|")
    for model in arguments.models:
        rounds = [{e: in_fresh_process(e, model, arguments) for e in ENGINES} for _ in range(arguments.rounds)]
        for engine in ENGINES:
            ratios = sorted(r[engine]["all"] / r[engine]["one"] for r in rounds)
            one, every = (statistics.median(r[engine][key] for r in rounds) for key in ("one", "all"))
            beside = statistics.median(r[engine]["all"] / r["llama.cpp"]["all"] for r in rounds)
            print(
                f"| {Path(model).name} | {engine} | {one:.1f} | {every:.1f} | "
                f"{statistics.median(ratios):.2f} ({ratios[0]:.2f}–{ratios[-1]:.2f}) | {beside:.2f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
