"""The draws: Philox against published vectors, the filters by a second definition, and the distribution of draws."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from gllm_driver.config import SamplingConfig
from gllm_driver.ops import CONTRACTS
from gllm_driver.ops._sample_reference import certain_rows, choose, philox4x32, reference, uniforms
from gllm_driver.ops.sample import PARAM_WORDS, PARAMS, SEEN_IN_PROMPT, pack_params
from gllm_driver.types import Tensor

Sampler = Callable[[np.ndarray, np.ndarray, np.ndarray], np.ndarray]


@pytest.mark.parametrize(
    ("counter", "key", "words"),
    [
        ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
    ],
)
def test_philox_known_answers(counter: str, key: str, words: str) -> None:
    """The known-answer vectors published with Random123."""
    numbers = [[int(w, 16) for w in text.split()] for text in (counter, key, words)]
    assert philox4x32(np.array(numbers[0], np.uint64), (numbers[1][0], numbers[1][1])).tolist() == numbers[2]


def test_uniforms_follow_the_convention() -> None:
    seed, position, token = 0x0123456789ABCDEF, 2**32 + 7, 10
    words = philox4x32(np.array([token // 4, 0, 7, 1], np.uint64), (0x89ABCDEF, 0x01234567))
    assert uniforms(seed, position, 12)[token] == ((int(words[token % 4]) >> 9) + 0.5) * 2.0**-23
    assert uniforms(seed, np.array([3, position]), 12)[1, token] == uniforms(seed, position, 12)[token]


def test_uniforms_are_exact_in_f32_and_never_0_or_1() -> None:
    top = np.array([0, 1, 2**22, 2**23 - 1], np.uint32)
    u = (top.astype(np.float32) + np.float32(0.5)) * np.float32(2.0**-23)
    assert u.dtype == np.float32
    assert np.array_equal(u, (top.astype(float) + 0.5) / 2**23)
    assert u.min() > 0
    assert u.max() < 1


def test_uniforms_are_uniform() -> None:
    u = uniforms(3, np.arange(500), 200).ravel()
    counts = np.histogram(u, 64, (0, 1))[0]
    assert ((counts - counts.mean()) ** 2 / counts.mean()).sum() < 113  # chi-square, 63 degrees of freedom, p = 1e-4
    assert abs(np.corrcoef(u[:-1], u[1:])[0, 1]) < 4 / np.sqrt(len(u))


def filtered(logits: np.ndarray, config: SamplingConfig) -> np.ndarray:
    """Probabilities [V] after the filters, by sorting, token by token."""
    z = logits / config.temperature
    order = sorted(range(len(z)), key=lambda i: -z[i])
    if config.top_k:
        order = [i for i in order if z[i] >= z[order[min(config.top_k, len(order)) - 1]]]
    p = {i: np.exp(z[i] - z.max()) for i in order}
    total, best, mass, kept = sum(p.values()), max(p.values()), 0.0, []
    for n, i in enumerate(order):
        same_tier = n > 0 and z[i] == z[order[n - 1]] and order[n - 1] in kept
        if mass / total < config.top_p or same_tier:
            kept.append(i)
        mass += p[i]
    kept = [i for i in kept if p[i] >= config.min_p * best]
    out = np.zeros(len(z))
    out[kept] = [p[i] for i in kept]
    return out / out.sum()


FILTERS = [
    SamplingConfig(1.0, seed=2**63 + 5),
    SamplingConfig(0.6, seed=1),
    SamplingConfig(2.0, top_k=5, seed=2),
    SamplingConfig(1.3, top_p=0.7, seed=3),
    SamplingConfig(1.0, min_p=0.2, seed=4),
    SamplingConfig(1.5, top_k=9, top_p=0.8, min_p=0.1, seed=5),
]
LOGITS = np.array([0.3, -1, 2, 2, 0.5, 1.2, -3, 0, 1, 1, 1, -0.5, 0.25, 1.75, -8, -np.inf])


def by_reference(logits: np.ndarray, params: np.ndarray, positions: np.ndarray) -> np.ndarray:
    return reference({"logits": logits.astype(float), "params": params, "positions": positions}, {})["tokens"]


def by_cpu(logits: np.ndarray, params: np.ndarray, positions: np.ndarray) -> np.ndarray:
    from cpu_backend.program import run_op

    tokens = np.full(len(logits), -7, np.int32)
    arrays = {"logits": logits, "params": params, "tokens": tokens, "positions": positions}
    tensors = {name: Tensor.from_numpy(array) for name, array in arrays.items()}
    run_op("sample", {**tensors, "counts": None, "ids": None}, {}, num_threads=2)
    return tokens


@pytest.mark.parametrize("config", FILTERS, ids=range(len(FILTERS)))
@pytest.mark.parametrize(("sampler", "draws"), [(by_reference, 4_000), (by_cpu, 20_000)], ids=["reference", "cpu"])
def test_draws_follow_the_distribution(sampler: Sampler, draws: int, config: SamplingConfig) -> None:
    logits = np.repeat(LOGITS[None].astype(np.float32), draws, 0)
    params = np.repeat(pack_params([config]), draws, 0)
    tokens = sampler(logits, params, np.arange(draws, dtype=np.int64) * 7 + 2**31)
    expected = filtered(LOGITS, config) * draws
    counts = np.bincount(tokens, minlength=len(LOGITS))
    assert counts[expected == 0].sum() == 0, "a filtered token was drawn"
    some = expected > 0
    chi_square = ((counts[some] - expected[some]) ** 2 / expected[some]).sum()
    freedom = some.sum() - 1
    limit = freedom * (1 - 2 / (9 * freedom) + 3.72 * np.sqrt(2 / (9 * freedom))) ** 3  # Wilson-Hilferty, p = 1e-4
    assert chi_square < limit, f"chi-square {chi_square:.1f} over {limit:.1f}: {counts.tolist()}"


def test_gumbel_max_of_many_rows_follows_softmax() -> None:
    draws = 20_000
    score = LOGITS[:15] - np.log(-np.log(uniforms(9, np.arange(draws), 15)))
    expected = np.exp(LOGITS[:15]) / np.exp(LOGITS[:15]).sum() * draws
    counts = np.bincount(score.argmax(axis=1), minlength=15)
    assert ((counts - expected) ** 2 / expected).sum() < 42.6  # 14 degrees of freedom, p = 1e-4


def test_the_draw_depends_on_seed_and_position_alone() -> None:
    logits = np.random.Generator(np.random.PCG64(5)).standard_normal(50)
    config = np.frombuffer(pack_params([SamplingConfig(1.0, seed=77)]).tobytes(), PARAMS)[0]
    alone = [choose(logits, None, config, p).token for p in range(40)]
    assert len(set(alone)) > 10
    together = by_reference(
        np.repeat(logits[None], 40, 0), np.repeat(pack_params([SamplingConfig(1.0, seed=77)]), 40, 0), np.arange(40)
    )
    assert together.tolist() == alone
    other = [choose(np.append(logits, -50.0), None, config, p).token for p in range(40)]
    assert other == alone, "a token that cannot win changes nothing"


def test_few_choices_are_uncertain() -> None:
    """The parity suite leaves out rows in which float32 may decide otherwise; there must be next to none."""
    cases = CONTRACTS["sample"].cases
    assert cases is not None
    rows = [certain_rows({k: v.astype(float) if k == "logits" else v for k, v in c.arrays.items()}) for c in cases()]
    certain = np.concatenate(rows)
    assert len(certain) > 300
    assert (~certain).mean() < 0.02


@pytest.mark.parametrize(
    ("logits", "config", "certain"),
    [
        ([1.0, 1.0 + 1e-7], SamplingConfig(), True),  # greedy compares what it is given
        ([3.0, 2.0, 1.0], SamplingConfig(1.0, top_p=float(np.exp(3) / np.exp([3, 2, 1]).sum()), seed=0), None),
        ([9.0, 1.0, 1.0 - 1e-7], SamplingConfig(1.0, top_k=2), False),
    ],
)
def test_uncertain_choices_are_known(logits: list[float], config: SamplingConfig, certain: bool | None) -> None:
    record = np.frombuffer(pack_params([config]).tobytes(), PARAMS)[0]
    choices = [choose(np.array(logits), None, record, p) for p in range(200)]
    if certain is None:  # uncertain in just the draws that the tier at the edge would win
        assert {c.token for c in choices if c.certain} == {0}
        assert 20 < sum(not c.certain for c in choices) < 120
    else:
        assert {c.certain for c in choices} == {certain}


def test_params_hold_every_option() -> None:
    config = SamplingConfig(0.5, 2**40, 0.9, 0.1, 1.2, -0.3, 0.4, 2**64 - 1)
    rows = pack_params([config, SamplingConfig()])
    assert rows.shape == (2, PARAM_WORDS)
    assert rows.dtype == np.int32
    record = rows.view(PARAMS)[0, 0]
    for name in ("temperature", "top_p", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty"):
        assert record[name] == np.float32(getattr(config, name))
    assert record["top_k"] == 2**31 - 1
    assert record["seed"] == 2**64 - 1
    assert pack_params([]).shape == (0, PARAM_WORDS)
    assert SEEN_IN_PROMPT > 2**24
