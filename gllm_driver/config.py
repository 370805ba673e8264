"""Frozen configurations. Each checks itself when it is made, so the rest of the code can trust it."""

from __future__ import annotations

from dataclasses import dataclass

from .errors import RequestError

_MAX = 3.4e38  # about the largest number of f32, and the smallest one of full precision
_MIN = 1.2e-38


@dataclass(frozen=True)
class SamplingConfig:
    """How the next token is chosen from the logits.

    Order of application: penalties → temperature → top_k → top_p → min_p → draw.

    temperature: 0 means argmax (ties go to the lowest id). top_k: keep the k best; 0 means all. top_p: keep the
    smallest set of best tokens whose probability reaches top_p. min_p: drop tokens below min_p × the best probability.
    repetition_penalty (CTRL, Keskar et al. 2019): divides positive and multiplies negative logits of tokens seen in the
    prompt or the output. presence_penalty and frequency_penalty (OpenAI API): subtracted once, and once per occurrence,
    for tokens seen in the output. seed: draws depend on (seed, position, token id) alone.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        def require(ok: bool, name: str, rule: str) -> None:
            if not ok:
                raise RequestError(f"{name} must be {rule}, got {getattr(self, name)}")

        require(0 <= self.temperature <= _MAX, "temperature", "a number ≥ 0 that f32 holds")
        require(self.top_k >= 0, "top_k", "≥ 0 (0 keeps every token)")
        require(0 < self.top_p <= 1, "top_p", "in (0, 1]")
        require(0 <= self.min_p < 1, "min_p", "in [0, 1)")
        require(_MIN <= self.repetition_penalty <= _MAX, "repetition_penalty", "> 0, and f32 holds it")
        require(abs(self.presence_penalty) <= _MAX, "presence_penalty", "a number that f32 holds")
        require(abs(self.frequency_penalty) <= _MAX, "frequency_penalty", "a number that f32 holds")
        require(0 <= self.seed < 2**64, "seed", "in 0 … 2**64−1")

    @property
    def is_greedy(self) -> bool:
        return self.temperature == 0.0

    @property
    def has_penalties(self) -> bool:
        return self.repetition_penalty != 1.0 or self.presence_penalty != 0.0 or self.frequency_penalty != 0.0


@dataclass(frozen=True)
class KvCacheConfig:
    """Shape of a paged KV cache.

    One page holds K and V of `page_size` tokens in every layer: [num_layers, 2, num_kv_heads, page_size, head_dim],
    contiguous, so that moving a page is one copy.
    """

    num_pages: int
    num_layers: int
    num_kv_heads: int
    head_dim: int
    page_size: int = 16
    dtype: str = "f16"

    def __post_init__(self) -> None:
        for name in ("num_pages", "num_layers", "num_kv_heads", "head_dim", "page_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.dtype not in ("f32", "f16", "bf16"):
            raise ValueError(f"KV dtype must be f32, f16 or bf16, got {self.dtype!r}")

    @property
    def page_nbytes(self) -> int:
        itemsize = 4 if self.dtype == "f32" else 2
        return self.num_layers * 2 * self.num_kv_heads * self.page_size * self.head_dim * itemsize

    @property
    def nbytes(self) -> int:
        return self.num_pages * self.page_nbytes


@dataclass(frozen=True)
class SwapConfig:
    """When KV pages move to host memory, how much of it they may take, and what never moves. Times are in seconds.

    A group swapped in is *warm* for `warmup_duration` or `min_warm_access` accesses; one accessed `hot_threshold` times
    within `working_set_window` is *protected* until it was left alone for that long. Neither is swapped out.
    """

    enable_swap: bool = True
    cpu_reserve_mb: int = 512
    swap_threshold: float = 0.85  # share of the pool in use above which idle sequences are swapped out
    granularity_pages: int = 4  # at least so many pages are freed at a time
    warmup_duration: float = 0.1
    min_warm_access: int = 2
    hot_threshold: int = 3
    working_set_window: float = 1.0
    lir_ratio: float = 0.3

    def __post_init__(self) -> None:
        for name in ("granularity_pages", "min_warm_access", "hot_threshold"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("cpu_reserve_mb", "warmup_duration", "working_set_window"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)}")
        for name in ("swap_threshold", "lir_ratio"):
            if not 0 < getattr(self, name) <= 1:
                raise ValueError(f"{name} must be in (0, 1], got {getattr(self, name)}")

    def num_host_slots(self, page_nbytes: int) -> int:
        """Pages that fit in the host memory reserved."""
        return self.cpu_reserve_mb * 2**20 // page_nbytes if self.enable_swap else 0


DISTILL_RATIOS = (2, 4, 8)
DISTILL_METHODS = ("tokens", "layers")


@dataclass(frozen=True)
class DistillConfig:
    """How KV that must make room is made smaller, at the price of exactness.

    method "tokens": windows of `ratio` old tokens become one, on the device. "layers": one of `ratio` layers keeps its
    KV while it is swapped out. sinks and window: so many first and last tokens are never merged, rounded up to pages.
    """

    ratio: int
    method: str = "tokens"
    sinks: int = 4
    window: int = 256

    def __post_init__(self) -> None:
        if self.ratio not in DISTILL_RATIOS:
            raise RequestError(f"KV can be distilled by 2, 4 or 8, got {self.ratio}")
        if self.method not in DISTILL_METHODS:
            raise RequestError(f"unknown method of KV distillation {self.method!r}: choose tokens or layers")
        for name in ("sinks", "window"):
            if getattr(self, name) < 0:
                raise RequestError(f"{name} must not be negative, got {getattr(self, name)}")

    @classmethod
    def parse(cls, text: str) -> DistillConfig:
        """RATIO or RATIO:METHOD, as on the command line."""
        ratio, _, method = text.partition(":")
        if ratio not in map(str, DISTILL_RATIOS) or (":" in text and method not in DISTILL_METHODS):
            raise RequestError(f"KV distillation is 2, 4 or 8, and :tokens or :layers after it, got {text!r}")
        return cls(int(ratio), method or "tokens")
