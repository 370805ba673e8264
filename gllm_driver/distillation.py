"""What distilling KV costs on a text: perplexity of a continuation after its context was made smaller, and bytes."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from .backends.base import Backend, KvCacheHandle, WeightsHandle
from .config import DistillConfig
from .engine import Engine
from .engine.distill import page_arrays, page_bytes
from .errors import CapacityError, RequestError
from .kv.distill import Rope, distill_kv_pages
from .quant.perplexity import Estimate, Scorer, check_logits, mean, perplexity_of
from .types import BatchInput, SequenceInput

STEP_TOKENS = 512
WAYS = ("exact", "distilled", "shorter", "ends")


@dataclass(frozen=True)
class DistillationCost:
    """Perplexities of the same continuations after contexts of exact KV; of distilled KV; of only the newest tokens, as
    many as take the bytes of distilled KV; and of only the tokens that distilling leaves exact, sinks and window.

    ratio: of the distilled one to the exact one, with the error of the paired difference.
    """

    exact: Estimate
    distilled: Estimate
    shorter: Estimate
    ends: Estimate
    ratio: Estimate
    nbytes_before: int  # of one context
    nbytes_after: int
    windows: int
    context: int
    tokens: int  # scored in all


def cost(
    engine: Engine,
    tokens: Sequence[int],
    rope: Rope | None,
    config: DistillConfig,
    *,
    context: int,
    continuation: int = 64,
    max_windows: int | None = None,
    sharpness: float = math.inf,
    progress: Callable[[int, int], None] | None = None,
) -> DistillationCost:
    """Measure on windows of a text: `context` tokens whose KV is distilled, then `continuation` tokens that are scored.

    Raises RequestError for a text shorter than a window, CapacityError for a window that does not fit.
    """
    page = engine.pool.page_size
    context -= context % page
    length = context + continuation
    count = min(len(tokens) // length, max_windows or len(tokens))
    if context < page or continuation < 2:
        raise RequestError(f"a context of at least {page} tokens and a continuation of 2 are needed")
    if not count:
        raise RequestError(f"the text is too short: it has {len(tokens)} tokens, a window needs {length}")
    if length > engine.context_length:
        raise CapacityError(f"windows of {length} tokens do not fit in a context of {engine.context_length}")
    nbytes = [0, 0]
    scores: list[np.ndarray] = []
    with Scorer(1) as scorer:
        for i in range(count):
            window = [int(token) for token in tokens[i * length : (i + 1) * length]]

            def measure(
                backend: Backend, weights: WeightsHandle, kv: KvCacheHandle, batch: BatchInput, at: int = i
            ) -> np.ndarray:
                (sequence,) = batch.sequences
                own = list(sequence.tokens)
                pages = list(sequence.pages)
                targets = np.array(own[context + 1 :], np.int64)

                def score(position: int) -> np.ndarray:
                    piece = SequenceInput(own[context:-1], position, pages)
                    logits = backend.logits_forward(weights, kv, piece)
                    check_logits(logits, at, context)
                    return scorer.nll(logits, targets)

                def fill(part: Sequence[int]) -> None:
                    for start in range(0, len(part), STEP_TOKENS):
                        backend.extend(
                            weights, kv, SequenceInput(part[start : start + STEP_TOKENS], start, pages, False)
                        )

                fill(own[:context])
                found = [score(context)]
                old = page_arrays(backend.copy_pages_to_host(kv, pages[: context // page]), kv)
                made = _distilled(old, config, rope, sharpness)
                nbytes[:] = old.nbytes, made.nbytes
                backend.copy_pages_from_host(kv, pages[: context // page], page_bytes(made.restored()))
                found.append(score(context))
                kept = max(made.nbytes * context // old.nbytes // page * page, page)
                fill(own[context - kept : context])
                found.append(score(kept))
                sinks = min(-(-config.sinks // page) * page, context)
                tail = -(-config.window // page) * page
                ends = own[:sinks] + own[max(context - tail, sinks) : context]
                fill(ends)
                found.append(score(len(ends)))
                return np.stack(found)[np.newaxis]

            scores.append(engine.compute_whole([window], measure)[0])
            if progress:
                progress(i + 1, count)
    nll = np.concatenate(scores, axis=1)  # [ways, tokens]
    by_way = dict(zip(WAYS, (perplexity_of(row) for row in nll), strict=True))
    difference = mean(nll[1] - nll[0])
    ratio = math.exp(difference.value)
    return DistillationCost(
        **by_way,
        ratio=Estimate(ratio, ratio * difference.error),
        nbytes_before=nbytes[0],
        nbytes_after=nbytes[1],
        windows=count,
        context=context,
        tokens=nll.shape[1],
    )


def _distilled(old: np.ndarray, config: DistillConfig, rope: Rope | None, sharpness: float) -> Any:
    return distill_kv_pages(
        old,
        config.ratio,
        "layers" if config.method == "layers" else "tokens",
        sinks=config.sinks,
        window=config.window,
        rope=rope,
        sharpness=sharpness,
    )
