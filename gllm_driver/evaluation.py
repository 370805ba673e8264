"""Models judged on a text: perplexity of one, divergence between two. Definitions: gllm_driver/quant/perplexity.py."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from .backends.select import num_processors
from .errors import CapacityError, RequestError
from .quant.perplexity import Estimate, PairScores, Scorer, Windows, check_logits, exp, mean, percentiles, perplexity_of

if TYPE_CHECKING:
    from .llm import LLM

DEFAULT_CONTEXT = 512  # of llama-perplexity too, so that figures can be compared
MAX_SCORING_THREADS = 8

Progress = Callable[[int, int, float], None]
"""(windows done, windows in all, perplexity so far of the last model read)."""


@dataclass(frozen=True)
class Reading:
    """What was read and scored. `windows` of `length` tokens, `tokens` of which were scored in all; `seconds` of it."""

    text_tokens: int
    windows: int
    length: int
    tokens: int
    context: int
    stride: int | None
    seconds: float


@dataclass(frozen=True)
class PerplexityResult:
    """exp of the mean negative log-likelihood of the scored tokens, and that mean itself (nats)."""

    perplexity: Estimate
    nll: Estimate
    reading: Reading


@dataclass(frozen=True)
class ComparisonResult:
    """Model B beside model A on the same tokens.

    ratio: of B's perplexity to A's, with the error of the paired difference, far below those of the two. kl: mean
    divergence of B's distributions from A's, in nats, and percentiles of it over tokens. same_top: share of the tokens
    for which both have the same most likely next one.
    """

    perplexity_a: Estimate
    perplexity_b: Estimate
    ratio: Estimate
    kl: Estimate
    kl_percentiles: dict[str, float]
    same_top: Estimate
    reading: Reading


def perplexity(
    llm: LLM,
    text: str | Sequence[int],
    *,
    context: int = DEFAULT_CONTEXT,
    stride: int | None = None,
    max_windows: int | None = None,
    progress: Progress | None = None,
) -> PerplexityResult:
    """How well a model predicts a text (or token ids), as llama.cpp's llama-perplexity measures it.

    The text is cut into windows of `context` tokens, each read from an empty context; the second half of each is
    scored. stride: overlapping windows instead, `stride` tokens apart (`Windows.of`). max_windows: the first ones only.

    Raises RequestError when the text is shorter than a window, or logits are no numbers (naming the window);
    CapacityError when the model was loaded with a smaller context.
    """
    windows = _windows(llm, text, context, stride, max_windows)
    start, total = time.perf_counter(), _Total()
    with Scorer(_num_threads()) as scorer:
        at_once = llm.sequences_at_once(windows.length, windows.first)
        for begin in range(0, windows.count, at_once):
            batch = range(begin, min(begin + at_once, windows.count))

            def score(i: int, position: int, logits: np.ndarray, batch: range = batch) -> None:
                check_logits(logits, batch[i], position)
                total.add(scorer.nll(logits, windows.targets(batch[i], position, len(logits))))

            llm.read_logits([windows.inputs(i) for i in batch], score, windows.first)
            if progress:
                progress(batch.stop, windows.count, total.perplexity)
    nll = total.all()
    return PerplexityResult(perplexity_of(nll), mean(nll), _reading(windows, context, stride, start))


def compare(
    a: LLM,
    b: LLM,
    text: str | Sequence[int],
    *,
    context: int = DEFAULT_CONTEXT,
    stride: int | None = None,
    max_windows: int | None = None,
    progress: Progress | None = None,
) -> ComparisonResult:
    """What changes when model `b` takes the place of `a`, on the windows and tokens that `perplexity` of `a` scores.

    Both stay loaded. Beside them it takes the memory of one window's logits of `a`: half the context × vocabulary
    × 4 bytes. Raises RequestError as `perplexity` does, and when the vocabularies differ; of token ids given in the
    place of a text, only the vocabularies' sizes are compared.
    """
    _check_same_size(a, b)
    if isinstance(text, str):
        _check_same_tokens(a, b)
    windows = _windows(a, text, context, stride, max_windows)
    start, total = time.perf_counter(), _Total()
    scores: list[PairScores] = []
    with Scorer(_num_threads()) as scorer:
        for window in range(windows.count):
            inputs, rows_a = windows.inputs(window), np.empty((windows.num_scored, a.arch.vocab_size), np.float32)

            def keep(
                _: int, position: int, logits: np.ndarray, window: int = window, kept: np.ndarray = rows_a
            ) -> None:
                check_logits(logits, window, position, "model A")
                kept[position - windows.first :][: len(logits)] = logits

            def score(
                _: int, position: int, logits: np.ndarray, window: int = window, kept: np.ndarray = rows_a
            ) -> None:
                check_logits(logits, window, position, "model B")
                of_a = kept[position - windows.first :][: len(logits)]
                scores.append(scorer.compare(of_a, logits, windows.targets(window, position, len(logits))))
                total.add(scores[-1].nll_b)

            a.read_logits([inputs], keep, windows.first)
            b.read_logits([inputs], score, windows.first)
            if progress:
                progress(window + 1, windows.count, total.perplexity)
    nll_a, nll_b, kl, same = (
        np.concatenate([getattr(each, name) for each in scores]) for name in ("nll_a", "nll_b", "kl", "same_top")
    )
    return ComparisonResult(
        perplexity_a=perplexity_of(nll_a),
        perplexity_b=perplexity_of(nll_b),
        ratio=perplexity_of(nll_b - nll_a),
        kl=mean(kl),
        kl_percentiles=percentiles(kl),
        same_top=mean(same.astype(np.float64)),
        reading=_reading(windows, context, stride, start),
    )


def _check_same_size(a: LLM, b: LLM) -> None:
    if a.arch.vocab_size != b.arch.vocab_size:
        raise RequestError(
            f"the models have different vocabularies, of {a.arch.vocab_size} and {b.arch.vocab_size} tokens: "
            "their distributions cannot be compared"
        )


def _check_same_tokens(a: LLM, b: LLM) -> None:
    """Raise RequestError unless token ids mean the same to both models.

    Ids that only one of them has a text for (rows that pad an embedding table) are not looked at.
    """
    of_a, of_b = a.tokenizer, b.tokenizer
    for token in range(min(of_a.vocab_size, of_b.vocab_size)):
        if of_a.token_bytes(token) != of_b.token_bytes(token):
            raise RequestError(
                f"the models have different vocabularies: token {token} is {of_a.id_to_piece(token)!r} in A and "
                f"{of_b.id_to_piece(token)!r} in B, so their distributions cannot be compared"
            )


class _Total:
    """Likelihoods as they come, and the perplexity so far."""

    def __init__(self) -> None:
        self._parts: list[np.ndarray] = []
        self._sum, self._count = 0.0, 0

    def add(self, nll: np.ndarray) -> None:
        self._parts.append(nll)
        self._sum += float(nll.sum())
        self._count += len(nll)

    @property
    def perplexity(self) -> float:
        return exp(self._sum / self._count)

    def all(self) -> np.ndarray:
        return np.concatenate(self._parts)


def _windows(llm: LLM, text: str | Sequence[int], context: int, stride: int | None, max_windows: int | None) -> Windows:
    """The windows over a text. EOS, which some tokenizers put after a text, is no part of it."""
    if max_windows is not None and max_windows < 1:
        raise RequestError(f"max_windows must be at least 1, got {max_windows}")
    bos = None
    if isinstance(text, str):
        prefix = llm.tokenizer.prefix_ids
        bos = prefix[0] if prefix else None
        text = [*prefix, *llm.tokenizer.encode(text, add_special=False)]
    windows = Windows.of(text, context, stride, bos)
    if windows.length > llm.context_length:
        raise CapacityError(
            f"a window of {windows.length} tokens does not fit in the context of {llm.context_length} that the model "
            "was loaded with"
        )
    return windows.first_of(max_windows)


def _reading(windows: Windows, context: int, stride: int | None, start: float) -> Reading:
    return Reading(
        text_tokens=len(windows.tokens),
        windows=windows.count,
        length=windows.length,
        tokens=windows.count * windows.num_scored,
        context=context,
        stride=stride,
        seconds=time.perf_counter() - start,
    )


def _num_threads() -> int:
    return min(num_processors(), MAX_SCORING_THREADS)
