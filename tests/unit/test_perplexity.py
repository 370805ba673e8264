"""Windows over a text, likelihoods, divergences and their statistics, against the definitions in float64."""

from __future__ import annotations

import math

import numpy as np
import pytest

from gllm_driver.errors import RequestError
from gllm_driver.quant import perplexity
from gllm_driver.quant.perplexity import Scorer, Windows, check_logits, mean, percentiles, perplexity_of


def log_softmax(rows: np.ndarray) -> np.ndarray:
    rows = rows.astype(np.float64)
    rows = rows - rows.max(axis=-1, keepdims=True)
    return rows - np.log(np.exp(rows).sum(axis=-1, keepdims=True))


@pytest.mark.parametrize("bos", [None, 7])
@pytest.mark.parametrize(("num_tokens", "context"), [(64, 16), (79, 16), (33, 11), (9, 9), (12, 4)])
def test_windows_lie_side_by_side_and_their_second_halves_are_scored(
    num_tokens: int, context: int, bos: int | None
) -> None:
    tokens = np.random.default_rng(3).integers(10, 99, num_tokens).tolist()
    windows = Windows.of(tokens, context, bos=bos)
    assert windows.count == num_tokens // context
    for i in range(windows.count):
        own = tokens[i * context : (i + 1) * context]
        assert windows.inputs(i) == [own[0] if bos is None else bos, *own[1:-1]]
        # The logits after token j are scored on token j + 1, for every j in the second half that has one.
        scored = {j: own[j + 1] for j in range(context // 2, context - 1)}
        found = windows.targets(i, windows.first, windows.num_scored)
        assert dict(zip(range(windows.first, context - 1), found.tolist(), strict=True)) == scored


@pytest.mark.parametrize(("num_tokens", "context", "stride"), [(100, 16, 4), (101, 16, 5), (60, 20, 20), (19, 16, 4)])
def test_windows_with_a_stride_score_each_token_once(num_tokens: int, context: int, stride: int) -> None:
    tokens = list(range(num_tokens))
    windows = Windows.of(tokens, context, stride, bos=7)
    length = context + stride // 2
    scored: list[int] = []
    for i in range(windows.count):
        own = tokens[i * stride : i * stride + length]
        assert len(own) == length
        assert windows.inputs(i) == own[:-1]  # as in llama.cpp, no BOS
        scored += windows.targets(i, windows.first, windows.num_scored).tolist()
    assert scored == list(range(length - stride, length + (windows.count - 1) * stride))
    assert windows.count == math.ceil((num_tokens - length) / stride)


def test_the_first_windows_alone() -> None:
    windows = Windows.of(range(64), 16)
    assert [windows.first_of(n).count for n in (None, 1, 3, 99)] == [4, 1, 3, 4]


@pytest.mark.parametrize(
    ("num_tokens", "context", "stride", "problem"),
    [
        (15, 16, None, "it has 15 tokens, a window needs 16"),
        (18, 16, 4, "it has 18 tokens, a window needs 19"),
        (0, 16, None, "it has 0 tokens"),
        (64, 3, None, "a context of 3 has no tokens to score"),
        (64, 16, 17, "the stride must be from 1 to the context of 16, got 17"),
        (64, 16, 0, "the stride must be from 1"),
    ],
)
def test_windows_that_cannot_be(num_tokens: int, context: int, stride: int | None, problem: str) -> None:
    with pytest.raises(RequestError, match=problem):
        Windows.of(range(num_tokens), context, stride)


@pytest.mark.parametrize("vocab", [2, 257, 4099])
@pytest.mark.parametrize("elements", [1, 5000, 1 << 20])
def test_likelihoods_and_divergences_are_those_of_float64(
    vocab: int, elements: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(perplexity, "CHUNK_ELEMENTS", elements)
    g = np.random.default_rng(vocab)
    a = (30 * g.standard_normal((23, vocab)) + 1000).astype(np.float32)
    b = a + g.standard_normal(a.shape).astype(np.float32)
    targets = g.integers(0, vocab, 23).astype(np.int32)
    log_a, log_b = log_softmax(a), log_softmax(b)
    rows = np.arange(23)
    with Scorer(3) as scorer:
        nll, pair = scorer.nll(a, targets), scorer.compare(a, b, targets)
    np.testing.assert_allclose(nll, -log_a[rows, targets], rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(pair.nll_a, -log_a[rows, targets], rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(pair.nll_b, -log_b[rows, targets], rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(pair.kl, (np.exp(log_a) * (log_a - log_b)).sum(1), rtol=1e-9, atol=1e-12)
    assert pair.same_top.tolist() == (a.argmax(1) == b.argmax(1)).tolist()


def test_a_distribution_does_not_diverge_from_itself() -> None:
    logits = (50 * np.random.default_rng(1).standard_normal((9, 300))).astype(np.float32)
    with Scorer() as scorer:
        pair = scorer.compare(logits, logits.copy(), np.zeros(9, np.int32))
        shifted = scorer.compare(logits, logits + np.float32(64), np.zeros(9, np.int32))
    assert (pair.kl == 0).all()
    assert pair.same_top.all()
    assert shifted.kl.max() < 1e-4  # the sums above are rounded to f32
    assert shifted.kl.min() >= 0


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_logits_that_are_no_numbers_are_named_by_their_place(value: float) -> None:
    logits = np.zeros((4, 10), np.float32)
    check_logits(logits, 0, 0)
    logits[2, 9] = value
    with pytest.raises(RequestError, match=r"of model A hold .* in window 6, after token 11:"):
        check_logits(logits, 5, 8, "model A")


def test_statistics() -> None:
    values = np.array([1.0, 2.0, 4.0, 1.0])
    average = mean(values)
    assert average.value == 2.0
    # llama.cpp's: the root of (mean of squares − square of the mean) / (n − 1)
    assert average.error == pytest.approx(math.sqrt((22 / 4 - 4) / 3))
    found = perplexity_of(values)
    assert found.value == pytest.approx(math.exp(2))
    assert found.error == pytest.approx(math.exp(2) * average.error)
    assert math.isnan(mean(values[:1]).error)
    assert perplexity_of(np.full(3, 1e4)).value == math.inf
    shares = np.array([1.0, 1.0, 0.0, 1.0])
    assert mean(shares).error == pytest.approx(math.sqrt(0.75 * 0.25 / 3))
    ranks = percentiles(np.arange(1001.0))
    assert ranks == pytest.approx({"50": 500, "90": 900, "95": 950, "99": 990, "99.9": 999, "max": 1000})
