"""Replay access traces through the KV manager under HGAL, LRU, FIFO and Belady, all by whole sequence groups.

    python benchmarks/kv_traces.py [--pages 512] [--plot docs/kv-traces.png] [benchmarks/traces/served.jsonl …]
    python benchmarks/kv_traces.py --record served.jsonl

A trace is JSON lines, one per step: {"t": seconds, "run": {"sequence id": tokens, …}, "closed": [ids]}. "run" names the
sequences the step reads and how many tokens each then has; ids under "closed" ended before the step. The first line may
be {"num_pages": pages to replay it with}. Nothing is computed: the table says which sequences would have been on the
device, and how much would have moved.

hit: accesses, other than a sequence's first, that found it on the device. ws hit: those within a second of its last.
short: swap-outs within a second of the swap-in of the same sequence; thrash: within 100 ms. moved: pages out and in per
access. wait: time per access a step waited because nothing that may leave would have made room. Belady knows the
future and takes the sequence wanted again last, which is no bound where sizes differ. Only HGAL keeps what is Warm or
Protected; the others may take anything but the running batch.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from time import monotonic
from typing import TextIO

from gllm_driver.config import SwapConfig
from gllm_driver.kv.groups import KvStats
from gllm_driver.kv.manager import KvManager
from gllm_driver.kv.pages import PagePool
from gllm_driver.kv.swap import Candidate, Hgal, VictimPolicy

STEP_S = 0.02
PAGE_SIZE = 16
WAIT_S = 0.005  # how often a step that found no room tries again


@dataclass(frozen=True)
class Step:
    """One step of an engine: the sequences it reads with their tokens, those that ended before it."""

    t: float
    run: dict[int, int]
    closed: Sequence[int] = ()


class Lru:
    """Longest unused first."""

    def added(self, group: int, weight: int) -> None: ...
    def resized(self, group: int, weight: int) -> None: ...
    def removed(self, group: int) -> None: ...
    def accessed(self, group: int) -> None: ...

    def recency(self, group: int) -> int:
        return 0

    def is_lir(self, group: int) -> bool:
        return False

    def ranked(self, candidates: Iterable[Candidate], now: float) -> list[Candidate]:
        return sorted(candidates, key=lambda c: (c.last_access or 0.0, c.group))


class Fifo(Lru):
    """Longest on the device first."""

    def __init__(self) -> None:
        self.arrivals: dict[int, int] = {}
        self.count = 0

    def arrived(self, group: int) -> None:
        self.count += 1
        self.arrivals[group] = self.count

    def ranked(self, candidates: Iterable[Candidate], now: float) -> list[Candidate]:
        return sorted(candidates, key=lambda c: self.arrivals[c.group])


class Belady(Lru):
    """What is wanted again last first, which takes knowing the future."""

    def __init__(self, steps: Sequence[Step]) -> None:
        self.uses: dict[int, deque[int]] = {}
        for i, step in enumerate(steps):
            for group in step.run:
                self.uses.setdefault(group, deque()).append(i)

    def accessed(self, group: int) -> None:
        self.uses[group].popleft()

    def ranked(self, candidates: Iterable[Candidate], now: float) -> list[Candidate]:
        return sorted(candidates, key=lambda c: -self.uses[c.group][0] if self.uses[c.group] else -(2**60))


@dataclass
class Result:
    """What one policy did with one trace."""

    stats: KvStats
    num_accesses: int = 0
    num_hits: int = 0
    num_short: int = 0
    wait_s: float = 0.0
    fragmentation: float = 0.0

    @property
    def hit_rate(self) -> float:
        return self.num_hits / self.num_accesses

    @property
    def pages_moved(self) -> float:
        return (self.stats.counters.pages_swapped_out + self.stats.counters.pages_swapped_in) / self.num_accesses

    def figures(self) -> list[float]:
        """Those of COLUMNS."""
        num_out = max(1, self.stats.counters.groups_swapped_out)
        return [
            100 * self.hit_rate,
            100 * self.stats.working_set_hit_rate,
            self.pages_moved,
            100 * self.num_short / num_out,
            100 * self.stats.thrash_rate,
            1000 * self.wait_s / self.num_accesses,
            100 * self.fragmentation,
        ]


COLUMNS = {
    "hit %": 0,
    "ws hit %": 0,
    "moved": 1,
    "short %": 0,
    "thrash %": 1,
    "wait ms": 1,
    "fragmentation %": 1,
}  # digits


class NoCopies:
    """Contents do not matter here."""

    def swap_out(self, pages: Sequence[int], slots: Sequence[int]) -> None: ...
    def swap_in(self, slots: Sequence[int], pages: Sequence[int]) -> None: ...


def replay(steps: Sequence[Step], num_pages: int, policy_name: str, config: SwapConfig) -> Result:
    """Run a trace; time is the trace's, plus waits."""
    policies: dict[str, Callable[[], VictimPolicy]] = {
        "HGAL": lambda: Hgal(config),
        "LRU": Lru,
        "FIFO": Fifo,
        "Belady": lambda: Belady(steps),
    }
    policy = policies[policy_name]()
    if policy_name != "HGAL":
        config = replace(config, warmup_duration=0.0, hot_threshold=2**30)
    now = 0.0
    kv = KvManager(
        PagePool(num_pages, PAGE_SIZE),
        NoCopies(),
        config,
        num_host_slots=2**20,
        root_key=b"",
        clock=lambda: now,
        prefix_reuse=False,
        policy=policy,
    )
    known: set[int] = set()
    came_in: dict[int, float] = {}  # groups on the device that were swapped in
    result = Result(kv.stats())
    for step in steps:
        now = max(now, step.t + result.wait_s)
        for group in known.intersection(step.closed):
            kv.close(group)
            came_in.pop(group, None)
            known.discard(group)
        there = {group for group in step.run if group in known and kv.is_resident(group)}
        result.num_accesses += sum(group in known for group in step.run)
        result.num_hits += len(there)
        for group, num_tokens in step.run.items():
            if group not in known:
                kv.open(group, ())
            while not (kv.bring_in(group, step.run) and kv.reserve(group, num_tokens, step.run)):
                now += WAIT_S
                result.wait_s += WAIT_S
                if result.wait_s > 1e3:
                    raise SystemExit(f"{policy_name}: a step of {sum(step.run.values())} tokens never finds room")
            if isinstance(policy, Fifo) and group not in there:
                policy.arrived(group)
        for group in [group for group in came_in if not kv.is_resident(group)]:
            result.num_short += now < came_in.pop(group) + 1.0
        came_in |= {group: now for group in step.run if group in known and group not in there}
        known |= step.run.keys()
        kv.touch(step.run)
        kv.idle(step.run)
        result.fragmentation += kv.stats().fragmentation / len(steps)
    kv.audit()
    result.stats = kv.stats()
    return result


# Traces. Lengths are in tokens; a group has 4 to 40 pages.


def lengths(count: int, rng: random.Random) -> list[int]:
    return [rng.randint(4 * PAGE_SIZE, 40 * PAGE_SIZE) for _ in range(count)]


def one_each(groups: Iterable[int], sizes: Sequence[int]) -> Iterator[Step]:
    """One sequence a step."""
    for i, group in enumerate(groups):
        yield Step(i * STEP_S, {group: sizes[group]})


def fitting(num_pages: int, sizes: Sequence[int], share: float) -> int:
    """How many of the first groups fill `share` of the cache."""
    used = 0
    for i, size in enumerate(sizes):
        used += -(-size // PAGE_SIZE)
        if used > share * num_pages:
            return i
    return len(sizes)


def scan(num_pages: int, rng: random.Random) -> Iterator[Step]:
    """Each sequence is read in four steps one after another, then left for good."""
    return one_each([g for g in range(500) for _ in range(4)], lengths(500, rng))


def loop(num_pages: int, rng: random.Random) -> Iterator[Step]:
    """Sequences of 1.3 times the cache in turn: the worst case of LRU."""
    sizes = lengths(500, rng)
    return one_each(list(range(fitting(num_pages, sizes, 1.3))) * 60, sizes)


def hot_and_scan(num_pages: int, rng: random.Random) -> Iterator[Step]:
    """A hot set of 0.4 of the cache takes half of the accesses; the rest go through everything else in turn."""
    sizes = lengths(400, rng)
    hot = fitting(num_pages, sizes, 0.4)
    others = iter(list(range(hot, 400)) * 10)
    return one_each([rng.randrange(hot) if i % 2 else next(others) for i in range(3000)], sizes)


def large_hot(num_pages: int, rng: random.Random) -> Iterator[Step]:
    """Five large sequences, half the cache, take every twelfth access; the rest go through small ones in turn.

    Made against HGAL, whose score grows with a group's size.
    """
    sizes = [PAGE_SIZE * num_pages // 10] * 5 + [PAGE_SIZE * rng.randint(2, 6) for _ in range(400)]
    others = iter(list(range(5, 405)) * 10)
    return one_each([next(others) if i % 12 else rng.randrange(5) for i in range(4000)], sizes)


def zipf(num_pages: int, rng: random.Random) -> Iterator[Step]:
    """200 sequences, the n-th most popular one with probability proportional to 1 / n."""
    return one_each(rng.choices(range(200), [1 / (n + 1) for n in range(200)], k=3000), lengths(200, rng))


def moving(num_pages: int, rng: random.Random) -> Iterator[Step]:
    """A working set of 0.6 of the cache which is exchanged one sequence every ten accesses: the best case of LRU."""
    sizes = lengths(500, rng)
    width = fitting(num_pages, sizes, 0.6)
    return one_each([i // 10 + rng.randrange(width) for i in range(3000)], sizes)


def chat(num_pages: int, rng: random.Random) -> Iterator[Step]:
    """80 conversations of several turns in a batch of 6; a user takes 1 to 20 s to answer, then another one comes."""
    waiting: list[tuple[float, int]] = [(rng.uniform(0, 20), i) for i in range(80)]
    tokens = {i: rng.randint(50, 300) for i in range(80)}
    turns = {i: rng.randint(1, 8) for i in range(80)}
    next_id = 80
    running: dict[int, int] = {}  # → tokens left to generate
    closed: list[int] = []
    t = 0.0
    for _ in range(6000):
        t += STEP_S
        waiting.sort()
        while waiting and waiting[0][0] <= t and len(running) < 6:
            _, group = waiting.pop(0)
            running[group] = rng.randint(20, 120)
            tokens[group] += rng.randint(10, 60)
        if not running:
            continue
        yield Step(t, {group: tokens[group] + 1 for group in running}, closed)
        closed = []
        for group in list(running):
            tokens[group] += 1
            running[group] -= 1
            if not running[group]:
                del running[group]
                turns[group] -= 1
                if turns[group]:
                    waiting.append((t + rng.uniform(1, 20), group))
                else:
                    closed.append(group)
                    tokens[next_id], turns[next_id] = rng.randint(50, 300), rng.randint(1, 8)
                    waiting.append((t + rng.uniform(1, 20), next_id))
                    next_id += 1


TRACES: dict[str, Callable[[int, random.Random], Iterator[Step]]] = {
    "scan": scan,
    "loop": loop,
    "hot set + scan": hot_and_scan,
    "large hot + scan": large_hot,
    "zipf": zipf,
    "moving set": moving,
    "chat": chat,
}


def recorded(path: Path, num_pages: int) -> tuple[int, list[Step]]:
    """A trace from JSON lines, and with how many pages to replay it."""
    steps = []
    with path.open(encoding="utf-8") as lines:
        for line in lines:
            entry = json.loads(line)
            if "num_pages" in entry:
                num_pages = int(entry["num_pages"])
                continue
            run = {int(group): int(num_tokens) for group, num_tokens in entry["run"].items()}
            steps.append(Step(float(entry["t"]), run, [int(group) for group in entry["closed"]]))
    return num_pages, steps


class Recorder:
    """Writes what an engine does with its KV manager as a trace: a line for each step that is planned."""

    def __init__(self, kv: KvManager, file: TextIO) -> None:
        self.kv, self.file = kv, file
        self.run: list[int] = []
        self.closed: list[int] = []
        self.start = monotonic()
        self.touch, self.close = kv.touch, kv.close
        kv.touch, kv.close = self.touched, self.ended  # type: ignore[method-assign]
        print(json.dumps({"num_pages": kv.pool.num_pages}), file=file)

    def touched(self, seq_ids: Iterable[int]) -> None:
        self.run = list(seq_ids)
        run = {str(seq_id): self.kv.num_tokens_reserved(seq_id) for seq_id in self.run}
        step = {"t": round(monotonic() - self.start, 3), "run": run, "closed": self.closed}
        print(json.dumps(step, separators=(",", ":")), file=self.file)
        self.closed = []
        self.touch(self.run)

    def ended(self, seq_id: int) -> None:
        self.closed.append(seq_id)
        self.close(seq_id)


async def record(path: Path) -> None:
    """Serve the demonstration model with a KV cache that is too small, and write the trace."""
    import gllm_driver

    rng = random.Random(1)
    with (
        gllm_driver.load(device="cpu", context_length=1024, kv_tokens=2048, max_batch=8, progress=False) as model,
        path.open("w", encoding="utf-8") as file,
    ):
        Recorder(model._engine.manager, file)

        async def ask(delay: float) -> None:
            await asyncio.sleep(delay)
            prompt = [rng.randrange(5, 500) for _ in range(rng.randint(30, 500))]
            stream = model.async_stream(
                prompt, max_tokens=rng.randint(30, 400), ignore_eos=True, priority=rng.randrange(3)
            )
            async for _ in stream:
                pass

        await asyncio.gather(*(ask(rng.uniform(0, 10)) for _ in range(60)))
        print(model.metrics)
        stats = model._engine.manager.stats()
        print(f"thrash    {100 * stats.thrash_rate:.1f} % of {stats.counters.groups_swapped_out} swap-outs")
        print(f"ws hits   {100 * stats.working_set_hit_rate:.1f} %")
        print(f"copies    {1000 * stats.mean_swap_out_s:.2f} ms a swap-out")


COLOURS = {"HGAL": "#1f6f8b", "LRU": "#e0a458", "FIFO": "#b0b0b0", "Belady": "#2b2b2b"}


def plot(results: dict[str, dict[str, Result]], path: Path) -> None:
    """Bars of hit rate and pages moved, four bars a trace."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(2, 1, figsize=(9, 6), sharex=True)
    names = list(results)
    for p, (policy, colour) in enumerate(COLOURS.items()):
        at = [i + (p - 1.5) * 0.21 for i in range(len(names))]
        axes[0].bar(at, [100 * results[name][policy].hit_rate for name in names], 0.19, label=policy, color=colour)
        axes[1].bar(at, [results[name][policy].pages_moved for name in names], 0.19, color=colour)
    axes[0].set_ylabel("accesses that find their\nsequence on the device, %")
    axes[1].set_ylabel("pages moved per access")
    axes[1].set_xticks(range(len(names)), [name.replace(" + ", "\n+ ") for name in names])
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].legend(frameon=False, ncols=4, loc="lower center", bbox_to_anchor=(0.5, 1.0))
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("recorded", nargs="*", type=Path, help="recorded traces, JSON lines")
    parser.add_argument("--pages", type=int, default=512, help=f"pages of {PAGE_SIZE} tokens on the device")
    parser.add_argument("--threshold", type=float, default=SwapConfig.swap_threshold)
    parser.add_argument("--lir-ratio", type=float, default=SwapConfig.lir_ratio)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--plot", type=Path, help="write a picture (needs matplotlib)")
    parser.add_argument("--record", type=Path, help="serve the demonstration model for a while and write its trace")
    args = parser.parse_args()
    if args.record:
        asyncio.run(record(args.record))
        return
    config = SwapConfig(swap_threshold=args.threshold, lir_ratio=args.lir_ratio)
    traces = {name: (args.pages, list(make(args.pages, random.Random(args.seed)))) for name, make in TRACES.items()}
    traces |= {path.stem: recorded(path, args.pages) for path in args.recorded}
    print("In each field:", " / ".join(COLOURS), "\n")
    print("|", " | ".join(["trace", *COLUMNS]), "|")
    print("|---" * (1 + len(COLUMNS)) + "|")
    results: dict[str, dict[str, Result]] = {}
    for name, (num_pages, steps) in traces.items():
        results[name] = {policy: replay(steps, num_pages, policy, config) for policy in COLOURS}
        columns = zip(*(result.figures() for result in results[name].values()), strict=True)
        fields = [
            " / ".join(f"{figure:.{digits}f}" for figure in column)
            for column, digits in zip(columns, COLUMNS.values(), strict=True)
        ]
        print("|", " | ".join([name, *fields]), "|", flush=True)
    if args.plot:
        plot(results, args.plot)


if __name__ == "__main__":
    main()
