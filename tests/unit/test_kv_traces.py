"""The trace replay, and through it the figures that HGAL must reach."""

from __future__ import annotations

import importlib.util
import json
import random
import sys
from pathlib import Path
from types import ModuleType

import pytest

from gllm_driver.config import SwapConfig

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture(scope="module")
def kv_traces() -> ModuleType:
    spec = importlib.util.spec_from_file_location("kv_traces", BENCHMARKS / "kv_traces.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["kv_traces"] = module
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(("name", "hits_over_lru"), [("scan", 0.0), ("loop", 0.4), ("hot set + scan", 0.08)])
def test_hgal_reaches_its_figures_and_is_no_worse_than_lru(
    kv_traces: ModuleType, name: str, hits_over_lru: float
) -> None:
    steps = list(kv_traces.TRACES[name](512, random.Random(1)))
    hgal, lru = (kv_traces.replay(steps, 512, policy, SwapConfig()) for policy in ("HGAL", "LRU"))
    assert hgal.stats.counters.groups_swapped_out > 100
    assert hgal.stats.thrash_rate < 0.01
    assert hgal.fragmentation < 0.05
    assert hgal.hit_rate >= lru.hit_rate + hits_over_lru
    assert hgal.pages_moved <= lru.pages_moved
    if name != "loop":  # whose working set is larger than the cache
        assert hgal.stats.working_set_hit_rate > 0.9


def test_a_recorded_trace_is_replayed_with_its_own_number_of_pages(kv_traces: ModuleType) -> None:
    num_pages, steps = kv_traces.recorded(BENCHMARKS / "traces" / "served.jsonl", 512)
    assert num_pages == 128
    result = kv_traces.replay(steps, num_pages, "HGAL", SwapConfig())
    assert result.num_accesses > 1000
    assert result.stats.counters.groups_swapped_out > 10
    assert result.stats.thrash_rate < 0.01
    assert result.stats.working_set_hit_rate > 0.9


def test_every_policy_counts_a_trace_that_can_be_counted_by_hand(kv_traces: ModuleType, tmp_path: Path) -> None:
    """Two sequences of which one fits, in turn: each access but the first two misses."""
    path = tmp_path / "turns.jsonl"
    lines = [{"num_pages": 4}, *({"t": 5.0 * i, "run": {str(i % 2): 48}, "closed": []} for i in range(6))]
    path.write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
    num_pages, steps = kv_traces.recorded(path, 512)
    for policy in ("HGAL", "LRU", "FIFO", "Belady"):
        result = kv_traces.replay(steps, num_pages, policy, SwapConfig())
        assert (result.num_accesses, result.num_hits, result.num_short) == (4, 0, 0), policy
        assert result.stats.counters.groups_swapped_out == 5
        assert result.pages_moved == (5 * 3 + 4 * 3) / 4
        assert result.fragmentation == 0.0
