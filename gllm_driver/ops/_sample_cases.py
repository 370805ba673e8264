"""Test cases of `sample`."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from ..config import SamplingConfig
from ._case_tools import normal, rng
from ._sample_params import SEEN_IN_PROMPT, pack_params
from .contract import Case

LAST_SEED = 2**64 - 1
INF, NAN = np.inf, np.nan


def _case(
    label: str,
    logits: np.ndarray,
    configs: list[SamplingConfig],
    *,
    counts: np.ndarray | None = None,
    positions: list[int] | None = None,
    advance: bool = False,
) -> Case:
    """A case of one row of logits per config; `advance` gives it ids."""
    arrays = {
        "logits": np.ascontiguousarray(logits, np.float32),
        "params": pack_params(configs),
        "positions": np.array(positions or range(3, 3 + len(configs)), np.int64),
    }
    if counts is not None:
        arrays["counts"] = counts.astype(np.int32)
    if advance:
        arrays["ids"] = np.arange(100, 100 + len(configs), dtype=np.int32)
    return Case(label, arrays)


def cases() -> Iterator[Case]:
    """Greedy rows, filters, penalties and rows that hold something other than numbers."""
    yield from _greedy()
    yield from _draws()
    yield from _penalties()


def _greedy() -> Iterator[Case]:
    greedy = SamplingConfig()
    yield _case("one", np.array([[-3.5]]), [greedy])
    yield _case("one-drawn", np.array([[-3.5]]), [SamplingConfig(temperature=1.0)], advance=True)
    yield _case("zero", np.zeros((3, 37)), [greedy] * 3)
    yield _case("signed-zeros", np.array([[-1.0, -0.0, 0.0], [-1.0, 0.0, -0.0]]), [greedy] * 2)
    row = np.array([-1.0, 5, 2, 5, NAN, 5, -INF, 0])
    rows = np.stack(
        [
            row,
            row[::-1],
            np.where(np.isnan(row), 9, row),
            np.full(8, NAN),
            np.full(8, -INF),
            np.where(np.arange(8) == 6, -1e30, -INF),
            np.where(np.arange(8) % 3 == 2, INF, row),
            np.where(np.arange(8) == 7, -1e38, NAN),
            -np.abs(np.where(np.isfinite(row), row, 9)) - 1e38,
        ]
    )
    for label, config in (
        ("greedy", greedy),
        ("drawn", SamplingConfig(temperature=0.7, seed=11)),
        ("filtered", SamplingConfig(temperature=0.7, top_k=3, top_p=0.9, min_p=0.05, seed=11)),
    ):
        yield _case(f"ties-nan-inf-{label}", rows, [config] * len(rows), advance=label != "greedy")
    wide = normal(rng("greedy"), 5, 4099, scale=3)
    wide[1, [17, 4098]] = 40
    wide[2, 4098] = 40
    wide[3, 5:4000] = NAN
    yield _case("greedy-wide", wide, [greedy] * 5, advance=True)


def _draws() -> Iterator[Case]:
    g = rng("draws")
    for vocab in (2, 33, 1000):
        rows = 24
        configs = [
            SamplingConfig(
                temperature=float(g.choice([0.0, 0.3, 0.8, 1.0, 1.7])),
                top_k=int(g.choice([0, 1, 5, vocab - 1, vocab, vocab + 7, 2**40])),
                top_p=float(g.choice([1e-6, 0.3, 0.9, 0.999, 1.0])),
                min_p=float(g.choice([0.0, 0.05, 0.5, 0.999])),
                seed=int(g.choice(np.array([0, 1, 2**32, LAST_SEED], np.uint64))),
            )
            for _ in range(rows)
        ]
        positions = [int(p) for p in g.integers(0, 2**40, rows)]
        positions[:4] = [0, 2**31 - 1, 2**31, 2**32 + 5]
        yield _case(f"mixed-{vocab}", normal(g, rows, vocab, scale=2), configs, positions=positions, advance=True)
    tiered = np.round(normal(g, 16, 301, scale=2))
    yield _case("tiers-top-k", tiered, [SamplingConfig(1.0, top_k=k, seed=5) for k in range(1, 17)])
    yield _case("tiers-top-p", tiered, [SamplingConfig(1.0, top_p=k / 17, seed=6) for k in range(1, 17)])
    yield _case("min-p", tiered, [SamplingConfig(1.0, min_p=k / 18, seed=7) for k in range(1, 17)])
    flat = np.sort(g.random((96, 12)) * 0.6)  # close to uniform: one token too many, or too few, is soon drawn
    yield _case("flat-top-k", flat, [SamplingConfig(1.0, top_k=1 + k % 12, seed=14) for k in range(96)])
    yield _case("flat-top-p", flat, [SamplingConfig(1.0, top_p=(1 + k % 12) / 12.5, seed=15) for k in range(96)])
    yield _case("flat-min-p", flat, [SamplingConfig(1.0, min_p=0.55 + k % 9 / 20, seed=16) for k in range(96)])
    logits = normal(g, 8, 517, scale=4)
    temperatures = [1e-30, 1e-6, 1e-3, 0.01, 100.0, 1e4, 1e20, 3e38]
    yield _case("temperatures", logits, [SamplingConfig(t, seed=8) for t in temperatures])
    yield _case("large", logits * 1e4, [SamplingConfig(t, seed=9) for t in (1, 3, 1e3, 1e4, 1e5, 1, 2, 3)])
    yield _case("tiny", logits * 1e-30, [SamplingConfig(1.0, seed=s, top_k=100) for s in range(8)])
    yield _case("masked", np.where(logits > 8, logits, -INF), [SamplingConfig(0.9, seed=s, top_k=40) for s in range(8)])
    yield from _extreme_draws()
    yield _case("same-row", np.repeat(logits[:1], 64, 0), [SamplingConfig(1.0, seed=12)] * 64)


def _extreme_draws() -> Iterator[Case]:
    """Words of seed 0 that lead with 24 ones or 23 zeros, found by search: such a token may win and may lose."""
    found = [(5237, 90), (18229, 178), (27971, 483), (23562, 973), (24285, 847), (37970, 869)]
    config = SamplingConfig(1.0)
    for label, logit in (("behind", -19.0), ("ahead", 18.0)):
        logits = np.zeros((len(found), 1000))
        logits[range(len(found)), [token for _, token in found]] = logit
        yield _case(f"extreme-words-{label}", logits, [config] * len(found), positions=[p for p, _ in found])
    twins = [
        (18, 66, 652),
        (54, 86, 722),
        (107, 178, 876),
        (111, 739, 823),
        (171, 597, 679),
    ]  # position, ids of equal u
    equal = np.zeros((len(twins), 1000))
    for row, (_, first, second) in zip(equal, twins, strict=True):
        row[[first, second]] = 20
    yield _case("equal-words", equal, [config] * len(twins), positions=[p for p, *_ in twins])
    alone = np.full((len(found), 1000), -INF)
    alone[range(len(found)), [token for _, token in found]] = 1
    yield _case("extreme-words-alone", alone, [config] * len(found), positions=[p for p, _ in found])


def _penalties() -> Iterator[Case]:
    g = rng("penalties")
    rows, vocab = 12, 203
    counts = np.where(g.random((rows, vocab)) < 0.3, g.integers(1, 5, (rows, vocab)), 0)
    counts |= np.where(g.random((rows, vocab)) < 0.3, SEEN_IN_PROMPT, 0)
    logits = normal(g, rows, vocab, scale=2)
    for label, options in (
        ("unused", {}),
        ("repetition", {"repetition_penalty": 1.3}),
        ("repetition-below-1", {"repetition_penalty": 0.7}),
        ("presence", {"presence_penalty": 0.9}),
        ("frequency", {"frequency_penalty": 0.4}),
        ("negative", {"presence_penalty": -1.5, "frequency_penalty": -0.2}),
        ("all", {"repetition_penalty": 1.1, "presence_penalty": 0.5, "frequency_penalty": 0.25}),
    ):
        configs = [
            SamplingConfig(t, top_k=k, top_p=p, min_p=m, seed=13, **options)
            for t, k, p, m in zip(
                [0.0, 0.8, 1.2] * 4, [0, 0, 20] * 4, [1, 0.9, 0.8, 1] * 3, [0, 0, 0.1] * 4, strict=True
            )
        ]
        yield _case(f"penalties-{label}", logits, configs, counts=counts, advance=label == "all")
        if label == "all":
            yield _case("penalties-without-counts", logits, configs)
    crowded = np.full((2, 40), 1000, np.int64)
    crowded[:, 3] = SEEN_IN_PROMPT | 1
    config = SamplingConfig(frequency_penalty=0.01)
    holes = np.where(np.arange(40) % 2 == 0, normal(g, 2, 40), NAN)
    yield _case("penalties-many", holes, [config, SamplingConfig(1.0, frequency_penalty=1e-7)], counts=crowded)
    empty = np.stack([np.full(40, NAN), np.full(40, -INF)])
    yield _case("penalties-no-number", empty, [config] * 2, counts=crowded, advance=True)
