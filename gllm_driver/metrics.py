"""What the engine counts and times, for people and dashboards to read."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
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
    time_to_first_token: Durations
    inter_token_latency: Durations

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
                f"{self.copy_failures} copies failed",
                f"first token  {self.time_to_first_token}",
                f"next tokens  {self.inter_token_latency}",
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

    def metrics(self, **gauges: int) -> Metrics:
        """These counts with what `gauges` say of the moment, by the fields of Metrics."""
        return Metrics(
            requests=dict(self.requests),
            steps=self.steps,
            prompt_tokens=self.prompt_tokens,
            cached_tokens=self.cached_tokens,
            output_tokens=self.output_tokens,
            time_to_first_token=self.time_to_first_token.summary(),
            inter_token_latency=self.inter_token_latency.summary(),
            **gauges,
        )


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:.3g} ms" if seconds < 1 else f"{seconds:.3g} s"
