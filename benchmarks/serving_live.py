"""The workloads of serving_sim.py on a model: what chunked prefill, prefix reuse and swapping are worth here.

    python benchmarks/serving_live.py [--model M] [--threads N] [--device D] [--only chunks|reuse|memory] [--scale X]

Every request is read in the same thread; times are those at which tokens became readable. Before a table, the same
outputs are checked against each other: how requests share steps and memory must not change a token.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence

from serving_sim import (
    CHUNKING,
    LATENCY,
    MEMORY,
    REUSE,
    THROUGHPUT,
    Job,
    Outcome,
    Setting,
    crowd,
    memory_settings,
    queue,
    shared_prefix,
    table,
)

import gllm_driver as gllm
from gllm_driver.config import SamplingConfig
from gllm_driver.engine import Request


def serve(jobs: Sequence[Job], setting: Setting, arguments: argparse.Namespace) -> tuple[Outcome, list[list[int]]]:
    """Run a workload; what it measured, and the outputs."""
    with gllm.load(
        arguments.model,
        device=arguments.device,
        threads=arguments.threads,
        context_length=1024,
        deterministic=True,
        max_batch=setting.max_batch,
        chunk_size=setting.chunk_size,
        prefix_reuse=setting.prefix_reuse,
        kv_tokens=max(setting.kv_tokens, 1024),
        cpu_reserve_mb=setting.cpu_reserve_mb,
    ) as llm:
        engine = llm._engine
        warm_up = jobs[: setting.max_batch]  # kernels compiled, memory touched, steps of these shapes recorded
        for _ in range(1 + arguments.warm):
            for handle in [engine.submit(Request(job.prompt[:-1][::-1], SamplingConfig(), 8)) for job in warm_up]:
                handle.result()
        before = engine.metrics
        start = time.perf_counter()
        outcome = Outcome([[] for _ in jobs], jobs)

        def watch(i: int):  # type: ignore[no-untyped-def]
            return lambda token: outcome.times[i].append(time.perf_counter() - start)

        handles = [
            engine.submit(Request(job.prompt, SamplingConfig(), job.max_tokens, on_token=watch(i)))
            for i, job in enumerate(jobs)
        ]
        outputs = [handle.result() for handle in handles]
        metrics = engine.metrics
        engine.audit()
        outcome.counts = {
            "reused": (metrics.cached_tokens - before.cached_tokens) / sum(len(job.prompt) for job in jobs),
            "preempted": metrics.preemptions - before.preemptions,
            "swapped": metrics.swapped_out_pages - before.swapped_out_pages,
            "thrash": engine.manager.stats().thrash_rate,
            "steps": metrics.steps - before.steps,
        }
        return outcome, outputs


def compare(
    title: str, jobs: Sequence[Job], settings: Sequence[Setting], columns: Sequence[str], arguments: argparse.Namespace
) -> None:
    rows, outputs = {}, {}
    for setting in settings:
        outcome, outputs[setting.name] = serve(jobs, setting, arguments)
        rows[setting.name] = outcome.row()
    first, *others = outputs.items()
    for name, output in others:
        if output != first[1]:
            raise SystemExit(f"{title}: {name} says something else than {first[0]}")
    print(table(title, rows, columns))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="without it, the demonstration model")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--only", choices=("chunks", "reuse", "memory"))
    parser.add_argument("--scale", type=float, default=1.0, help="of the number of requests")
    parser.add_argument("--warm", type=int, default=0, help="more warm-up rounds")
    arguments = parser.parse_args()

    def count(default: int) -> int:
        return max(int(default * arguments.scale), 4)

    if arguments.only in (None, "chunks"):
        jobs = queue(count(64))
        compare(
            f"{len(jobs)} requests, 8 at a time: long prompts among generations", jobs, CHUNKING, LATENCY, arguments
        )
    if arguments.only in (None, "reuse"):
        jobs = shared_prefix(count(100))
        compare(f"{len(jobs)} requests that share 512 tokens", jobs, REUSE, THROUGHPUT, arguments)
    if arguments.only in (None, "memory"):
        jobs = crowd()
        settings = memory_settings(jobs)
        compare("16 requests in less memory than they need", jobs, settings, MEMORY, arguments)


if __name__ == "__main__":
    main()
