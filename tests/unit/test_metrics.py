"""Histograms and the figures made of them."""

from __future__ import annotations

import random

import pytest

from gllm_driver.metrics import BOUNDS, Histogram


def test_quantiles_are_right_to_a_class() -> None:
    rng = random.Random(0)
    values = [rng.lognormvariate(-5, 1.5) for _ in range(5000)]
    histogram = Histogram()
    for value in values:
        histogram.add(value)
    values.sort()
    for q in (0.01, 0.5, 0.9, 0.99, 1.0):
        exact = values[max(int(q * len(values)) - 1, 0)]
        assert exact <= histogram.quantile(q) * 1.0001
        assert histogram.quantile(q) <= exact * (BOUNDS[1] / BOUNDS[0]) * 1.0001
    summary = histogram.summary()
    assert summary.num == 5000
    assert summary.mean == pytest.approx(sum(values) / 5000)
    assert summary.max == values[-1]
    assert sum(count for _, count in summary.classes) == 5000
    for bound, _ in summary.classes:
        assert sum(count for b, count in summary.classes if b <= bound) == sum(value <= bound for value in values)


def test_extremes_are_counted() -> None:
    histogram = Histogram()
    assert histogram.quantile(0.5) == 0.0
    histogram.add(0.0)
    histogram.add(1e6)
    assert histogram.quantile(0.5) <= BOUNDS[0]
    assert histogram.quantile(1.0) == 1e6
    assert sum(histogram.counts) == 2


@pytest.mark.parametrize("q", [0.0, -1.0, 1.1, float("nan")])
def test_no_such_quantile(q: float) -> None:
    with pytest.raises(ValueError, match="quantile"):
        Histogram().quantile(q)
