"""What `sample` must choose, from its definition in float64, and where float32 rounding could choose otherwise."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from ._sample_params import PARAMS, SEEN_IN_PROMPT

SCORE_SLACK = 1e-4  # two scores closer than this may swap in float32
PROBABILITY_SLACK = 1e-5  # a cumulative probability this close to top_p may fall on either side
LOGIT_SLACK = 1e-6  # relative error of a logit after the penalties


@dataclass(frozen=True)
class Choice:
    """A chosen token (−1: the row holds no number), and whether rounding in float32 cannot change it."""

    token: int
    certain: bool


def philox4x32(counter: np.ndarray, key: tuple[int, int]) -> np.ndarray:
    """Philox4x32-10 (Salmon et al. 2011): counter [..., 4] and key of 32-bit words → 32-bit words, u64 [..., 4]."""
    mask = np.uint64(0xFFFFFFFF)
    c0, c1, c2, c3 = (counter[..., i].astype(np.uint64) for i in range(4))
    k0, k1 = key
    for _ in range(10):
        first, second = c0 * np.uint64(0xD2511F53), c2 * np.uint64(0xCD9E8D57)
        c0, c1, c2, c3 = (
            (second >> np.uint64(32)) ^ c1 ^ np.uint64(k0),
            second & mask,
            (first >> np.uint64(32)) ^ c3 ^ np.uint64(k1),
            first & mask,
        )
        k0, k1 = (k0 + 0x9E3779B9) & 0xFFFFFFFF, (k1 + 0xBB67AE85) & 0xFFFFFFFF
    return np.stack([c0, c1, c2, c3], axis=-1)


def uniforms(seed: int, position: int | np.ndarray, vocab_size: int) -> np.ndarray:
    """The numbers in (0, 1) of every token: f64 [..., V] for positions of shape [...]."""
    position = np.asarray(position, np.uint64)
    counter = np.zeros((*position.shape, (vocab_size + 3) // 4, 4), np.uint64)
    counter[..., 0] = np.arange(counter.shape[-2])
    counter[..., 2] = (position & np.uint64(0xFFFFFFFF))[..., None]
    counter[..., 3] = (position >> np.uint64(32))[..., None]
    words = philox4x32(counter, (seed & 0xFFFFFFFF, seed >> 32))
    words = words.reshape(*position.shape, -1)[..., :vocab_size]
    return ((words >> np.uint64(9)).astype(np.float64) + 0.5) / 2**23


def penalize(logits: np.ndarray, counts: np.ndarray, params: np.void) -> np.ndarray:
    """Logits after repetition, presence and frequency penalties."""
    outputs = counts & (SEEN_IN_PROMPT - 1)
    seen = counts != 0
    repetition = float(params["repetition_penalty"])
    z = np.where(seen, np.where(logits > 0, logits / repetition, logits * repetition), logits)
    z = z - np.where(outputs > 0, float(params["presence_penalty"]), 0.0)
    return z - float(params["frequency_penalty"]) * outputs


def choose(logits: np.ndarray, counts: np.ndarray | None, params: np.void, position: int) -> Choice:
    """One row: logits f64 [V], counts int [V] or None, params a record of PARAMS."""
    logits = np.where(np.isnan(logits), -np.inf, logits)
    rounding = 0.0
    if counts is not None:
        penalized = penalize(logits, counts, params)
        if not np.array_equal(penalized, logits):
            both = np.concatenate([logits, penalized])
            rounding = LOGIT_SLACK * np.abs(both[np.isfinite(both)]).max(initial=0.0)
        logits = penalized
    best = logits.max()
    if best == -np.inf:
        return Choice(-1, True)
    temperature = float(params["temperature"])
    if temperature == 0 or best == np.inf:
        return Choice(int(logits.argmax()), not _beside(logits, best, best, rounding).any())

    certain = True
    kept = logits > -np.inf
    top_k = int(params["top_k"])
    if 0 < top_k < len(logits):
        kth = np.sort(logits)[::-1][top_k - 1]
        kept &= logits >= kth
        certain = not _beside(logits, kth, best, rounding).any()
    z = (logits - best) / temperature
    doubtful = np.zeros(len(z), bool)
    if params["top_p"] < 1:
        kept, edge = _top_p(logits, z, kept, float(params["top_p"]))
        doubtful |= edge | _beside(logits, logits[kept].min(), best, rounding)
    if params["min_p"] > 0:
        ratio = np.exp(z) / float(params["min_p"])
        edge = (kept | doubtful) & (np.abs(ratio - 1) <= PROBABILITY_SLACK)
        kept, doubtful = kept & (ratio >= 1), (doubtful & (ratio >= 1)) | edge

    u = uniforms(int(params["seed"]), position, len(z))
    score = z - np.log(-np.log(u))
    token = int(np.where(kept, score, -np.inf).argmax())
    rivals = (kept | doubtful) & ~((logits == logits[token]) & (u == u[token]))  # equals tie in float32 as well
    gap = score[token] - score[rivals].max(initial=-np.inf)
    slack = SCORE_SLACK + LOGIT_SLACK * abs(z[token]) + rounding / temperature
    return Choice(token, bool(certain and not doubtful[token] and gap >= slack))


def _beside(logits: np.ndarray, edge: float, best: float, rounding: float) -> np.ndarray:
    """Logits so near to `edge`, yet not equal, that float32 may see them equal or the other way round: bool [V]."""
    if not np.isfinite(edge):
        return np.zeros(len(logits), bool)
    slack = max(rounding, LOGIT_SLACK * (best - edge))
    return (logits != edge) & (logits >= edge - slack) & (logits <= edge + slack)


def _top_p(logits: np.ndarray, z: np.ndarray, kept: np.ndarray, top_p: float) -> tuple[np.ndarray, np.ndarray]:
    """The kept tokens (bool [V]), and those of tiers so close to the edge that rounding decides."""
    p = np.where(kept, np.exp(z), 0.0)
    p = p / p.sum()
    before, inside, edge = 0.0, np.zeros(len(p), bool), np.zeros(len(p), bool)
    for tier in np.unique(logits[kept])[::-1]:
        members = kept & (logits == tier)
        inside |= members & (before < top_p)
        if before > 0 and abs(before - top_p) <= PROBABILITY_SLACK:
            edge |= members
        before += p[members].sum()
    return inside, edge


def reference(arrays: Mapping[str, np.ndarray], scalars: Mapping[str, float]) -> dict[str, np.ndarray]:
    """All outputs: tokens [S], positions [S], and counts [S, V] and ids [S] where they are given."""
    return _step(arrays)[0]


def certain_rows(arrays: Mapping[str, np.ndarray]) -> np.ndarray:
    """Which rows' choice float32 rounding cannot change: bool [S]."""
    return _step(arrays)[1]


def _step(arrays: Mapping[str, np.ndarray]) -> tuple[dict[str, np.ndarray], np.ndarray]:
    logits, positions, counts = arrays["logits"], arrays["positions"].copy(), arrays.get("counts")
    records = np.ascontiguousarray(arrays["params"], np.int32).view(PARAMS)[:, 0]
    choices = [
        choose(logits[s], None if counts is None else counts[s], records[s], int(positions[s]))
        for s in range(len(logits))
    ]
    tokens = np.array([c.token for c in choices], np.int64)
    out = {"tokens": tokens, "positions": positions}
    some = np.flatnonzero(tokens >= 0)
    if counts is not None:
        out["counts"] = counts.copy()
        out["counts"][some, tokens[some]] += 1
    if "ids" in arrays:
        out["ids"] = np.maximum(tokens, 0)
        out["positions"] += 1
    return out, np.array([c.certain for c in choices], bool)
