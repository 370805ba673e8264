"""Products and look-ups with packed weights on the simulated device, against the weights that the bytes stand for."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
from cuda_runner import ROOT, hostsim_folder
from op_memory import Placed, dtype_named, quantized

from gllm_driver.launch import DeviceProps, launches
from gllm_driver.launch import _packed as packed
from gllm_driver.ops import CONTRACTS
from gllm_driver.ops._case_tools import normal, rng
from gllm_driver.packed_types import PACKED_DTYPES, SEGMENT
from gllm_driver.quant.packed import pack_parts, unpack
from gllm_driver.types import DTYPES, Tensor

pytestmark = pytest.mark.hostsim

ONE_SM = DeviceProps(cc=(8, 0), num_sms=1, max_smem_optin=163 << 10)
SMALL = DeviceProps(cc=(8, 6), num_sms=2, max_smem_optin=99 << 10)


def product(
    name: str, T: int, K: int, N: int, device: DeviceProps, *, deterministic: bool = False, zeros: bool = False
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(result, x · weightᵀ + bias in float64, what its terms' rounding may add up to) of a linear."""
    from hostsim.direct import HostKernels

    g, dtype = rng("packed", name, T, K, N), PACKED_DTYPES[name]
    parts = quantized(normal(g, N, K, scale=K**-0.5), dtype)
    if zeros:
        parts = parts._replace(d=parts.d * 0, a=parts.a * 0)
    parts.d[N // 2, 0] = 60_000  # one group's scale is as large as f16 allows, one's is the smallest
    parts.d[N // 3, -1] = 6e-8
    data, x, bias = pack_parts(parts, dtype), normal(g, T, K), normal(g, N)
    placed = {
        "x": Placed(x.reshape(-1).view(np.uint8), DTYPES["f32"], (T, K), 0),
        "weight": Placed(data.reshape(-1), dtype, (N, K), 0),
        "bias": Placed(bias.view(np.uint8), DTYPES["f32"], (N,), 0),
        "out": Placed.unwritten(DTYPES["f32"], (T, N), 0),
    }
    tensors: dict[str, Tensor | None] = {n: p.tensor for n, p in placed.items()}
    HostKernels(hostsim_folder()).run_op("linear", tensors, {}, device=device, deterministic=deterministic)
    for n, p in placed.items():
        p.check_guards(n)
    weight = unpack(data, dtype, (N, K))
    exact = x.astype(np.float64) @ weight.T + bias
    terms = np.abs(x).astype(np.float64) @ np.abs(weight).T + np.abs(bias)
    # Zero points and minima far off are subtracted in f32; one plane of f16 has 11 bits of an activation.
    slack = (2**-11 if T > packed.EXACT_TOKENS else 1e-6) * (4 if dtype.kind else 1) * terms
    if T == 1:  # 16 bits below the largest activation of each segment
        tops = np.repeat([np.abs(x[0, k : k + SEGMENT]).max() for k in range(0, K, SEGMENT)], SEGMENT)[:K]
        slack += 2**-16 * (tops @ np.abs(weight).T)
    return placed["out"].values(), exact, slack + 1e-30


@pytest.mark.parametrize("name", PACKED_DTYPES)
def test_every_type_with_one_few_and_many_tokens(name: str) -> None:
    group = PACKED_DTYPES[name].block_size
    for T, K, N in ((1, 5 * group, 37), (3, 384, 19), (7, 512, 45), (9, 256 + group, 45), (35, 640, 70)):
        out, exact, slack = product(name, T, K, N, ONE_SM)
        assert (np.abs(out - exact) <= slack).all(), (T, K, N)


@pytest.mark.parametrize("name", ["p8_16", "p4_128z", "p2_64m", "p1_32"])
def test_activations_too_long_for_shared_memory_are_done_in_panels(name: str) -> None:
    device = dataclasses.replace(SMALL, max_smem_optin=92 << 10)
    for T in (1, 3):
        K = 6144 if T == 3 else 12_288
        args = {"x": (T, K), "weight": (70, K), "out": (T, 70)}
        tensors = {n: Tensor(256, s, dtype_named(name) if n == "weight" else DTYPES["f32"]) for n, s in args.items()}
        launch = launches("linear", CONTRACTS["linear"].bind(tensors), {"weight": name}, device, False)[-1]
        assert launch.smem_nbytes <= 92 << 10
        out, exact, slack = product(name, T, K, 70, device)
        assert (np.abs(out - exact) <= slack).all(), T


def test_more_blocks_where_sums_of_one_would_not_fit() -> None:
    device = DeviceProps(cc=(8, 6), num_sms=1, max_smem_optin=99 << 10)
    out, exact, slack = product("p8_32", 8, 4096, 480, device)
    assert (np.abs(out - exact) <= slack).all()


def test_the_widest_row_needs_panels_where_memory_is_short() -> None:
    tensors = {
        "x": Tensor(256, (4, 12_288), DTYPES["f32"]),
        "weight": Tensor(256, (70, 12_288), PACKED_DTYPES["p8_32"]),
        "out": Tensor(256, (4, 70), DTYPES["f32"]),
    }
    args = CONTRACTS["linear"].bind(tensors)
    small, large = (launches("linear", args, {"weight": "p8_32"}, d, False)[-1] for d in (SMALL, ONE_SM))
    whole = packed.WARPS * (packed.STAGES[8] * packed.TILE_ROWS * 320 + 2 * 16 * 8 * 4) + 48 * 512 * 8
    assert small.smem_nbytes < large.smem_nbytes < whole


@pytest.mark.parametrize("name", ["p8_32", "p4_32m", "p2_16m", "p1_128z"])
def test_zero_scales_make_zeros(name: str) -> None:
    for T in (1, 2, 20):
        out, exact, slack = product(name, T, 384, 33, ONE_SM, zeros=True)
        assert np.isfinite(out).all()
        assert (np.abs(out - exact) <= slack + 2**-10 * np.abs(exact)).all()


def test_the_manifest_has_all_widths_for_every_architecture() -> None:
    """The same template at 8, 4, 2 and 1 bits: in each binary of a product op, in the committed manifest.

    Before sm_80 one kernel reads all widths; the binaries of one device alone add to a whole set.
    """
    files = json.loads((ROOT / "cubin" / "manifest.json").read_text())["files"]
    files = {name: f for name, f in files.items() if f["arch"].isdigit() and int(f["arch"]) >= 80}
    products = [f for f in files.values() if f["op"] in ("linear", "fused_qkv_rope", "fused_gate_up_silu")]
    assert len(products) == 3 * len({f["arch"] for f in files.values()})
    for entry in products:
        for bits in (8, 4, 2, 1):
            for kernel in ("dot_q{}_r2", "gemv_q{}", "mma_q{}_64x128", "mma_q{}_32x32"):
                assert f"{entry['op']}__{kernel.format(bits)}" in entry["kernels"], entry["arch"]
