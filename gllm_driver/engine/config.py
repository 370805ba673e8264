"""How an engine works for its requests."""

from __future__ import annotations

from dataclasses import dataclass, field

from ..config import DistillConfig, SwapConfig
from ..kv.distill import Rope
from ..sched.plan import SchedulerConfig
from .sharing import KvSharingConfig


@dataclass(frozen=True)
class EngineConfig:
    """How requests share the device. prefix_reuse: prompts that begin alike share the KV of that beginning."""

    scheduler: SchedulerConfig = field(default_factory=SchedulerConfig)
    swap: SwapConfig = field(default_factory=SwapConfig)
    prefix_reuse: bool = True
    kv_sharing: KvSharingConfig | None = None  # a store beyond this engine's life; it needs prefix_reuse
    distill: DistillConfig | None = None  # what must make room gets smaller first, and no longer exact
    rope: Rope | None = None  # how the model rotates keys, for those who merge them
