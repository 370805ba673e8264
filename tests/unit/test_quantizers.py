"""What chooses scales and quants: each method against rounding, its own objective, and the format's decoder."""

from __future__ import annotations

import numpy as np
import pytest

from gllm_driver.quant.formats import FORMATS
from gllm_driver.quant.gptq import Curvature, gptq
from gllm_driver.quant.grid import GRIDS
from gllm_driver.quant.hqq import P, half_quadratic

rng = np.random.Generator(np.random.PCG64(5))
ROWS = (rng.standard_t(4, (24, 256)) * 0.02).astype(np.float32)
INPUTS = (rng.standard_normal((600, 256)) @ (rng.standard_normal((256, 256)) * np.linspace(0.1, 2, 256))).astype(
    np.float32
)
NAMES = list(GRIDS)


def blocks(name: str) -> np.ndarray:
    return ROWS.reshape(-1, GRIDS[name].block_size)


def decoded(name: str, data: np.ndarray) -> np.ndarray:
    return FORMATS[name].dequantize(data.reshape(-1), ROWS.shape)


@pytest.mark.parametrize("name", NAMES)
def test_a_grid_says_what_its_format_decodes(name: str) -> None:
    grid, x = GRIDS[name], blocks(name)
    s, m = grid.stored(*grid.extremes(x))
    u = grid.round(x, s, m)
    assert u.min() >= 0
    assert u.max() <= grid.top
    assert np.allclose(decoded(name, grid.pack(u, s, m)), (s * u + m).reshape(ROWS.shape), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_search_loses_no_more_than_rounding(name: str) -> None:
    grid, x = GRIDS[name], blocks(name)
    s, m = grid.search(x)
    searched = np.square(decoded(name, grid.pack(grid.round(x, s, m), s, m)) - ROWS).sum()
    rounded = np.square(decoded(name, FORMATS[name].quantize(ROWS)) - ROWS).sum()
    assert searched <= rounded * (1.001 if grid.bits < 8 else 1.1)
    if grid.bits == 2:
        assert searched < 0.7 * rounded


@pytest.mark.parametrize("name", ["int4_32", "int2_64m", "int1_64m", "q4_0"])
def test_search_heeds_the_weights_of_errors(name: str) -> None:
    grid, x = GRIDS[name], blocks(name)
    weight = np.where(np.arange(grid.block_size) % 4 == 0, np.float32(100), np.float32(0.01))[None]
    errors = []
    for w in (None, weight):
        s, m = grid.search(x, w)
        errors.append((weight * np.square(s * grid.round(x, s, m) + m - x)).sum())
    assert errors[1] < 0.9 * errors[0]


@pytest.mark.parametrize("name", ["int4_64m", "int4_64z", "int2_32m", "int4_32", "q4_1"])
def test_half_quadratic_lowers_its_own_error(name: str) -> None:
    grid, x = GRIDS[name], blocks(name)

    def error(s: np.ndarray, m: np.ndarray) -> float:
        return float((np.abs(s * grid.round(x, s, m) + m - x) ** P).sum())

    assert error(*half_quadratic(grid, x)) < 0.99 * error(*grid.stored(*grid.extremes(x)))


@pytest.mark.parametrize(
    "name", ["int8_32", "int4_64m", "int4_64z", "int4_128", "int2_64m", "int1_32m", "q5_0", "q5_1"]
)
def test_gptq_keeps_the_products(name: str) -> None:
    grid, x = GRIDS[name], blocks(name)
    s, m = grid.search(x)
    plain = decoded(name, grid.pack(grid.round(x, s, m), s, m))
    curvature = Curvature(INPUTS.T @ INPUTS)
    once, swept = (decoded(name, gptq(grid, ROWS, curvature, sweeps)) for sweeps in (0, 2))
    errors = [np.square(INPUTS @ (values - ROWS).T).sum() for values in (plain, once, swept)]
    assert errors[1] < 0.8 * errors[0]
    assert errors[2] < errors[1]


def test_rows_do_not_depend_on_each_other() -> None:
    curvature, grid = Curvature(INPUTS.T @ INPUTS), GRIDS["int4_64m"]
    whole = decoded("int4_64m", gptq(grid, ROWS, curvature))
    halves = np.concatenate([gptq(grid, ROWS[:10], curvature), gptq(grid, ROWS[10:], curvature)])
    assert np.allclose(decoded("int4_64m", halves), whole, atol=2e-3)


@pytest.mark.parametrize("name", ["int4_64m", "int2_32", "int1_32m", "q4_0"])
def test_blocks_of_zeros_and_of_one_value(name: str) -> None:
    grid = GRIDS[name]
    rows = np.zeros((3, 256), np.float32)
    rows[1] = 0.5
    rows[2, 7] = -1
    for s, m in (
        grid.search(rows.reshape(-1, grid.block_size)),
        half_quadratic(grid, rows.reshape(-1, grid.block_size)),
    ):
        assert np.isfinite(s).all()
        assert np.isfinite(m).all()
    data = gptq(grid, rows, Curvature(INPUTS.T @ INPUTS))
    values = FORMATS[name].dequantize(data.reshape(-1), rows.shape)
    assert not values[0].any() or grid.bits == 1
    assert np.isfinite(values).all()


@pytest.mark.parametrize("name", ["int8_64z", "int4_64z", "int2_32z"])
@pytest.mark.parametrize("spread", [0.0, 1e-5, 1e-3])
def test_values_far_from_zero_and_close_together_have_a_zero_point(name: str, spread: float) -> None:
    grid = GRIDS[name]
    rows = (0.5 + spread * np.random.default_rng(0).standard_normal((4, 256))).astype(np.float32)
    rows[1] *= -1
    x = rows.reshape(-1, grid.block_size)
    for s, m in (grid.search(x), half_quadratic(grid, x)):
        values = FORMATS[name].dequantize(grid.pack(grid.round(x, s, m), s, m).reshape(-1), x.shape)
        assert np.abs(values - x).max() < 2e-3 + 6 * spread
    data = gptq(grid, rows, Curvature(INPUTS.T @ INPUTS))
    values = FORMATS[name].dequantize(data.reshape(-1), rows.shape)
    assert np.abs(values - rows).max() < 2e-2


def test_inputs_that_never_move_are_no_obstacle() -> None:
    inputs = INPUTS[:40].copy()
    inputs[:, 5] = 0
    data = gptq(GRIDS["int4_64m"], ROWS, Curvature(inputs.T @ inputs))
    assert np.square(inputs @ (decoded("int4_64m", data) - ROWS).T).mean() < 0.1 * np.square(inputs @ ROWS.T).mean()


def test_inputs_without_numbers_are_refused() -> None:
    h = INPUTS.T @ INPUTS
    h[3, 4] = np.nan
    with pytest.raises(ValueError, match="NaN"):
        Curvature(h)


@pytest.mark.parametrize("name", [n for n, f in FORMATS.items() if f.takes_importance])
def test_k_formats_heed_importance(name: str) -> None:
    importance = np.where(np.arange(256) % 8 == 0, np.float32(50), np.float32(0.02))
    plain, weighed = (decoded(name, FORMATS[name].quantize(ROWS, each)) for each in (None, importance))
    assert (importance * np.square(weighed - ROWS)).sum() < 0.9 * (importance * np.square(plain - ROWS)).sum()
