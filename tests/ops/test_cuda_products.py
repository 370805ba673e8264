"""Products with stored weights on the simulated device: exact for few tokens, the same bits whatever their number."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
from cuda_runner import DEVICE_WEIGHTS, hostsim_folder, kernel_ops
from cuda_tolerance import INTEGERS, activations_for
from op_harness import label, run_case, storages
from op_memory import Placed, Storage, decode, dtype_named, encode
from test_cuda_parity import ROOT

from gllm_driver.launch import DeviceProps, Launch, launches
from gllm_driver.launch import _packed as packed
from gllm_driver.launch import _products as products
from gllm_driver.ops import CONTRACTS
from gllm_driver.ops._case_tools import normal, rng
from gllm_driver.ops.contract import Case
from gllm_driver.packed_types import PACKED_DTYPES
from gllm_driver.types import DTYPES, Tensor

pytestmark = pytest.mark.hostsim

PRODUCTS = [op for op in ("linear", "fused_gate_up_silu", "fused_qkv_rope") if op in kernel_ops()]
ONE_SM = DeviceProps(cc=(8, 0), num_sms=1, max_smem_optin=163 << 10)  # blocks take several units; large tiles


@functools.cache
def kernels() -> Any:
    from hostsim.direct import HostKernels

    return HostKernels(hostsim_folder())


def run(
    op: str, arrays: Mapping[str, Tensor | None], scalars: Mapping[str, float], *, deterministic: bool = False
) -> None:
    kernels().run_op(op, arrays, scalars, device=ONE_SM, deterministic=deterministic)


def parameters() -> list[Any]:
    found: list[Any] = []
    for op in PRODUCTS:
        contract = CONTRACTS[op]
        assert contract.cases is not None
        for case in contract.cases():
            for storage in storages(contract, case, DEVICE_WEIGHTS):
                name = "-".join(filter(None, (op, case.label, label(contract, storage))))
                found.append(pytest.param(op, case, storage, id=name))
    return found


@pytest.mark.parametrize(("op", "case", "storage"), parameters())
def test_default_mode(op: str, case: Case, storage: Storage) -> None:
    """With few tokens nothing is rounded that f32 holds, but for one with packed weights, which is integers of 16 bits;
    aligned memory, so tensor cores get all they can take."""
    num_tokens, is_packed = len(case.arrays["x"]), any(d in PACKED_DTYPES for d in storage.values())
    alternatives = activations_for(op, storage)
    most = packed.EXACT_TOKENS if is_packed else products.MAX_DOT_TOKENS
    if num_tokens <= most:
        alternatives = {INTEGERS: alternatives[INTEGERS]} if num_tokens == 1 and is_packed else {}
    run_case(CONTRACTS[op], case, storage, run, alternatives=alternatives)


def results(
    op: str,
    arrays: Mapping[str, np.ndarray],
    storage: Storage,
    scalars: Mapping[str, float],
    *,
    deterministic: bool = True,
) -> Any:
    """Every output."""
    placed = {n: Placed(encode(a, storage[n]), dtype_named(storage[n]), a.shape, 0) for n, a in arrays.items()}
    T = len(arrays["x"])
    for name, width in (("out", arrays.get("weight", arrays.get("gate"))), ("q", arrays.get("wq"))):
        if width is not None:
            placed[name] = Placed.unwritten(DTYPES["f32"], (T, len(width)), 0)
    tensors = {a.name: placed[a.name].tensor if a.name in placed else None for a in CONTRACTS[op].arrays}
    run(op, tensors, scalars, deterministic=deterministic)
    return {a.name: placed[a.name].values() for a in CONTRACTS[op].arrays if a.role != "in"}


LENGTHS = (1, 2, 5, 16, 17, 33)


@pytest.mark.parametrize("K", [96, 768, 2848])
@pytest.mark.parametrize("dtype", DEVICE_WEIGHTS)
@pytest.mark.parametrize("op", ["linear", "fused_gate_up_silu"])
def test_a_token_gets_the_same_bits_whatever_the_number_of_tokens(op: str, dtype: str, K: int) -> None:
    g = rng("same bits", K)
    weights = ("weight",) if op == "linear" else ("gate", "up")
    arrays = {"x": normal(g, 33, K)} | {name: normal(g, 77, K, scale=K**-0.5) for name in weights}
    if op != "linear":
        arrays["norm"] = normal(g, K)
    storage = dict.fromkeys(arrays, "f32") | dict.fromkeys(weights, dtype)
    scalars = {} if op == "linear" else {"eps": 1e-5, "activation": 0}
    whole = results(op, arrays, storage, scalars)["out"]
    for T in LENGTHS:
        assert np.array_equal(results(op, {**arrays, "x": arrays["x"][:T]}, storage, scalars)["out"], whole[:T]), T
    last = results(op, {**arrays, "x": arrays["x"][32:]}, storage, scalars)["out"]
    assert np.array_equal(last, whole[32:])
    stored = {n: decode(encode(arrays[n], dtype), dtype, arrays[n].shape) for n in weights}
    if op == "linear":
        assert np.abs(whole - arrays["x"] @ stored["weight"].T).max() < 2e-2


@pytest.mark.parametrize("has_head_norms", [False, True])
@pytest.mark.parametrize("dtype", DEVICE_WEIGHTS)
def test_heads_get_the_same_bits_whatever_the_number_of_tokens(dtype: str, has_head_norms: bool) -> None:
    g = rng("same heads")
    hidden, heads, kv_heads, head_dim, page_size = 544, 4, 2, 32, 16
    positions = np.arange(33, dtype=np.int64) + 5
    angle = positions[:, None] * 1e4 ** -(np.arange(16) / 16)
    per_token = {
        "x": normal(g, 33, hidden),
        "cos_sin": np.stack([np.cos(angle), np.sin(angle)], axis=1).astype(np.float32),
        "positions": positions,
        "seq": np.zeros(33, np.int32),
    }
    weights = {
        n: normal(g, h * head_dim, hidden, scale=hidden**-0.5) for n, h in zip(WEIGHTS, (heads, 2, 2), strict=True)
    }
    fixed = {
        **weights,
        "norm": normal(g, hidden),
        "page_table": np.array([[3, 1, 0, 2]], np.int32),
        "kv": np.zeros((4, 1, 2, kv_heads, page_size, head_dim), np.float32),
    }
    if has_head_norms:
        fixed |= {"q_norm": normal(g, head_dim), "k_norm": normal(g, head_dim)}
    storage = dict.fromkeys({**per_token, **fixed}, "f32") | dict.fromkeys(WEIGHTS, dtype)
    storage |= {"kv": "f16", "positions": "i64", "seq": "i32", "page_table": "i32"}
    scalars = {"layer": 0, "rope_style": 0, "eps": 1e-5, "qk_eps": 1e-6}
    whole = results("fused_qkv_rope", {**per_token, **fixed}, storage, scalars)
    for T in LENGTHS:
        some = results("fused_qkv_rope", {**{n: a[:T] for n, a in per_token.items()}, **fixed}, storage, scalars)
        assert np.array_equal(some["q"], whole["q"][:T]), T
        for position in positions[:T]:
            page, row = fixed["page_table"][0, position // page_size], position % page_size
            assert np.array_equal(some["kv"][page, :, :, :, row], whole["kv"][page, :, :, :, row]), T


WEIGHTS = ("wq", "wk", "wv")


def projections(T: int, hidden: int) -> tuple[dict[str, np.ndarray], Storage, dict[str, float]]:
    """Arrays (weights are numbers that both 16-bit floats hold), what they are stored as, scalars of fused_qkv_rope."""
    g = rng("projections", T)
    heads, kv_heads, head_dim = 4, 2, 32
    arrays = {
        "x": normal(g, T, hidden),
        "norm": normal(g, hidden),
        "cos_sin": np.ones((T, 2, head_dim // 2), np.float32),
        "positions": np.arange(T, dtype=np.int64),
        "seq": np.zeros(T, np.int32),
        "page_table": np.zeros((1, 1), np.int32),
        "kv": np.zeros((1, 1, 2, kv_heads, 16, head_dim), np.float32),
    }
    for name, n in zip(WEIGHTS, (heads, kv_heads, kv_heads), strict=True):
        arrays[name] = (g.integers(-128, 128, (n * head_dim, hidden)) / 256).astype(np.float32)
    storage = dict.fromkeys(arrays, "f32") | {"positions": "i64", "seq": "i32", "page_table": "i32"}
    return arrays, storage, {"layer": 0, "rope_style": 0, "eps": 1e-5, "qk_eps": 1e-6}


@pytest.mark.parametrize(
    "types", [("p4_32m", "p8_16", "p8_32"), ("p8_32", "p8_128", "p8_16"), ("p2_16m", "p1_64", "p2_128z")]
)
def test_a_projection_does_not_depend_on_the_packed_types_of_others(types: tuple[str, str, str]) -> None:
    arrays, storage, scalars = projections(1, 1152)
    mixed, *alone = (
        results("fused_qkv_rope", arrays, storage | dict(zip(WEIGHTS, own, strict=True)), scalars, deterministic=False)
        for own in (types, *((one,) * 3 for one in types))
    )
    assert np.array_equal(mixed["q"], alone[0]["q"])
    assert np.array_equal(mixed["kv"][:, :, 0], alone[1]["kv"][:, :, 0])
    assert np.array_equal(mixed["kv"][:, :, 1], alone[2]["kv"][:, :, 1])
    assert len({one["q"].tobytes() for one in alone}) == 3


@pytest.mark.parametrize("T", [1, 3])
def test_one_launch_multiplies_both_16_bit_floats(T: int) -> None:
    arrays, storage, scalars = projections(T, 96)
    found = {}
    for types in (("f16",) * 3, ("bf16",) * 3, ("f16", "bf16", "bf16"), ("bf16", "f16", "bf16")):
        mixed = storage | dict(zip(WEIGHTS, types, strict=True))
        found[types] = results("fused_qkv_rope", arrays, mixed, scalars, deterministic=False)
        args = {n: Tensor(256, a.shape, dtype_named(mixed[n])) for n, a in arrays.items()}
        args["q"] = Tensor(256, (T, len(arrays["wq"])), DTYPES["f32"])
        bound = CONTRACTS["fused_qkv_rope"].bind(
            {a.name: args.get(a.name) for a in CONTRACTS["fused_qkv_rope"].arrays}, scalars
        )
        (launch,) = launches("fused_qkv_rope", bound, mixed, H200_LIKE, False)
        assert launch.symbol == f"fused_qkv_rope__dot_half_t{1 if T == 1 else 4}_r{2 if T == 1 else 4}"
    first, *others = found.values()
    for other in others:
        assert np.array_equal(other["q"], first["q"])
        assert np.array_equal(other["kv"], first["kv"])


H200_LIKE = DeviceProps(cc=(9, 0), num_sms=132, max_smem_optin=227 << 10)
SMALLEST = DeviceProps(cc=(8, 6), num_sms=28, max_smem_optin=99 << 10)


def of_linear(
    dtype: str, T: int, K: int, N: int, *, address: int = 256, device: DeviceProps = H200_LIKE
) -> list[Launch]:
    """The launches of a linear; nothing is run."""
    tensors: dict[str, Tensor | None] = {
        "x": Tensor(256, (T, K), DTYPES["f32"]),
        "weight": Tensor(address, (N, K), dtype_named(dtype)),
        "out": Tensor(256, (T, N), DTYPES["f32"]),
    }
    return launches("linear", CONTRACTS["linear"].bind(tensors), {"weight": dtype}, device, False)


def test_few_tokens_take_one_launch_that_fills_the_device() -> None:
    rows_of_warps = {  # for 1024, 4096 and 151,936 weight rows
        **dict.fromkeys(("f32", "f16", "bf16"), (2, 4, 4)),
        **dict.fromkeys(("p8_32", "p4_32m", "p2_16m"), (2, 2, 4)),
        "p1_128": (2, 2, 2),
    }
    for dtype, rows in rows_of_warps.items():
        kind = f"q{dtype[1]}" if dtype in PACKED_DTYPES else f"{products.dot_kind(dtype)}_t1"
        for N, r in zip((1024, 4096, 151_936), rows, strict=True):
            (launch,) = of_linear(dtype, 1, 3072, N)
            assert launch.symbol == f"linear__dot_{kind}_r{r}"
            assert launch.grid[0] >= 128
            assert launch.smem_nbytes <= H200_LIKE.max_smem_optin < 2 * launch.smem_nbytes  # one block a multiprocessor
            assert launch.overlaps


DEVICES = (
    SMALLEST,
    DeviceProps(cc=(8, 6), num_sms=82, max_smem_optin=99 << 10),
    DeviceProps(cc=(8, 9), num_sms=128, max_smem_optin=99 << 10),
    DeviceProps(cc=(8, 0), num_sms=108, max_smem_optin=163 << 10),
    DeviceProps(cc=(8, 7), num_sms=16, max_smem_optin=163 << 10),
    H200_LIKE,
)


@pytest.mark.parametrize("device", DEVICES, ids=lambda d: f"{d.num_sms} SMs")
def test_shared_memory_of_any_launch_fits_the_device(device: DeviceProps) -> None:
    """With rows from those of a projection to those of the largest vocabularies."""
    static = packed.STATIC_NBYTES
    for dtype in ("f16", "bf16", *PACKED_DTYPES):
        for T in (*range(1, 18), 64, 4096):
            for K in (128, 1024, 4096, 28_672):
                for N in (4096, 28_672, 151_936, 262_144):
                    for launch in of_linear(dtype, T, K, N, device=device):
                        assert launch.smem_nbytes + static * ("q" in launch.symbol) <= device.max_smem_optin


def test_what_tensor_cores_cannot_take_goes_to_the_plain_kernel() -> None:
    for launch in (
        of_linear("f32", 8, 64, 64),
        of_linear("f16", 1, 65, 64),
        of_linear("p8_32", 1, 64, 64, address=264),
        of_linear("bf16", 8, 64, 64, device=DeviceProps(cc=(7, 5), num_sms=40, max_smem_optin=64 << 10)),
    ):
        assert [one.symbol for one in launch] == ["linear__plain"]


def test_the_sources_have_the_numbers_the_launches_count_with() -> None:
    text = "".join(p.read_text() for p in sorted((ROOT / "kernels_cu" / "common").glob("*.cuh")))
    for said in (
        f"constexpr int kSegment = {products.SEGMENT};",
        f"constexpr int kRowThreads = {products.ROW_THREADS};",
        f"constexpr int kDotThreads = {products.DOT_THREADS};",
        f"constexpr int kDotRingNbytes = {products.DOT_RING_NBYTES >> 10} << 10;",
        f"constexpr int kQuantDotThreads = {packed.DOT_THREADS};",
        f"constexpr int kQuantDotRingNbytes = {packed.DOT_RING_NBYTES >> 10} << 10;",
        f"constexpr int kMaxGemvTokens = {products.MAX_GEMV_TOKENS};",
        f"constexpr int kPanelNbytes = {products.PANEL_NBYTES >> 10} << 10;",
        f"constexpr int kPlainThreads = {products.PLAIN_THREADS};",
        f"constexpr int kPlainTokens = {products.PLAIN_TOKENS};",
    ):
        assert said in text, said
