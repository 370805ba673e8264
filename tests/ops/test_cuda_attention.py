"""Attention on the simulated device: the tensor-core kernels, and bits that do not depend on who shares the step."""

from __future__ import annotations

import dataclasses
import itertools
import re
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from cuda_runner import ROOT, direct
from cuda_tolerance import contract_for
from op_harness import run_case, storages
from op_memory import encode

from gllm_driver.errors import UnsupportedError
from gllm_driver.launch import DeviceProps, Launch, _attention, flash_attention, launches
from gllm_driver.ops import CONTRACTS
from gllm_driver.ops._attention import _slot, _special, attention_case
from gllm_driver.ops._case_tools import Chunk
from gllm_driver.ops.contract import Case
from gllm_driver.types import DTYPES, Tensor

pytestmark = pytest.mark.hostsim

A100 = DeviceProps(cc=(8, 0), num_sms=108, max_smem_optin=163 << 10)
RTX_4090 = DeviceProps(cc=(8, 9), num_sms=128, max_smem_optin=99 << 10)
T4 = DeviceProps(cc=(7, 5), num_sms=40, max_smem_optin=64 << 10)
HEADS = {64: (4, 2), 80: (2, 2), 96: (14, 2), 128: (3, 1), 256: (2, 2)}  # query heads, KV heads
PREFILL = [Chunk(1, 29), Chunk(5, 13), Chunk(0), Chunk(70), Chunk(17, 150), Chunk(1)]
DECODE = [Chunk(1, 3), Chunk(1, 33), Chunk(1), Chunk(1, 300), Chunk(1, 1200)]


def tensor_core_cases(op: str) -> Iterator[Case]:
    chunks = PREFILL if op == "flash_attention" else DECODE
    for head_dim, (heads, kv_heads) in HEADS.items():
        shape = {"heads": heads, "kv_heads": kv_heads, "head_dim": head_dim}
        for page_size, window in ((1, 0), (4, 23), (16, 0), (16, 100)):
            label = f"d{head_dim}-page-{page_size}-window-{window}"
            yield attention_case(op, label, chunks, page_size=page_size, window=window, **shape)[0]
    for heads, kv_heads, head_dim, window in (
        (1, 1, 64, 0),
        (3, 3, 80, 23),
        (8, 2, 128, 0),
        (12, 12, 64, 0),
        (20, 1, 96, 70),
    ):
        shape = {"heads": heads, "kv_heads": kv_heads, "head_dim": head_dim, "window": window}
        yield attention_case(op, f"alibi-{heads}-{kv_heads}-{head_dim}", chunks, alibi=8.0, **shape)[0]
    yield attention_case(op, "many-heads", chunks, heads=20, kv_heads=1, head_dim=64, window=40)[0]
    yield attention_case(op, "layer", chunks, head_dim=64, layers=(3, 1))[0]
    yield attention_case(op, "sharp", chunks, head_dim=64, q_scale=30.0, kv_scale=10.0, condition=300.0)[0]
    yield attention_case(op, "large-v", chunks, head_dim=64, q_scale=1e-4, kv_scale=1e4)[0]
    yield attention_case(op, "uniform", chunks, head_dim=64, q_scale=0.0)[0]
    case, _ = attention_case(op, "scale-0", chunks, head_dim=64)
    yield dataclasses.replace(case, scalars={**case.scalars, "scale": 0.0})


def faint_case(op: str) -> Case:
    """One key outweighs all others by e^15 and has no value: what is left are weights f16 hardly has numbers for."""
    chunks = [Chunk(6, 90)] if op == "flash_attention" else [Chunk(1, 95)]
    case, cache = attention_case(op, "faint", chunks, head_dim=64, condition=10.0)
    case.arrays["q"][:] = 1
    for position in range(96):
        keys, values = _slot(cache, 0, position)
        keys[:] = 0
        if position == 25:
            keys[:, 0], values[:] = 15 * 64**0.5, 0
    return case


def spoiled_cases(op: str, monkeypatch: pytest.MonkeyPatch) -> list[Case]:
    """The NaN and infinity cases of the contracts, at a head_dim for tensor cores."""
    from gllm_driver.ops import _attention as cases

    def wide(op: str, label: str, chunks: Any, **options: Any) -> Any:
        return attention_case(op, label, chunks, **{**options, "head_dim": 64})

    chunks = [Chunk(3), Chunk(14, 19), Chunk(1, 2)] if op == "flash_attention" else [Chunk(1), Chunk(1, 32), Chunk(1)]
    monkeypatch.setattr(cases, "attention_case", wide)
    return list(_special(op, chunks))


@pytest.mark.parametrize("op", ["flash_attention", "paged_attention"])
@pytest.mark.parametrize("order", ["asc", "desc", "rand"])
def test_tensor_core_kernels(op: str, order: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOSTSIM_ORDER", order)
    for case in [*tensor_core_cases(op), faint_case(op), *spoiled_cases(op, monkeypatch)]:
        for storage in storages(CONTRACTS[op], case):
            if storage["kv"] != "f32":
                run_case(contract_for(op, case, storage), case, storage, direct())


def outputs(op: str, case: Case, kv: str, **scalars: float) -> np.ndarray:
    """`out`, as the kernels write it with the cache stored as `kv`."""
    arrays = {n: np.ascontiguousarray(v) for n, v in case.arrays.items()}
    tensors: dict[str, Tensor | None] = {}
    for name, values in arrays.items():
        if name == "kv":
            data = _aligned(encode(values, kv))
            tensors[name] = Tensor(data.ctypes.data, values.shape, DTYPES[kv], data)
        else:
            tensors[name] = Tensor.from_numpy(_aligned(values))
    out = _aligned(np.full_like(arrays["q"], np.nan))
    tensors["out"] = Tensor.from_numpy(out)
    direct()(op, tensors, {**case.scalars, **scalars})
    return out


def _aligned(values: np.ndarray) -> np.ndarray:
    """A copy that starts at a multiple of 64 bytes, as device memory does."""
    memory = np.empty(values.nbytes + 64, np.uint8)
    start = -memory.ctypes.data % 64
    copy = memory[start : start + values.nbytes].view(values.dtype).reshape(values.shape)
    copy[...] = values
    return copy


def rows(case: Case, start: int, stop: int, sequence: int) -> Case:
    """The call with queries start … stop − 1, all of one sequence, alone."""
    arrays = dict(case.arrays)
    arrays |= {n: case.arrays[n][start:stop] for n in ("q", "positions")}
    arrays["page_table"] = case.arrays["page_table"][sequence : sequence + 1]
    if "offsets" in arrays:
        arrays["offsets"] = np.array([0, stop - start], np.int32)
    return dataclasses.replace(case, arrays=arrays)


SHAPES = pytest.mark.parametrize(
    ("kv", "head_dim", "window", "alibi"),
    [
        ("bf16", 64, 0, 0.0),
        ("f16", 128, 0, 0.0),
        ("bf16", 64, 50, 0.0),
        ("bf16", 64, 0, 8.0),
        ("f32", 20, 0, 0.0),
        ("f32", 20, 50, 0.0),
        ("f32", 20, 0, 8.0),
    ],
)


@SHAPES
def test_a_prompt_may_be_cut_anywhere(kv: str, head_dim: int, window: int, alibi: float) -> None:
    case, _ = attention_case(
        "flash_attention", "cut", [Chunk(170, 45)], heads=6, head_dim=head_dim, window=window, alibi=alibi
    )
    whole = outputs("flash_attention", case, kv)
    for cuts in ([0, 2, 40, 170], [0, 33, 34 + 31, 168, 170]):
        for start, stop in itertools.pairwise(cuts):
            part = outputs("flash_attention", rows(case, start, stop, 0), kv)
            assert np.array_equal(part, whole[start:stop])


@SHAPES
def test_decoding_does_not_depend_on_the_batch_or_the_table(kv: str, head_dim: int, window: int, alibi: float) -> None:
    case, _ = attention_case("paged_attention", "batch", DECODE, heads=6, head_dim=head_dim, window=window, alibi=alibi)
    together = outputs("paged_attention", case, kv)
    for s in range(len(DECODE)):
        alone = rows(case, s, s + 1, s)
        assert np.array_equal(outputs("paged_attention", alone, kv)[0], together[s])
        table = np.pad(alone.arrays["page_table"], ((0, 0), (0, 9000)))
        wide = dataclasses.replace(alone, arrays={**alone.arrays, "page_table": table})
        assert np.array_equal(outputs("paged_attention", wide, kv)[0], together[s])


@SHAPES
def test_a_decoded_token_has_the_same_bits_in_a_step_with_prompts(
    kv: str, head_dim: int, window: int, alibi: float
) -> None:
    chunks = [Chunk(1, 600), Chunk(9, 20), Chunk(1, 31)]
    case, _ = attention_case("flash_attention", "mixed", chunks, heads=6, head_dim=head_dim, window=window, alibi=alibi)
    mixed = outputs("flash_attention", case, kv)
    arrays = {n: v for n, v in case.arrays.items() if n != "offsets"}
    for sequence, token in ((0, 0), (2, 10)):
        alone = rows(dataclasses.replace(case, arrays=arrays), token, token + 1, sequence)
        assert np.array_equal(outputs("paged_attention", alone, kv)[0], mixed[token])


@pytest.mark.parametrize(("kv", "tolerance"), [("f32", 1e-5), ("f16", 2e-3), ("bf16", 1.6e-2)])
def test_decode_and_prefill_agree(kv: str, tolerance: float) -> None:
    case, _ = attention_case("flash_attention", "agree", [Chunk(90, 400)], head_dim=64)
    prefill = outputs("flash_attention", case, kv)
    arrays = {n: v for n, v in case.arrays.items() if n != "offsets"}
    for t in (0, 41, 89):
        one = outputs("paged_attention", rows(dataclasses.replace(case, arrays=arrays), t, t + 1, 0), kv)[0]
        assert not np.abs(one - prefill[t]).max() > tolerance * np.abs(prefill[t]).max()


@pytest.mark.parametrize("head_dim", [20, 64])
@pytest.mark.parametrize("op", ["flash_attention", "paged_attention"])
def test_pages_that_fell_out_of_the_window_are_not_read(op: str, head_dim: int) -> None:
    """A cache with a sliding window may have given them to others, and the table may hold anything."""
    chunks = [Chunk(21, 300)] if op == "flash_attention" else [Chunk(1, 321)]
    case, _ = attention_case(op, "freed", chunks, head_dim=head_dim, window=50)
    expected = outputs(op, case, "f16")
    first = (chunks[0].context - 50 + 1) // 4  # page of the first position seen
    case.arrays["page_table"][0, :first] = 1 << 29
    assert np.array_equal(outputs(op, case, "f16"), expected)


def launched(
    op: str, kv: str, device: DeviceProps, *, misaligned: str = "", deterministic: bool = True, **sizes: int
) -> list[Launch]:
    args = np.zeros((), CONTRACTS[op].struct)
    v = {"NP": 8, "L": 1, "HK": 2, "P": 16, "Dh": 64, "S": 1, "MP": 64, "q": 256, "kv": 256, "out": 256} | sizes
    v |= {misaligned: 250} if misaligned else {}
    v["QD"] = v.pop("heads", 4) * v["Dh"]
    for name, value in v.items():
        args[name] = value
    return launches(op, args, {"q": "f32", "kv": kv, "out": "f32"}, device, deterministic)


def symbols(found: list[Launch]) -> list[str]:
    return [launch.symbol.partition("__")[2] for launch in found]


def test_which_kernels_run() -> None:
    assert symbols(launched("flash_attention", "bf16", A100, T=9)) == ["bf16_d64"]
    assert symbols(launched("flash_attention", "bf16", A100, T=1)) == ["split_bf16_d64"]
    assert symbols(launched("flash_attention", "bf16", A100, T=9, S=2)) == ["bf16_d64", "split_bf16_d64"]
    assert launched("flash_attention", "bf16", A100, T=0, S=3) == []
    assert symbols(launched("flash_attention", "f16", A100, T=9, Dh=256)) == ["f16_d256"]
    assert symbols(launched("flash_attention", "f16", RTX_4090, T=9, Dh=256)) == ["f16_d256_m64"]
    assert symbols(launched("flash_attention", "f32", A100, T=9)) == ["rows_d128"]
    assert symbols(launched("flash_attention", "f16", A100, T=9, Dh=72)) == ["rows_d128"]
    assert symbols(launched("flash_attention", "f16", A100, T=9, Dh=129)) == ["rows_d256"]
    assert symbols(launched("paged_attention", "f16", T4)) == ["rows_split_d128"]
    assert symbols(launched("paged_attention", "f16", A100, MP=16)) == ["split_f16_d64"]
    for array in ("q", "kv", "out"):
        assert symbols(launched("flash_attention", "f16", A100, misaligned=array, T=9)) == ["rows_d128"]


def test_single_queries_of_a_packed_step_take_the_kernels_of_decode() -> None:
    tiles, split = launched("flash_attention", "bf16", A100, T=9, S=2, offsets=512)
    (decode,) = launched("paged_attention", "bf16", A100, S=2)
    assert split.symbol == decode.symbol == "paged_attention__split_bf16_d64"
    assert (split.addresses, decode.addresses) == ((512,), (0,))
    own = np.zeros((), CONTRACTS["flash_attention"].struct)
    struct, *rest = split.params(own, 1024, 2048)
    assert struct.dtype == CONTRACTS["paged_attention"].struct
    assert (struct["S"], struct["kv"], struct["MP"]) == (2, 256, 64)
    assert rest == [512, 1024, 2048]
    assert tiles.params(own, 1024, 2048) == (own,)


def test_a_head_dim_no_kernel_takes() -> None:
    with pytest.raises(UnsupportedError, match="head_dim 257 is over 256"):
        launched("paged_attention", "f32", A100, Dh=257)


def test_splits_are_bounded() -> None:
    table = {"MP": 1 << 17, "P": 16, "HK": 8, "heads": 32, "Dh": 128}  # 2M tokens
    for S, deterministic, most in ((1, True, 32), (256, True, 32), (256, False, 4), (1, False, 27)):
        (split,) = launched("paged_attention", "bf16", A100, deterministic=deterministic, S=S, **table)
        assert split.grid == (most, 8, S)
        assert split.workspace_nbytes == S * 32 * most * 130 * 4
        assert split.num_counters == S * 8
    one = {"HK": 1, "heads": 1, "MP": 1 << 20}
    assert launched("paged_attention", "bf16", A100, **one)[0].grid[0] == _attention.MAX_SPLITS


def test_a_wider_table_cuts_no_context_otherwise() -> None:
    """The grid is sized for the table: no context within it may need more spans, or the span's length would change."""
    for tokens in (1, 128, 129, 500, 512, 513, 1024, 2048, 2049, 5000):
        needed = []
        for n in range(1, tokens + 1):
            span = next(span for limit, span in _attention.LEAST_SPANS if n <= limit)
            needed.append(-(-n // span))
        assert _attention.most_spans(tokens) == max(needed)


def test_every_tile_has_a_block() -> None:
    for T, S, heads in ((9, 1, 4), (1000, 7, 14), (128, 128, 2)):
        grid = launched("flash_attention", "bf16", A100, T=T, S=S, heads=heads)[0].grid
        lengths = [T - 2 * (S - 1), *[2] * (S - 1)] if T >= 2 * S else [1] * S
        tiles = sum(-(-n * heads // 2 // 128) for n in lengths if n > 1)
        assert grid[0] >= 2 * tiles


def test_numbers_said_in_two_languages_are_equal() -> None:
    text = "".join(path.read_text() for path in sorted((ROOT / "kernels_cu" / "common").glob("attention*.cuh")))
    for name in ("MAX_SPLITS", "GROUP_HEADS", "ROWS_WARPS"):
        spelled = "k" + name.title().replace("_", "")
        match = re.search(rf"constexpr int {spelled} = (\d+);", text)
        assert match, spelled
        assert int(match[1]) == getattr(_attention, name), spelled
    least = re.search(r"return (num_keys <= .*);", text)
    assert least
    numbers = [int(number) for number in re.findall(r"\d+", least[1])]
    assert [n for limits in _attention.LEAST_SPANS for n in limits if n < 1 << 31] == numbers
    kernels = (ROOT / "kernels_cu" / "flash_attention.cu").read_text()
    tiles = re.findall(r"FLASH\(dtype, H, (\d+), (\w+), (\d), (\d), (\d+)\)", kernels)
    assert [
        (f"d{name}", int(d), int(blocks) * int(warps) * 16, int(warps), int(keys))
        for d, name, blocks, warps, keys in tiles
    ] == [(s.variant, s.head_dim, s.rows, s.warps, s.keys) for s in flash_attention.SHAPES]
