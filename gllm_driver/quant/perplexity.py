"""How well a model predicts a text: which tokens are scored, their likelihoods, divergences, and statistics of them.

Arithmetic on arrays alone; gllm_driver.evaluation runs models. Sources: perplexity and its windows as llama.cpp's
llama-perplexity defines them, so that figures can be compared; divergence, Kullback & Leibler 1951.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from ..errors import RequestError

MIN_CONTEXT = 4  # the shortest window whose second half has a token to score
MAX_EXPONENT = 709.0  # exp of more does not fit in f64
CHUNK_ELEMENTS = 1 << 20  # logits that are worked on at a time by each thread, some 20 bytes of memory for each


@dataclass(frozen=True)
class Windows:
    """The pieces of a text that a model reads one by one, each from an empty context.

    Window i is `length` tokens from i · step on. Its logits from position `first` on are scored, each on the token that
    follows.
    """

    tokens: np.ndarray  # [N] i32, the text
    length: int
    step: int
    first: int
    count: int
    bos: int | None  # stands in the place of each window's first token

    @classmethod
    def of(cls, tokens: Sequence[int], context: int, stride: int | None = None, bos: int | None = None) -> Windows:
        """Windows over a text.

        Without a stride they lie side by side, `context` tokens each, and the second half of each is scored. With one
        they are context + stride // 2 tokens long, begin every `stride` tokens and their last `stride` tokens are
        scored; as in llama.cpp, `bos` plays no part then. Raises RequestError.
        """
        if context < MIN_CONTEXT:
            raise RequestError(f"a context of {context} has no tokens to score: give at least {MIN_CONTEXT}")
        if stride is not None and not 1 <= stride <= context:
            raise RequestError(f"the stride must be from 1 to the context of {context}, got {stride}")
        num_tokens = len(tokens)
        if stride is None:
            length, step, first, count, needed = context, context, context // 2, num_tokens // context, context
        else:
            length, step = context + stride // 2, stride
            first, count, needed = length - stride - 1, -(-(num_tokens - length) // stride), length + 1
            bos = None
        if num_tokens < needed:
            raise RequestError(
                f"the text is too short: it has {num_tokens} tokens, a window needs {needed}; give a longer text "
                "or a smaller context"
            )
        return cls(np.asarray(tokens, np.int32), length, step, first, count, bos)

    def first_of(self, count: int | None) -> Windows:
        """The first `count` windows at most; None: all."""
        if count is None or count >= self.count:
            return self
        return Windows(self.tokens, self.length, self.step, self.first, count, self.bos)

    @property
    def num_scored(self) -> int:
        """Tokens that are scored in each window."""
        return self.length - self.first - 1

    def inputs(self, window: int) -> list[int]:
        """What the model reads: all but the last token, whose logits nothing follows."""
        start = window * self.step
        tokens: list[int] = self.tokens[start : start + self.length - 1].tolist()
        return tokens if self.bos is None else [self.bos, *tokens[1:]]

    def targets(self, window: int, position: int, count: int) -> np.ndarray:
        """The tokens that follow `count` positions of a window, the first of them `position`."""
        start = window * self.step + position + 1
        return self.tokens[start : start + count]


def check_logits(logits: np.ndarray, window: int, position: int, name: str = "the model") -> None:
    """Raise RequestError, naming the place, unless all logits [n, vocab] of a window from `position` on are numbers."""
    finite = np.isfinite(logits).all(axis=1)
    if not finite.all():
        at = position + int(np.argmin(finite))
        raise RequestError(
            f"the logits of {name} hold infinite values or no number in window {window + 1}, after token {at + 1}: "
            "the weights may be damaged, or overflow in this dtype; try --dtype f32"
        )


class Scorer:
    """Likelihoods and divergences of rows of logits f32 [n, vocab], by several threads in bounded memory."""

    def __init__(self, num_threads: int = 1) -> None:
        self._pool = ThreadPoolExecutor(max_workers=max(num_threads, 1), thread_name_prefix="gllm-score")

    def nll(self, logits: np.ndarray, targets: np.ndarray) -> np.ndarray:
        """−ln p of each target [n] under its row: f64 [n]."""

        def of(rows: slice) -> np.ndarray:
            own = logits[rows]
            top = own.max(axis=1, keepdims=True)
            total = np.exp(own - top).sum(axis=1, dtype=np.float64)
            return np.log(total) + top[:, 0].astype(np.float64) - _chosen(own, targets[rows])

        return self._by_rows(of, *logits.shape)[0]

    def compare(self, a: np.ndarray, b: np.ndarray, targets: np.ndarray) -> PairScores:
        """Two models' logits for the same rows. In f64 throughout: a divergence is a small difference of logarithms."""

        def of(rows: slice) -> np.ndarray:
            log_a, p_a = _log_softmax(a[rows])
            log_b, _ = _log_softmax(b[rows])
            nll_a, nll_b = -_chosen(log_a, targets[rows]), -_chosen(log_b, targets[rows])
            same = a[rows].argmax(axis=1) == b[rows].argmax(axis=1)
            log_a -= log_b
            log_a *= p_a
            kl = np.maximum(log_a.sum(axis=1), 0.0)  # rounding may leave it below zero, where no divergence is
            return np.stack([nll_a, nll_b, kl, same])

        nll_a, nll_b, kl, same = self._by_rows(of, *a.shape)
        return PairScores(nll_a, nll_b, kl, same.astype(bool))

    def _by_rows(self, of: Callable[[slice], np.ndarray], num_rows: int, vocab: int) -> np.ndarray:
        """`of` of row ranges side by side: f64 [results, num_rows]."""
        step = max(CHUNK_ELEMENTS // vocab, 1)
        rows = [slice(start, start + step) for start in range(0, num_rows, step)]
        return np.concatenate([np.atleast_2d(part) for part in self._pool.map(of, rows)], axis=1)

    def close(self) -> None:
        """End the threads."""
        self._pool.shutdown()

    def __enter__(self) -> Scorer:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _chosen(rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
    """One element of each row, f64 [n]."""
    return np.take_along_axis(rows, columns[:, np.newaxis].astype(np.int64), axis=1)[:, 0].astype(np.float64)


def _log_softmax(logits: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(ln p, p) of rows, f64 [n, vocab] each."""
    log_p = logits.astype(np.float64)
    log_p -= log_p.max(axis=1, keepdims=True)
    p = np.exp(log_p)
    total = p.sum(axis=1, keepdims=True)
    log_p -= np.log(total)
    p /= total
    return log_p, p


@dataclass(frozen=True)
class PairScores:
    """Of two models A and B on the same n tokens."""

    nll_a: np.ndarray  # [n] f64
    nll_b: np.ndarray  # [n] f64
    kl: np.ndarray  # [n] f64, of B's distribution from A's, in nats
    same_top: np.ndarray  # [n] bool, whether both hold the same token for the most likely


@dataclass(frozen=True)
class Estimate:
    """A figure and its standard error; the error is not a number where it cannot be told."""

    value: float
    error: float


def mean(values: np.ndarray) -> Estimate:
    """Mean and its standard error, as if the values were drawn independently."""
    n = len(values)
    return Estimate(float(values.mean()), float(values.std() / math.sqrt(n - 1)) if n > 1 else math.nan)


def perplexity_of(nll: np.ndarray) -> Estimate:
    """exp of the mean; its error is that of the mean, carried over."""
    average = mean(nll)
    value = exp(average.value)
    return Estimate(value, value * average.error)


def exp(value: float) -> float:
    """e to that power; infinite where f64 ends."""
    return math.exp(value) if value < MAX_EXPONENT else math.inf


PERCENTILES = (50.0, 90.0, 95.0, 99.0, 99.9)


def percentiles(values: np.ndarray) -> dict[str, float]:
    """Of those ranks by name ("50", "99.9" …), interpolated between neighbours, and the largest ("max")."""
    found = np.percentile(values, (*PERCENTILES, 100.0))
    return dict(zip((*(f"{rank:g}" for rank in PERCENTILES), "max"), map(float, found), strict=True))
