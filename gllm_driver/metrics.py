"""What the engine counts and times, for people and dashboards to read."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

# Upper bounds of the classes, in seconds: 10 for each power of ten, so a quantile is off by 26 % at most.
BOUNDS = tuple(1e-5 * 10 ** (i / 10) for i in range(81))


class Histogram:
    """How often durations fell into each class. Adding one costs less than a microsecond."""

    def __init__(self, bounds: Sequence[float] = BOUNDS) -> None:
        self.bounds = tuple(bounds)
        self.counts = [0] * (len(bounds) + 1)  # the last class has no upper bound
        self.num = 0
        self.total = 0.0
        self.max = 0.0

    def add(self, value: float) -> None:
        """Count one duration in seconds."""
        self.counts[bisect_left(self.bounds, value)] += 1
        self.num += 1
        self.total += value
        if value > self.max:
            self.max = value

    def quantile(self, q: float) -> float:
        """The duration that a share `q` of all stays within: the upper bound of its class; 0 when nothing was counted.

        Raises ValueError for q outside (0, 1].
        """
        if not 0 < q <= 1:
            raise ValueError(f"a quantile is in (0, 1], got {q}")
        wanted = q * self.num
        passed = 0
        for bound, count in zip(self.bounds, self.counts, strict=False):
            passed += count
            if passed and passed >= wanted:
                return min(bound, self.max)
        return self.max

    def summary(self) -> Durations:
        """The usual figures."""
        mean = self.total / self.num if self.num else 0.0
        bounds = (*self.bounds, float("inf"))
        classes = tuple((bound, count) for bound, count in zip(bounds, self.counts, strict=True) if count)
        quantiles = self.quantile(0.5), self.quantile(0.9), self.quantile(0.99)
        return Durations(self.num, mean, *quantiles, self.max, classes)


@dataclass(frozen=True)
class Durations:
    """A histogram at one moment, in seconds. `classes`: (upper bound, how many) of those that are not empty."""

    num: int
    mean: float
    p50: float
    p90: float
    p99: float
    max: float
    classes: tuple[tuple[float, int], ...] = ()

    def __str__(self) -> str:
        return f"p50 {_ms(self.p50)}, p99 {_ms(self.p99)}, mean {_ms(self.mean)}, n {self.num}"


@dataclass(frozen=True)
class StoreTier:
    """What one tier of a KV store has answered with."""

    name: str
    chunks: int
    nbytes: int
    seconds: float

    @property
    def gb_per_s(self) -> float:
        return self.nbytes / self.seconds / 1e9 if self.seconds else 0.0


@dataclass(frozen=True)
class StoreMetrics:
    """KV shared through a store. Chunks are what it keeps; prefixes found on the device itself do not count here.

    misses: chunks asked for in vain by reason: "absent"; "gone" (found, but not readable); "wrong" (of something else);
    "late", "room", "copy", "error" (loads that were given up: it took too long, the device had no room, a copy or the
    store failed).
    """

    lookups: int  # requests for which the store was asked
    tiers: tuple[StoreTier, ...]
    loaded_tokens: int
    skipped: int  # chunks there, but quicker to compute
    misses: dict[str, int]
    saved_chunks: int
    saved_bytes: int
    saved_s: float
    duplicates: int  # chunks that were there already when they were to be saved
    not_saved: dict[str, int]  # by reason

    @classmethod
    def of(cls, counts: Mapping[str, float]) -> StoreMetrics:
        """From counts by name (engine/kv_threads.py)."""

        def under(prefix: str) -> dict[str, int]:
            return {name.removeprefix(prefix): int(n) for name, n in sorted(counts.items()) if name.startswith(prefix)}

        names = under("hit chunks ")
        return cls(
            lookups=int(counts.get("lookups", 0)),
            tiers=tuple(
                StoreTier(name, chunks, int(counts[f"hit bytes {name}"]), counts[f"hit s {name}"])
                for name, chunks in names.items()
            ),
            loaded_tokens=int(counts.get("loaded tokens", 0)),
            skipped=int(counts.get("skipped", 0)),
            misses={reason: n for reason, n in under("miss ").items() if n},
            saved_chunks=int(counts.get("saved chunks", 0)),
            saved_bytes=int(counts.get("saved bytes", 0)),
            saved_s=counts.get("saved s", 0.0),
            duplicates=int(counts.get("duplicates", 0)),
            not_saved={reason: n for reason, n in under("not saved: ").items() if n},
        )

    @property
    def hit_rate(self) -> float:
        """Share of the chunks asked for that the store had."""
        hits = sum(tier.chunks for tier in self.tiers) + self.skipped
        asked = hits + sum(self.misses.get(reason, 0) for reason in ("absent", "gone", "wrong"))
        return hits / asked if asked else 0.0

    def __str__(self) -> str:
        hits = [f"{t.name} {t.chunks} ({t.nbytes / 1e6:.1f} MB at {t.gb_per_s:.2f} GB/s)" for t in self.tiers]
        listed = [", ".join(f"{why} {n}" for why, n in counts.items()) for counts in (self.misses, self.not_saved)]
        rate = self.saved_bytes / self.saved_s / 1e9 if self.saved_s else 0.0
        return "\n".join(
            (
                f"KV store  {self.lookups} requests asked, {self.loaded_tokens} tokens loaded; "
                f"hits: {', '.join(hits) or 'none'}; {self.skipped} not worth loading; misses: {listed[0] or 'none'}",
                f"KV saved  {self.saved_chunks} chunks ({self.saved_bytes / 1e6:.1f} MB at {rate:.2f} GB/s), "
                f"{self.duplicates} were there; not saved: {listed[1] or 'none'}",
            )
        )


@dataclass(frozen=True)
class Metrics:
    """The engine at one moment, and its counts since it began."""

    running: int  # sequences that take part in steps
    waiting: int  # requests that have not begun
    preempted: int  # sequences put aside
    pages_total: int
    pages_used: int  # by sequences; pages that only serve reuse count as free
    pages_swapped: int
    requests: dict[str, int]  # ended ones by reason
    steps: int
    prompt_tokens: int  # of requests that began
    cached_tokens: int  # of those, whose KV was there already
    output_tokens: int
    preemptions: int
    recomputes: int
    swapped_out_pages: int
    swapped_in_pages: int
    copy_failures: int
    distilled_pages: int
    time_to_first_token: Durations
    inter_token_latency: Durations
    store: StoreMetrics | None = None  # without a KV store

    @property
    def page_use(self) -> float:
        """Share of the device's KV pages that sequences hold."""
        return self.pages_used / self.pages_total if self.pages_total else 0.0

    @property
    def prefix_hit_rate(self) -> float:
        """Share of all prompt tokens that needed no computing."""
        return self.cached_tokens / self.prompt_tokens if self.prompt_tokens else 0.0

    def as_dict(self) -> dict[str, Any]:
        """Plain numbers, ready for JSON."""
        return asdict(self) | {"page_use": self.page_use, "prefix_hit_rate": self.prefix_hit_rate}

    def __str__(self) -> str:
        ended = ", ".join(f"{reason} {n}" for reason, n in sorted(self.requests.items())) or "none"
        return "\n".join(
            (
                f"requests  {self.running} running, {self.waiting} waiting, {self.preempted} put aside; ended: {ended}",
                f"tokens    {self.prompt_tokens} prompt ({self.prefix_hit_rate:.0%} reused), "
                f"{self.output_tokens} output in {self.steps} steps",
                f"KV pages  {self.pages_used} of {self.pages_total} used, {self.pages_swapped} on the host; "
                f"{self.swapped_out_pages} swapped out, {self.swapped_in_pages} in",
                f"preempted {self.preemptions}, {self.recomputes} of them to be computed again; "
                f"{self.copy_failures} copies failed"
                + (f"; {self.distilled_pages} pages merged away" if self.distilled_pages else ""),
                f"first token  {self.time_to_first_token}",
                f"next tokens  {self.inter_token_latency}",
                *((str(self.store),) if self.store is not None else ()),
            )
        )


@dataclass
class Recorder:
    """Where the engine counts."""

    time_to_first_token: Histogram = field(default_factory=Histogram)
    inter_token_latency: Histogram = field(default_factory=Histogram)
    requests: dict[str, int] = field(default_factory=dict)
    steps: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    output_tokens: int = 0

    def metrics(self, store: StoreMetrics | None = None, **gauges: int) -> Metrics:
        """These counts with what `gauges` say of the moment, by the fields of Metrics."""
        return Metrics(
            requests=dict(self.requests),
            steps=self.steps,
            prompt_tokens=self.prompt_tokens,
            cached_tokens=self.cached_tokens,
            output_tokens=self.output_tokens,
            time_to_first_token=self.time_to_first_token.summary(),
            inter_token_latency=self.inter_token_latency.summary(),
            store=store,
            **gauges,
        )


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:.3g} ms" if seconds < 1 else f"{seconds:.3g} s"
