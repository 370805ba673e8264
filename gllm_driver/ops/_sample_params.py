"""The rows of sample's `params`: 12 words of 4 bytes a sequence, in memory so that a recorded step can be replayed."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

from ..config import SamplingConfig

PARAM_FIELDS = (
    ("temperature", "<f4"),
    ("top_p", "<f4"),
    ("min_p", "<f4"),
    ("repetition_penalty", "<f4"),
    ("presence_penalty", "<f4"),
    ("frequency_penalty", "<f4"),
    ("top_k", "<i4"),
    ("flags", "<i4"),
    ("seed", "<u8"),
    ("reserved", "<u8"),
)
PARAMS = np.dtype(list(PARAM_FIELDS))
PARAM_WORDS = PARAMS.itemsize // 4
SEEN_IN_PROMPT = 1 << 30  # bit of a count that marks a prompt token; the bits below count output occurrences


def pack_params(configs: Iterable[SamplingConfig]) -> np.ndarray:
    """The rows for `configs`: i32 [S, PARAM_WORDS]. A top_k beyond i32 keeps every token, as it would anyway."""
    rows = [
        (
            c.temperature,
            c.top_p,
            c.min_p,
            c.repetition_penalty,
            c.presence_penalty,
            c.frequency_penalty,
            min(c.top_k, 2**31 - 1),
            0,
            c.seed,
            0,
        )
        for c in configs
    ]
    return np.array(rows, PARAMS).view(np.int32).reshape(len(rows), PARAM_WORDS)


def token_counts(prompt: Sequence[int], output: Sequence[int], vocab_size: int) -> np.ndarray:
    """A row of sample's `counts` for what a sequence has so far: i32 [vocab_size]."""
    counts = np.zeros(vocab_size, np.int32)
    np.add.at(counts, np.asarray(output, np.int64), 1)
    counts[np.asarray(prompt, np.int64)] |= SEEN_IN_PROMPT
    return counts
