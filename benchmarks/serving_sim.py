"""Serving many requests: what chunked prefill, prefix reuse and swapping are worth. A run without a model.

    python benchmarks/serving_sim.py                      # simulate with the step costs in step_costs.json
    python benchmarks/serving_sim.py --measure NAME=MODEL # time steps of a model on this machine, and keep them

The scheduler and the KV manager are the real ones; the backend is a table: how long a step with so many decodes and so
many prompt tokens takes, measured once, interpolated between. Time is the table's, so a run of minutes takes a second
and is the same every time. serving_live.py runs the same workloads on a model.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path

from gllm_driver.config import SamplingConfig, SwapConfig
from gllm_driver.kv.manager import KvManager
from gllm_driver.kv.pages import PagePool
from gllm_driver.sched.plan import SchedulerConfig, StepPlan
from gllm_driver.sched.request import Request, RunningSequence
from gllm_driver.sched.scheduler import Scheduler

COSTS = Path(__file__).with_name("step_costs.json")
PAGE = 16


@dataclass(frozen=True)
class Job:
    """A request of a workload: when it comes (seconds), its prompt, how many tokens it wants."""

    at: float
    prompt: list[int]
    max_tokens: int


@dataclass(frozen=True)
class Setting:
    """What is compared."""

    name: str
    max_batch: int = 16
    chunk_size: int | None = 64
    idle_chunk_size: int = 256
    prefix_reuse: bool = True
    kv_tokens: int = 32_768
    cpu_reserve_mb: int = 512


@dataclass
class Outcome:
    """When each token came (seconds since the start), by job, and what else was counted."""

    times: list[list[float]]
    jobs: Sequence[Job]
    counts: dict[str, float] = field(default_factory=dict)

    def row(self) -> dict[str, float]:
        """The figures of a table: latencies in milliseconds, rates in tokens per second."""
        gaps = sorted(b - a for times in self.times for a, b in pairwise(times))
        first = sorted(times[0] - job.at for times, job in zip(self.times, self.jobs, strict=True) if times)
        end = max(times[-1] for times in self.times if times)
        return {
            "gap p50": 1e3 * quantile(gaps, 0.5),
            "gap p99": 1e3 * quantile(gaps, 0.99),
            "gap max": 1e3 * (gaps[-1] if gaps else 0.0),
            "first p50": 1e3 * quantile(first, 0.5),
            "first p99": 1e3 * quantile(first, 0.99),
            "output/s": sum(map(len, self.times)) / end,
            "all in s": end,
            **self.counts,
        }


def quantile(ordered: Sequence[float], q: float) -> float:
    return ordered[min(int(q * len(ordered)), len(ordered) - 1)] if ordered else 0.0


# ---- workloads


def queue(count: int = 64, *, prompt: int = 512, output: int = 64, seed: int = 0) -> list[Job]:
    """A queue that is never empty: long prompts, and generations of some length. When one ends the next one begins, so
    prompts come among the generations all the time."""
    rng = random.Random(seed)
    return [
        Job(
            0.0,
            [rng.randrange(10, 4000) for _ in range(int(rng.uniform(0.5, 1.5) * prompt))],
            int(rng.uniform(0.5, 1.5) * output),
        )
        for _ in range(count)
    ]


def shared_prefix(count: int = 100, *, shared: int = 512, own: int = 16, output: int = 16, seed: int = 0) -> list[Job]:
    """Requests that begin with the same system prompt, all at once."""
    rng = random.Random(seed)
    system = [rng.randrange(10, 4000) for _ in range(shared)]
    return [Job(0.0, [*system, *(rng.randrange(10, 4000) for _ in range(own))], output) for _ in range(count)]


def crowd(count: int = 16, *, prompt: int = 64, output: int = 192, seed: int = 0) -> list[Job]:
    """Requests that all run at once, and together need count × (prompt + output) tokens of KV."""
    rng = random.Random(seed)
    return [Job(0.0, [rng.randrange(10, 4000) for _ in range(prompt)], output) for _ in range(count)]


# ---- the simulation


class StepCosts:
    """Seconds of a step by (sequences that decode, prompt tokens): bilinear in a measured table, linear beyond it."""

    def __init__(self, table: dict) -> None:
        self.decodes: list[int] = table["decodes"]
        self.chunks: list[int] = table["chunks"]
        self.seconds: list[list[float]] = table["seconds"]  # [decodes][chunks]
        self.page_copy_s: float = table["page_copy_s"]

    def __call__(self, decodes: int, prompt_tokens: int) -> float:
        i, u = _place(self.decodes, decodes)
        j, v = _place(self.chunks, prompt_tokens)
        low, high = self.seconds[i], self.seconds[i + 1]
        return max((low[j] * (1 - v) + low[j + 1] * v) * (1 - u) + (high[j] * (1 - v) + high[j + 1] * v) * u, 0.0)


def _place(points: Sequence[int], value: float) -> tuple[int, float]:
    i = min(max(bisect_right(points, value) - 1, 0), len(points) - 2)
    return i, (value - points[i]) / (points[i + 1] - points[i])


class _Clock:
    """Time that passes when told to, also by copies of pages."""

    def __init__(self, page_copy_s: float) -> None:
        self.now = 0.0
        self._page_copy_s = page_copy_s

    def __call__(self) -> float:
        return self.now

    def swap_out(self, pages: Sequence[int], slots: Sequence[int]) -> None:
        self.now += len(pages) * self._page_copy_s

    def swap_in(self, slots: Sequence[int], pages: Sequence[int]) -> None:
        self.now += len(pages) * self._page_copy_s


def simulate(jobs: Sequence[Job], setting: Setting, costs: StepCosts) -> Outcome:
    """Run a workload."""
    clock = _Clock(costs.page_copy_s)
    pool = PagePool(-(-setting.kv_tokens // PAGE), PAGE)
    swap = SwapConfig(enable_swap=setting.cpu_reserve_mb > 0, cpu_reserve_mb=setting.cpu_reserve_mb)
    manager = KvManager(
        pool,
        clock,
        swap,
        num_host_slots=4 * pool.num_pages if swap.enable_swap else 0,
        root_key=b"simulation",
        clock=clock,
        prefix_reuse=setting.prefix_reuse,
    )
    config = SchedulerConfig(
        max_batch=setting.max_batch,
        chunk_size=setting.chunk_size,
        idle_chunk_size=setting.idle_chunk_size,
        page_size=PAGE,
    )
    scheduler = Scheduler(manager, config, lambda: pool.num_available)
    outcome = Outcome([[] for _ in jobs], jobs)
    arrivals = sorted(range(len(jobs)), key=lambda i: jobs[i].at)[::-1]
    cached = steps = 0
    while arrivals or not scheduler.is_idle:
        if scheduler.is_idle:
            clock.now = max(clock.now, jobs[arrivals[-1]].at)
        while arrivals and jobs[arrivals[-1]].at <= clock.now:
            i = arrivals.pop()
            request = Request(jobs[i].prompt, SamplingConfig(), jobs[i].max_tokens)
            scheduler.add(
                RunningSequence(i, request, list(request.tokens), len(request.tokens), request.max_tokens, jobs[i].at)
            )
        plan = scheduler.plan()
        clock.now += costs(*_work(plan))
        steps += 1
        for piece in plan.pieces:
            sequence = piece.sequence
            if piece.wants_logits:
                if not sequence.num_output:
                    cached += sequence.progress.cached_tokens
                sequence.tokens.append(11 + sequence.id)
                outcome.times[sequence.id].append(clock.now)
            sequence.num_computed = piece.start + piece.length
            if sequence.num_output == sequence.max_output:
                scheduler.share(sequence)
                scheduler.remove(sequence)
    manager.audit()
    stats = manager.stats()
    outcome.counts = {
        "reused": cached / sum(len(job.prompt) for job in jobs),
        "preempted": scheduler.counters.preemptions,
        "swapped": stats.counters.pages_swapped_out,
        "thrash": stats.thrash_rate,
        "steps": steps,
    }
    return outcome


def _work(plan: StepPlan) -> tuple[int, int]:
    decodes = sum(piece.length == 1 for piece in plan.pieces)
    return decodes, sum(piece.length for piece in plan.pieces) - decodes


# ---- measuring


def measure(model: str | None, threads: int | None, decodes: Sequence[int], chunks: Sequence[int]) -> dict:
    """Time steps of a model on the CPU backend, the best of three: decodes at position 512, chunks of prompts of 512.

    With one thread, processor time is taken, which other work on the machine disturbs less.
    """
    import gllm_driver as gllm
    from gllm_driver.backends.base import SampleRow
    from gllm_driver.types import BatchInput, SequenceInput

    context = 512 + max(chunks)
    room = (max(decodes) + 1) * context
    clock = time.process_time if threads == 1 else time.perf_counter
    with gllm.load(model, device="cpu", threads=threads, context_length=min(context, 1024), kv_tokens=room) as llm:
        engine, backend = llm._engine, llm._engine.backend
        pages = context // PAGE

        def step(d: int, c: int) -> None:
            own = [range(i * pages, (i + 1) * pages) for i in range(d + 1)]
            batch = [SequenceInput([5], 512, own[i]) for i in range(d)]
            if c:
                batch.append(
                    SequenceInput([5] * c, (512 - c) // 2, own[d], False)
                )  # where a chunk of 512 lies on average
            logits = backend.batch_forward_gpu_pure(engine.weights, engine.kv, BatchInput(batch))
            rows = [SampleRow(row, SamplingConfig(), 512) for row in logits if row is not None]
            if rows:
                backend.sample_rows(rows)

        seconds = [[best(lambda d=d, c=c: step(d, c), clock) if d or c else 0.0 for c in chunks] for d in decodes]  # type: ignore[misc]
        backend.alloc_swap_space(engine.kv, 64)
        copy = best(lambda: backend.swap_out_pages(engine.kv, range(64), range(64)), clock) / 64
        device = f"{llm.device}, {backend.num_threads} threads"  # type: ignore[attr-defined]
    return {
        "device": device,
        "date": time.strftime("%Y-%m-%d"),
        "decodes": list(decodes),
        "chunks": list(chunks),
        "seconds": [[float(f"{s:.4g}") for s in row] for row in seconds],
        "page_copy_s": float(f"{copy:.4g}"),
    }


def best(act: Callable[[], object], clock: Callable[[], float], repeats: int = 3) -> float:
    """The shortest of a few runs."""
    act()  # recorded, compiled, memory touched
    times = []
    for _ in range(repeats):
        start = clock()
        act()
        times.append(clock() - start)
    return min(times)


# ---- tables

CHUNKING = [
    Setting("chunks of 64", max_batch=8),
    Setting("chunks of 128", max_batch=8, chunk_size=128),
    Setting("chunks of 256", max_batch=8, chunk_size=256),
    Setting("whole prompts", max_batch=8, chunk_size=None, idle_chunk_size=4096),
]
REUSE = [Setting("reuse"), Setting("no reuse", prefix_reuse=False)]


def memory_settings(jobs: Sequence[Job]) -> list[Setting]:
    """All the memory the jobs need at once, and 60 % of it, swapping and computing again."""
    pages = sum(-(-(len(job.prompt) + job.max_tokens - 1) // PAGE) for job in jobs)
    full = Setting("memory for all", kv_tokens=pages * PAGE, prefix_reuse=False)
    less = pages * 6 // 10 * PAGE
    return [
        full,
        replace(full, name="60 %, swapped", kv_tokens=less),
        replace(full, name="60 %, computed again", kv_tokens=less, cpu_reserve_mb=0),
    ]


def table(title: str, rows: dict[str, dict[str, float]], columns: Sequence[str]) -> str:
    """Markdown."""
    lines = [f"{title}\n", "| | " + " | ".join(columns) + " |", "|---|" + "---|" * len(columns)]
    for name, row in rows.items():
        lines.append(f"| {name} | " + " | ".join(f"{row[column]:.3g}" for column in columns) + " |")
    return "\n".join(lines) + "\n"


LATENCY = ("gap p50", "gap p99", "gap max", "output/s", "all in s")
THROUGHPUT = ("reused", "output/s", "first p50", "all in s")
MEMORY = ("preempted", "swapped", "thrash", "gap p50", "gap p99", "output/s")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--measure", metavar="NAME=MODEL", help="MODEL empty: the demonstration model")
    parser.add_argument("--threads", type=int)
    arguments = parser.parse_args()
    known = json.loads(COSTS.read_text()) if COSTS.exists() else {}
    if arguments.measure:
        name, _, model = arguments.measure.partition("=")
        known[name] = measure(model or None, arguments.threads, (0, 1, 4, 8, 16), (0, 64, 128, 256, 512))
        COSTS.write_text(json.dumps(known, indent=1) + "\n")
    for name, measured in known.items():
        costs = StepCosts(measured)
        print(f"## {name} ({measured['device']}, {measured['date']})\n")
        rows = {setting.name: simulate(queue(), setting, costs).row() for setting in CHUNKING}
        print(table("64 requests, 8 at a time: long prompts among generations", rows, LATENCY))
        rows = {setting.name: simulate(shared_prefix(), setting, costs).row() for setting in REUSE}
        print(table("100 requests that share 512 tokens", rows, THROUGHPUT))
        rows = {setting.name: simulate(crowd(), setting, costs).row() for setting in memory_settings(crowd())}
        print(table("16 requests in less memory than they need", rows, MEMORY))


if __name__ == "__main__":
    main()
