"""The references against other ways to say the same thing: properties from the papers, plain loops, each other."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
import pytest

from gllm_driver.ops import CONTRACTS, fused_gate_up_silu, fused_qkv_rope, linear
from gllm_driver.ops._case_tools import Chunk, normal, paged, rng
from gllm_driver.ops.contract import Case


def wide(arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """What a reference is given: float64 and integers."""
    return {k: v.astype(np.float64) if v.dtype.kind == "f" else v for k, v in arrays.items()}


def evaluate(op: str, case: Case) -> Mapping[str, np.ndarray]:
    reference = CONTRACTS[op].reference
    assert reference is not None
    return reference(wide(case.arrays), case.scalars)


def find(op: str, label: str) -> Case:
    cases = CONTRACTS[op].cases
    assert cases is not None
    return next(c for c in cases() if c.label == label)


def test_rms_norm_has_unit_mean_square() -> None:
    case = find("rms_norm", "no-eps")
    out = evaluate("rms_norm", case)["out"] / case.arrays["weight"]
    assert np.allclose((out * out).mean(axis=1), 1, rtol=1e-12)


def test_rms_norm_by_loops() -> None:
    case = find("rms_norm", "7x100-residual")
    x, residual, weight = (case.arrays[n].astype(float) for n in ("x", "residual", "weight"))
    out = evaluate("rms_norm", case)
    for t in range(7):
        row = [a + b for a, b in zip(x[t], residual[t], strict=True)]
        root = math.sqrt(math.fsum(v * v for v in row) / 100 + case.scalars["eps"])
        assert np.allclose(out["x"][t], row, rtol=1e-14)
        assert np.allclose(out["out"][t], [v / root * w for v, w in zip(row, weight, strict=True)], rtol=1e-12)


def test_linear_by_loops() -> None:
    case = find("linear", "3x100x7-bias-residual")
    a = wide(case.arrays)
    out = evaluate("linear", case)["out"]
    for t in range(3):
        for n in range(7):
            exact = math.fsum(x * w for x, w in zip(a["x"][t], a["weight"][n], strict=True))
            assert out[t, n] == pytest.approx(exact + a["bias"][n] + a["residual"][t, n], rel=1e-12)


def test_activations_at_known_points() -> None:
    x = np.array([-1000.0, -1.0, 0.0, 1.0, 1000.0])
    assert np.allclose(fused_gate_up_silu.silu(x), [0, -0.2689414213699951, 0, 0.7310585786300049, 1000])
    erf = np.array([v / 2 * (1 + math.erf(v / math.sqrt(2))) for v in x])
    assert np.abs(fused_gate_up_silu.gelu_tanh(x) - erf).max() < 5e-4  # the tanh form approximates the erf form


def test_rotation_is_a_product_with_a_unit_complex_number() -> None:
    g = rng("rotation")
    heads, angle = g.standard_normal((5, 3, 14)), g.uniform(-9, 9, (5, 4))
    cos_sin = np.stack([np.cos(angle), np.sin(angle)], axis=1)
    turn = np.exp(1j * angle)[:, None]
    adjacent = fused_qkv_rope.rotate(heads, cos_sin, fused_qkv_rope.INTERLEAVED)
    z = (heads[..., 0:8:2] + 1j * heads[..., 1:8:2]) * turn
    assert np.allclose(adjacent[..., 0:8:2], z.real, atol=1e-13)
    assert np.allclose(adjacent[..., 1:8:2], z.imag, atol=1e-13)
    halves = fused_qkv_rope.rotate(heads, cos_sin, 0)
    z = (heads[..., :4] + 1j * heads[..., 4:8]) * turn
    assert np.allclose(halves[..., :8], np.concatenate([z.real, z.imag], axis=-1), atol=1e-13)
    assert np.array_equal(adjacent[..., 8:], heads[..., 8:])
    assert np.array_equal(halves[..., 8:], heads[..., 8:])


@pytest.mark.parametrize("style", [0, fused_qkv_rope.INTERLEAVED])
def test_rotated_dot_products_depend_on_distance_alone(style: int) -> None:
    g = rng("distance")
    q, k = g.standard_normal((2, 1, 1, 16))

    def at(x: np.ndarray, position: int) -> np.ndarray:
        reference = CONTRACTS["rope_table"].reference
        assert reference is not None
        arrays = {"positions": np.array([position]), "inv_freq": 1e4 ** -(np.arange(8) / 8)}
        return fused_qkv_rope.rotate(x, reference(arrays, {"scale": 1.0})["cos_sin"], style).ravel()

    near = at(q, 9) @ at(k, 4)
    assert near == pytest.approx(at(q, 2**21 + 9) @ at(k, 2**21 + 4), rel=1e-8)
    assert abs(near - at(q, 9) @ at(k, 5)) > 1e-3


def test_rope_table_at_a_large_position() -> None:
    case = find("rope_table", "one-far-1")
    cos, sin = evaluate("rope_table", case)["cos_sin"][0]
    turns = 2**21 / (2 * math.pi)
    assert math.atan2(sin[0], cos[0]) % (2 * math.pi) == pytest.approx((turns % 1) * 2 * math.pi, abs=1e-8)


def dense_attention(q: np.ndarray, k: np.ndarray, v: np.ndarray, first: int, window: int, scale: float) -> np.ndarray:
    """One sequence by a full masked score matrix: q [T, H, Dh] at positions first …, k and v [n, HK, Dh]."""
    T, H, _ = q.shape
    out = np.zeros_like(q)
    for h in range(H):
        group = h // (H // k.shape[1])
        scores = scale * q[:, h] @ k[:, group].T
        row, column = np.arange(first, first + T)[:, None], np.arange(len(k))[None]
        hidden = (column > row) | ((column <= row - window) if window else False)
        p = np.exp(np.where(hidden, -np.inf, scores))
        out[:, h] = p / p.sum(axis=1, keepdims=True) @ v[:, group]
    return out


@pytest.mark.parametrize("window", [0, 1, 7, 1000])
@pytest.mark.parametrize(("kv_heads", "page_size"), [(1, 1), (2, 4), (4, 16)])
def test_flash_attention_is_dense_attention(window: int, kv_heads: int, page_size: int) -> None:
    g = rng("dense", window, kv_heads)
    chunks = [Chunk(5, 11), Chunk(0), Chunk(1), Chunk(23)]
    cache = paged(g, chunks, page_size=page_size, kv_heads=kv_heads, head_dim=6, num_layers=2, layer=1)
    q = normal(g, len(cache.positions), 4 * 6)
    arrays = {"q": q, "kv": cache.kv, "page_table": cache.page_table, "positions": cache.positions}
    case = Case("", {**arrays, "offsets": cache.offsets}, {"layer": 1, "window": window, "scale": 0.4})
    out = evaluate("flash_attention", case)["out"]
    for s, chunk in enumerate(chunks):
        tokens = [cache.kv[cache.page_table[s, p // page_size], 1, :, :, p % page_size] for p in range(chunk.total)]
        if chunk.length:
            kv = np.array(tokens, float)
            rows = slice(cache.offsets[s], cache.offsets[s + 1])
            mine = q[rows].astype(float).reshape(-1, 4, 6)
            dense = dense_attention(mine, kv[:, 0], kv[:, 1], chunk.context, window, 0.4)
            assert np.allclose(out[rows], dense.reshape(-1, 24), rtol=1e-12, atol=1e-14)


def test_paged_attention_is_flash_attention_of_chunks_of_one() -> None:
    case = find("paged_attention", "page-4-window-5")
    sequences = len(case.arrays["q"])
    offsets = np.arange(sequences + 1, dtype=np.int32)
    same = Case("", {**case.arrays, "offsets": offsets}, case.scalars)
    assert np.array_equal(evaluate("paged_attention", case)["out"], evaluate("flash_attention", same)["out"])


def test_chunks_give_what_the_whole_gives() -> None:
    """fused_qkv_rope and flash_attention over a prompt at once, and over its parts in turn."""
    g = rng("chunks")
    whole = paged(g, [Chunk(19)], page_size=4, kv_heads=1, head_dim=8, cached=False)
    angle = np.arange(19)[:, None] * 1e4 ** -(np.arange(4) / 4)
    weights = {"norm": g.standard_normal(12), "wq": g.standard_normal((16, 12))}
    weights |= {"wk": g.standard_normal((8, 12)), "wv": g.standard_normal((8, 12))}
    x, table = g.standard_normal((19, 12)), np.stack([np.cos(angle), np.sin(angle)], axis=1)

    def step(kv: np.ndarray, rows: slice) -> tuple[np.ndarray, np.ndarray]:
        arrays = {**weights, "x": x[rows], "cos_sin": table[rows], "positions": whole.positions[rows], "kv": kv}
        arrays |= {"seq": whole.seq[rows], "page_table": whole.page_table}
        scalars = {"layer": 0, "rope_style": 0, "eps": 1e-6}
        made = fused_qkv_rope.reference(arrays, scalars)
        length = len(made["q"])
        query = {"q": made["q"], "kv": made["kv"], "page_table": whole.page_table, "positions": whole.positions[rows]}
        query["offsets"] = np.array([0, length])
        attention = CONTRACTS["flash_attention"].reference
        assert attention is not None
        return made["kv"], attention(query, {"layer": 0, "window": 0, "scale": 0.35})["out"]

    kv, at_once = step(whole.kv.astype(float), slice(0, 19))
    parts, cached = [], whole.kv.astype(float)
    for rows in (slice(0, 7), slice(7, 8), slice(8, 19)):
        cached, out = step(cached, rows)
        parts.append(out)
    assert np.allclose(np.concatenate(parts), at_once, rtol=1e-12)
    assert np.allclose(cached, kv, equal_nan=True)


def test_gate_up_is_its_parts() -> None:
    case = find("fused_gate_up_silu", "3x100x7-gelu_tanh-bias")
    a = wide(case.arrays)
    normed = a["x"] / np.sqrt((a["x"] ** 2).mean(axis=1, keepdims=True) + case.scalars["eps"]) * a["norm"]
    gate, up = (linear.project(normed, a[n], a[f"{n}_bias"]) for n in ("gate", "up"))
    assert np.allclose(evaluate("fused_gate_up_silu", case)["out"], fused_gate_up_silu.gelu_tanh(gate) * up, rtol=1e-12)


def test_embedding_picks_rows() -> None:
    case = find("embedding", "7x50x100")
    out = evaluate("embedding", case)["out"]
    for row, token in zip(out, case.arrays["ids"], strict=True):
        assert np.array_equal(row, case.arrays["weight"][token])
