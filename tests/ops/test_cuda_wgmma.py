"""Products of many tokens by warpgroups (sm_90a) on the simulated device, and which calls go there."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from cuda_runner import DEVICE_WEIGHTS
from cuda_tolerance import activations_for
from op_harness import label, run_case, storages
from op_memory import decode, dtype_named, encode
from test_cuda_each_kernel import tensors_of
from test_cuda_parity import ROOT
from test_cuda_products import kernels

from gllm_driver.launch import DeviceProps, Launch, _products, _wgmma, launches
from gllm_driver.ops import CONTRACTS
from gllm_driver.ops._case_tools import Chunk, normal, rng
from gllm_driver.ops._qkv_cases import _case as qkv_case
from gllm_driver.ops.contract import Case
from gllm_driver.types import DTYPES, Tensor

pytestmark = pytest.mark.hostsim

HALVES = ("f16", "bf16")
TWO_SMS = DeviceProps(cc=(9, 0), num_sms=2, max_smem_optin=227 << 10)  # blocks take several tiles
H200_LIKE = DeviceProps(cc=(9, 0), num_sms=132, max_smem_optin=227 << 10)


def run(op: str, arrays: Mapping[str, Tensor | None], scalars: Mapping[str, float]) -> None:
    kernels().run_op(op, arrays, scalars, device=TWO_SMS, deterministic=False)


def symbols(op: str, case: Case, storage: Mapping[str, str]) -> list[str]:
    tensors = tensors_of(CONTRACTS[op], case, storage)
    args = CONTRACTS[op].bind(tensors, case.scalars)
    dtypes = {name: tensor.dtype.name for name, tensor in tensors.items()}
    return [launch.symbol for launch in launches(op, args, dtypes, TWO_SMS, False)]


@pytest.fixture(params=_wgmma.SHAPES, ids=lambda shape: shape.name)
def shape(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> _wgmma.WgmmaShape:
    """The one shape there is, for any number of tokens."""
    monkeypatch.setattr(_wgmma, "SHAPES", (request.param,))
    monkeypatch.setattr(_wgmma, "MIN_TOKENS", 1)
    monkeypatch.setattr(_products, "MAX_DOT_TOKENS", 0)
    found: _wgmma.WgmmaShape = request.param
    return found


@pytest.mark.parametrize("dtype", HALVES)
def test_every_case_of_queries_keys_and_values(dtype: str, shape: _wgmma.WgmmaShape) -> None:
    """Few tokens too, which do not come here in practice: all forms of heads and pages, values from zero to NaN."""
    op, contract = "fused_qkv_rope", CONTRACTS["fused_qkv_rope"]
    assert contract.cases is not None
    num_run = 0
    for case in contract.cases():
        for storage in storages(contract, case, DEVICE_WEIGHTS):
            names = symbols(op, case, storage)
            if not names[1:] or not names[1].startswith(f"{op}__wgmma_{dtype}_{shape.name}"):
                continue
            try:
                run_case(contract, case, storage, run, alternatives=activations_for(op, storage))
            except AssertionError as error:
                raise AssertionError(f"{case.label} {label(contract, storage)}") from error
            num_run += 1
    assert num_run >= 10


HEADS: dict[str, dict[str, Any]] = {
    "normalized": {"qk_norm": True},
    "biases": {"bias": True},
    "interleaved": {"style": 1, "qk_norm": True, "bias": True},
    "partly-interleaved": {"style": 1, "pairs": 12},
    "unrotated": {"pairs": 0},
    "layernorm": {"center": True, "norm_bias": True},
}


@pytest.mark.parametrize(("head_dim", "dtype"), [(64, "f16"), (128, "bf16")])
@pytest.mark.parametrize("name", HEADS)
def test_heads_finished_by_the_product(name: str, head_dim: int, dtype: str, shape: _wgmma.WgmmaShape) -> None:
    op, options = "fused_qkv_rope", {"pairs": head_dim // 2} | HEADS[name]
    case = qkv_case(
        f"wgmma-{name}-{head_dim}",
        chunks=(Chunk(70), Chunk(3, 5)),
        hidden=72,
        heads=3,
        kv_heads=1,
        head_dim=head_dim,
        layers=(2, 1),
        **options,
    )
    for storage in storages(CONTRACTS[op], case, (dtype,)):
        (*_, product) = symbols(op, case, storage)
        assert product == f"{op}__wgmma_{dtype}_{shape.name}_d{head_dim}"
        run_case(CONTRACTS[op], case, storage, run, alternatives=activations_for(op, storage))


def values(g: np.random.Generator, K: int) -> np.ndarray:
    """Rows of activations, K elements each: ordinary, zero, huge, tiny, with an outlier, an infinity, a NaN."""
    x = normal(g, 7, K)
    x[1] = 0
    x[2] *= 1e6
    x[3] *= 1e-9
    x[4, 40] = 500
    x[5, 0] = np.inf
    x[6, K - 1] = np.nan
    return x


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("op", ["linear", "fused_gate_up_silu"])
def test_values(op: str, dtype: str, shape: _wgmma.WgmmaShape) -> None:
    g = rng("wgmma", "values")
    arrays = {"x": values(g, 96)}
    scalars: dict[str, float] = {}
    if op == "linear":
        arrays |= {"weight": normal(g, 20, 96), "residual": normal(g, 7, 20)}
    else:
        arrays |= {"norm": normal(g, 96), "gate": normal(g, 20, 96, scale=0.1), "up": normal(g, 20, 96, scale=0.1)}
        scalars = {"eps": 1e-6, "activation": 0}
    for name in ("weight", "up"):
        if name in arrays:
            arrays[name][3] *= 1e4 if op == "linear" else 1e3
    storage = dict.fromkeys(arrays, "f32") | {name: dtype for name in ("weight", "gate", "up") if name in arrays}
    case = Case("values", arrays, scalars)
    run_case(CONTRACTS[op], case, storage, run, alternatives=activations_for(op, storage))


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize(("T", "K", "N"), [(130, 200, 302), (300, 72, 258), (65, 520, 522), (257, 136, 1026)])
def test_many_tiles(T: int, K: int, N: int, dtype: str, shape: _wgmma.WgmmaShape) -> None:
    """More tiles than blocks, more stages than the ring has, ragged everywhere."""
    g = rng("wgmma", T, K, N)
    arrays = {"x": normal(g, T, K), "weight": normal(g, N, K), "bias": normal(g, N), "residual": normal(g, T, N)}
    storage = dict.fromkeys(arrays, "f32") | {"weight": dtype}
    case = Case(f"{T}x{K}x{N}", arrays, aliases={"out": "residual"})
    run_case(CONTRACTS["linear"], case, storage, run, alternatives=activations_for("linear", storage))


@pytest.mark.parametrize("dtype", HALVES)
def test_many_tiles_of_gate_and_up(dtype: str, shape: _wgmma.WgmmaShape) -> None:
    g = rng("wgmma", "gate-up")
    T, D, F = 290, 136, 274
    arrays = {"x": normal(g, T, D), "norm": normal(g, D)}
    arrays |= {name: normal(g, F, D, scale=D**-0.5) for name in ("gate", "up")}
    storage = dict.fromkeys(arrays, "f32") | {"gate": dtype, "up": dtype}
    op = "fused_gate_up_silu"
    for activation in (0, 1):
        case = Case(f"{T}x{D}x{F}-{activation}", arrays, {"eps": 1e-5, "activation": activation})
        run_case(CONTRACTS[op], case, storage, run, alternatives=activations_for(op, storage))


# ---- packed weights, unpacked first

PACKED = ("p8_32", "p8_16", "p4_32m", "p4_128z", "p2_64", "p2_16m", "p1_32", "p1_128z")


class _DoneError(Exception):
    """The op has run; nothing is to be judged."""


def outputs(op: str, case: Case, storage: Mapping[str, str]) -> list[np.ndarray]:
    """What the op writes, as float64."""
    found: list[np.ndarray] = []

    def runner(name: str, tensors: Mapping[str, Tensor | None], scalars: Mapping[str, float]) -> None:
        run(name, tensors, scalars)
        for array in CONTRACTS[op].arrays:
            tensor = tensors[array.name]
            if array.role != "in" and tensor is not None:
                found.append(tensor.to_numpy().astype(np.float64))
        raise _DoneError

    with pytest.raises(_DoneError):
        run_case(CONTRACTS[op], case, dict(storage), runner)
    return found


@pytest.mark.parametrize("dtype", PACKED)
@pytest.mark.parametrize("op", ["linear", "fused_gate_up_silu", "fused_qkv_rope"])
def test_packed_weights(op: str, dtype: str, shape: _wgmma.WgmmaShape) -> None:
    """The bits of f16 weights of the same values."""
    g = rng("wgmma", "packed", dtype)
    T, K = 70, 384  # a segment and a half
    if op == "linear":
        arrays = {"x": normal(g, T, K), "weight": normal(g, 130, K), "residual": normal(g, T, 130)}
        case = Case("packed", arrays)
        names = {"weight"}
    elif op == "fused_gate_up_silu":
        arrays = {"x": normal(g, T, K), "norm": normal(g, K)}
        arrays |= {name: normal(g, 130, K, scale=K**-0.5) for name in ("gate", "up")}
        case = Case("packed", arrays, {"eps": 1e-5, "activation": 0})
        names = {"gate", "up"}
    else:
        options: dict[str, Any] = {
            "heads": 3,
            "kv_heads": 1,
            "head_dim": 64,
            "layers": (2, 1),
            "pairs": 32,
            "qk_norm": True,
        }
        case = qkv_case("packed", chunks=(Chunk(70), Chunk(3, 5)), hidden=K, **options)
        names = {"wq", "wk", "wv"}
    (storage,) = list(storages(CONTRACTS[op], case, (dtype,)))[:1]
    decoded = {name: decode(encode(case.arrays[name], dtype), dtype, case.arrays[name].shape) for name in names}
    halves = replace(case, arrays={**case.arrays, **decoded})
    found = symbols(op, case, storage)
    assert found[: len(names)] == [f"pack_weight__unpack_q{dtype[1]}"] * len(names)
    in_halves = {**storage, **dict.fromkeys(names, "f16")}
    assert found[len(names) :] == symbols(op, halves, in_halves)
    results = [outputs(op, each, stored) for each, stored in ((case, storage), (halves, in_halves))]
    for one, other in zip(*results, strict=True):
        assert np.array_equal(np.isnan(one), np.isnan(other))  # of the cache, what no token writes
        assert np.isfinite(one).any()
        if dtype.endswith("m"):  # a minimum is added in one rounding here, in two there
            assert np.nanmax(np.abs(one - other)) <= 2e-3 * np.nanmax(np.abs(other))
        else:
            assert np.array_equal(one, other, equal_nan=True)


# ---- which calls go there


def of_linear(
    *,
    dtype: str = "bf16",
    T: int = 2048,
    K: int = 4096,
    N: int = 4096,
    address: int = 256,
    device: DeviceProps = H200_LIKE,
    deterministic: bool = False,
) -> list[Launch]:
    tensors: dict[str, Tensor | None] = {
        "x": Tensor(256, (T, K), DTYPES["f32"]),
        "weight": Tensor(address, (N, K), dtype_named(dtype)),
        "out": Tensor(256, (T, N), DTYPES["f32"]),
    }
    return launches("linear", CONTRACTS["linear"].bind(tensors), {"weight": dtype}, device, deterministic)


def test_many_tokens_of_16_bit_weights() -> None:
    for dtype in HALVES:
        rows, product = of_linear(dtype=dtype)
        assert rows.symbol == f"linear__flat_rows_{dtype}"
        assert product.symbol == f"linear__wgmma_{dtype}_128x256"
        assert product.grid[0] <= H200_LIKE.num_sms
        x, weight = product.tensor_maps
        assert (x.rows, x.cols, x.in_workspace) == (2048, 4096, True)
        assert (weight.rows, weight.cols, weight.address, weight.in_workspace) == (4096, 4096, 256, False)


def test_many_tokens_of_packed_weights() -> None:
    unpack, rows, product = of_linear(dtype="p4_32")
    assert (unpack.symbol, unpack.grid) == ("pack_weight__unpack_q4", (4096, 1, 1))
    assert rows.symbol == "linear__flat_rows_f16"
    assert product.symbol == "linear__wgmma_f16_128x256"
    _, weight = product.tensor_maps
    assert weight.in_workspace
    assert weight.address % 256 == 0
    assert weight.address >= product.workspace_nbytes
    assert unpack.workspace_nbytes == weight.address + 4096 * 4096 * 2


@pytest.mark.parametrize(
    "changes",
    [
        {"deterministic": True},
        {"T": _wgmma.MIN_TOKENS - 1},
        {"dtype": "f32"},
        {"dtype": "p8_32", "deterministic": True},
        {"dtype": "p8_32", "T": _wgmma.MIN_TOKENS - 1},
        {"dtype": "p4_32", "N": 1 << 17},  # unpacked it would take a GiB
        {"K": 4100},
        {"N": 4095},
        {"address": 8 + 256},
        {"device": DeviceProps(cc=(8, 0), num_sms=132, max_smem_optin=227 << 10)},
        {"device": DeviceProps(cc=(10, 0), num_sms=132, max_smem_optin=227 << 10)},
        {"device": DeviceProps(cc=(9, 0), num_sms=132, max_smem_optin=99 << 10)},
    ],
)
def test_calls_that_go_elsewhere(changes: dict[str, Any]) -> None:
    assert not any("wgmma" in launch.symbol for launch in of_linear(**changes))


def test_tiles_leave_few_multiprocessors_idle() -> None:
    assert of_linear(T=512)[1].symbol.endswith("128x128")  # 128 tiles rather than 64
    assert of_linear(T=512, N=28_672)[1].symbol.endswith("128x256")


def test_the_sources_have_the_shapes_the_launches_name() -> None:
    text = (ROOT / "kernels_cu" / "common" / "wgmma_variants.cuh").read_text()
    said = [tuple(map(int, found)) for found in re.findall(r"X\(name, Half, (\d+), (\d+), (\d+), ", text)]
    assert said == [(shape.tokens, shape.rows, shape.stages) for shape in _wgmma.SHAPES]
