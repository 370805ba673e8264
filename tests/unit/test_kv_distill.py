"""Distilled KV: what must stay exact does, and merged entries are what float64 says."""

from __future__ import annotations

import math
from typing import Literal

import numpy as np
import pytest

from gllm_driver.config import DistillConfig
from gllm_driver.errors import RequestError
from gllm_driver.kv.distill import (
    MergedKv,
    Rope,
    SharedKv,
    compute_kv_similarity,
    distill_kv_pages,
    exact_bounds,
    merge_pages,
    rotated,
    similarity_weights,
)
from gllm_driver.kv.layer_sharing import num_kept

L, H, P, D = 4, 2, 4, 8
ROPE = Rope(10_000.0 ** (-np.arange(D // 2) / (D // 2)))


def random_pages(count: int, dtype: type = np.float32, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((count, L, 2, H, P, D)).astype(dtype)


def turn(keys: np.ndarray, positions: np.ndarray) -> np.ndarray:
    """NeoX pairs as complex numbers, float64."""
    z = keys[..., : D // 2] + 1j * keys[..., D // 2 :]
    z = z * np.exp(1j * positions[..., None] * ROPE.inv_freq)
    return np.concatenate([z.real, z.imag], axis=-1)


def sequence(pages: np.ndarray) -> np.ndarray:
    """[L, 2, H, T, D] in float64."""
    return np.concatenate(list(pages.astype(np.float64)), axis=3)


@pytest.mark.parametrize("ratio", [2, 4, 8])
@pytest.mark.parametrize("method", ["tokens", "layers"])
@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_sinks_and_tail_keep_their_bits(ratio: int, method: Literal["tokens", "layers"], dtype: type) -> None:
    pages = random_pages(21, dtype)
    distilled = distill_kv_pages(pages, ratio, method, sinks=5, window=9, num_tokens=82, rope=ROPE)
    restored = distilled.restored()
    start, stop = exact_bounds(82, P, 5, 9)
    assert (start, stop) == (2, 18)
    assert restored.shape == pages.shape
    assert restored.dtype == pages.dtype
    assert restored[:start].tobytes() == pages[:start].tobytes()
    assert restored[stop:].tobytes() == pages[stop:].tobytes()
    assert distilled.nbytes < pages.nbytes
    if isinstance(distilled, MergedKv):
        assert len(distilled.pages) == 21 - 16 + 16 // ratio
        assert len(distilled.table) == 21
        assert distilled.table.count(start) == ratio


def test_nothing_is_merged_where_all_must_stay_exact() -> None:
    pages = random_pages(6)
    merged = distill_kv_pages(pages, 2, sinks=4, window=1000)
    assert isinstance(merged, MergedKv)
    assert merged.table == tuple(range(6))
    assert merged.pages.tobytes() == pages.tobytes()


@pytest.mark.parametrize("sharpness", [0.0, 1.0, 50.0, math.inf])
def test_weights_sum_to_one(sharpness: float) -> None:
    keys, values = np.random.default_rng(1).standard_normal((2, 5, 3, 4, D)).astype(np.float32)
    weights = similarity_weights(keys, values, sharpness)
    assert weights.shape == (5, 3, 4)
    assert (weights >= 0).all()
    np.testing.assert_allclose(weights.sum(axis=-1), 1, atol=1e-6)


@pytest.mark.parametrize("style", [0, 1])
def test_keys_turn_as_in_float64(style: int) -> None:
    keys = np.random.default_rng(2).standard_normal((7, 3, D))
    positions = np.random.default_rng(3).uniform(-5000, 5000, (7, 3))
    order = np.r_[0:D:2, 1:D:2] if style else np.arange(D)
    expected = np.empty_like(keys)
    expected[..., order] = turn(keys[..., order], positions)
    np.testing.assert_allclose(rotated(keys, positions, Rope(ROPE.inv_freq, style)), expected, atol=1e-9)


@pytest.mark.parametrize("ratio", [2, 4, 8])
def test_the_plain_mean_of_keys_at_their_mean_position(ratio: int) -> None:
    pages = random_pages(ratio)
    tokens = sequence(pages).reshape(L, 2, H, P, ratio, D)
    offsets = np.arange(ratio, dtype=np.float64)
    keys = turn(tokens[:, 0], np.broadcast_to(offsets.mean() - offsets, tokens.shape[:1] + tokens.shape[2:5]))
    merged = merge_pages(pages, ROPE, sharpness=0)
    np.testing.assert_allclose(merged[:, 0], keys.mean(axis=-2), atol=1e-5)
    np.testing.assert_allclose(merged[:, 1], tokens[:, 1].mean(axis=-2), atol=1e-5)


def test_one_key_at_neighbouring_positions_merges_without_loss() -> None:
    """Where naive merging of rotated keys would shorten it."""
    key = np.random.default_rng(4).standard_normal((1, H, 1, D))
    positions = np.broadcast_to(np.arange(2.0 * P), (L, H, 2 * P))
    keys = turn(np.broadcast_to(key, (L, H, 2 * P, D)), positions)
    pages = np.stack([np.stack([keys[:, :, i : i + P]] * 2, axis=1) for i in (0, P)]).astype(np.float32)
    expected = turn(np.broadcast_to(key, (L, H, P, D)), positions[..., ::2] + 0.5)
    np.testing.assert_allclose(merge_pages(pages, ROPE, sharpness=0)[:, 0], expected, atol=1e-5)
    naive = merge_pages(pages, None, sharpness=0)[:, 0]
    assert np.abs(naive - expected).max() > 0.01


def test_attention_over_a_merged_page_weighs_it_as_the_tokens_it_stands_for() -> None:
    merged = distill_kv_pages(random_pages(6), 2, sinks=4, window=4, rope=ROPE, sharpness=0)
    assert isinstance(merged, MergedKv)
    query = np.random.default_rng(5).standard_normal(D)

    def attend(pages: np.ndarray, counts: np.ndarray) -> np.ndarray:
        keys, values = sequence(pages)[0, :, 0]
        weights = np.exp(keys @ query) * np.repeat(counts, P)
        return weights @ values / weights.sum()

    counts = np.array([merged.table.count(page) for page in range(len(merged.pages))])
    expected = attend(merged.pages, counts)
    np.testing.assert_allclose(attend(merged.restored(), np.ones(6)), expected, rtol=1e-10)


def test_layers_that_are_multiples_of_one_another_share_without_loss() -> None:
    pages = random_pages(8)
    pages[:, 1], pages[:, 3] = 2 * pages[:, 0], -0.5 * pages[:, 2]
    shared = distill_kv_pages(pages, 2, "layers", sinks=0, window=0)
    assert isinstance(shared, SharedKv)
    assert shared.kept.shape[1] == num_kept(L, 2) == 2
    # Negative multiples are least alike by their cosine, so only the first pair is sure to be joined.
    np.testing.assert_allclose(shared.restored()[:, :2], pages[:, :2], atol=1e-5)


def test_similarity_against_float64() -> None:
    pages = random_pages(5)
    similarity = compute_kv_similarity(pages, [0, 2], num_tokens=18, rope=ROPE)
    tokens = sequence(pages)[[0, 2], :, :, :18]

    def cos(a: np.ndarray, b: np.ndarray) -> float:
        return float((a * b).sum() / np.sqrt((a * a).sum() * (b * b).sum()))

    for part in range(2):
        expected = [[cos(a[part], b[part]) for b in tokens] for a in tokens]
        np.testing.assert_allclose(similarity.between_layers[part], expected, atol=1e-9)
    level = turn(tokens[:, 0], np.broadcast_to(-np.arange(18.0), tokens[:, 0].shape[:-1]))
    expected_keys = np.mean([cos(level[1, h, 3], level[1, h, 4]) for h in range(H)])
    assert similarity.between_tokens.shape == (2, 2, 17)
    assert similarity.between_tokens[0, 1, 3] == pytest.approx(expected_keys, abs=1e-9)


def test_what_cannot_be_asked_for() -> None:
    assert DistillConfig.parse("4:layers") == DistillConfig(4, "layers")
    assert DistillConfig.parse("2") == DistillConfig(2, "tokens")
    for text in ("3", "2:", "2:heads", "tokens", ""):
        with pytest.raises(RequestError, match="KV distillation is 2, 4 or 8"):
            DistillConfig.parse(text)
    with pytest.raises(RequestError, match="got 3"):
        distill_kv_pages(random_pages(2), 3)
    with pytest.raises(RequestError, match="window must not be negative"):
        distill_kv_pages(random_pages(2), 2, window=-1)
