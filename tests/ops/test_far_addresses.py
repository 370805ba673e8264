"""A cache of more than 4 GiB: what lies beyond 32-bit offsets is read and written as what lies before.

The memory is reserved and hardly touched: pages of one small case, moved to the end of a large cache.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pytest
from cuda_runner import direct
from op_memory import encode

from gllm_driver.ops import CONTRACTS
from gllm_driver.ops._attention import attention_case
from gllm_driver.ops._case_tools import Chunk
from gllm_driver.ops._qkv_cases import _case as qkv_case
from gllm_driver.ops.contract import Case
from gllm_driver.types import DTYPES, Tensor

CACHE_NBYTES = 5 << 30


def on_the_cpu() -> Callable[..., None]:
    from cpu_backend.program import run_op

    def run(op: str, arrays: Mapping[str, Tensor | None], scalars: Mapping[str, float]) -> None:
        run_op(op, arrays, scalars, num_threads=2)

    return run


RUNNERS = [pytest.param(on_the_cpu, id="cpu"), pytest.param(direct, id="cuda", marks=pytest.mark.hostsim)]


def cases() -> list[tuple[str, Case]]:
    chunks = [Chunk(1, 40), Chunk(1, 700)]
    found = [
        ("paged_attention", attention_case("paged_attention", f"far-{d}", chunks, head_dim=d)[0]) for d in (20, 64)
    ]
    chunks = [Chunk(9, 40), Chunk(1, 700)]
    found += [
        ("flash_attention", attention_case("flash_attention", f"far-{d}", chunks, head_dim=d)[0]) for d in (20, 64)
    ]
    return [*found, ("fused_qkv_rope", qkv_case("far", chunks=[Chunk(5, 30), Chunk(1, 7)]))]


def run(op: str, case: Case, runner: Callable[..., None], num_pages: int, first_page: int) -> dict[str, np.ndarray]:
    """Outputs, and the pages of the case as they are afterwards, with the case's pages from `first_page` on."""
    kv = encode(case.arrays["kv"], "f16")
    page_nbytes, shape = kv.size // len(case.arrays["kv"]), case.arrays["kv"].shape
    try:
        memory = np.zeros(num_pages * page_nbytes, np.uint8)  # taken as it is touched
    except MemoryError:
        pytest.skip("this machine does not reserve so much memory")
    memory[first_page * page_nbytes : first_page * page_nbytes + kv.size] = kv
    arrays: dict[str, Any] = {n: np.ascontiguousarray(a) for n, a in case.arrays.items() if n != "kv"}
    arrays["page_table"] = arrays["page_table"] + np.int32(first_page)
    shapes = {"out": arrays["q"].shape} if "q" in arrays else {"q": (len(arrays["x"]), len(arrays["wq"]))}
    outputs = {name: np.zeros(s, np.float32) for name, s in shapes.items()}
    tensors: dict[str, Tensor | None] = {n: Tensor.from_numpy(a) for n, a in {**arrays, **outputs}.items()}
    tensors["kv"] = Tensor.from_numpy(memory, DTYPES["f16"], (num_pages, *shape[1:]))
    runner(op, {a.name: tensors.get(a.name) for a in CONTRACTS[op].arrays}, case.scalars)
    return {**outputs, "kv": memory[first_page * page_nbytes :][: kv.size].copy()}


@pytest.mark.parametrize("make_runner", RUNNERS)
@pytest.mark.parametrize(("op", "case"), cases(), ids=lambda v: v if isinstance(v, str) else v.label)
def test_pages_beyond_four_gib(op: str, case: Case, make_runner: Callable[..., Any]) -> None:
    case = dataclasses.replace(case, arrays={**case.arrays, "kv": np.nan_to_num(case.arrays["kv"], nan=9.0)})
    used = len(case.arrays["kv"])
    num_pages = CACHE_NBYTES // (encode(case.arrays["kv"], "f16").size // used)
    near = run(op, case, make_runner(), used, 0)
    far = run(op, case, make_runner(), num_pages, num_pages - used)
    assert near.keys() == far.keys()
    for name, values in near.items():
        assert values.any(), name
        assert np.array_equal(values, far[name]), name


@pytest.mark.parametrize("make_runner", RUNNERS)
def test_rows_of_a_table_beyond_two_to_the_31_elements(make_runner: Callable[..., Any]) -> None:
    num_rows, D, ids = 263_000, 8192, np.array([262_999, 7, 262_145, 0], np.int32)
    try:
        table = np.zeros((num_rows, D), np.float16)
    except MemoryError:
        pytest.skip("this machine does not reserve so much memory")
    for i, row in enumerate(ids):
        table[row] = np.arange(D) % 97 + i
    out = np.zeros((len(ids), D), np.float32)
    arrays = {"weight": Tensor.from_numpy(table), "ids": Tensor.from_numpy(ids), "out": Tensor.from_numpy(out)}
    make_runner()("embedding", arrays, {})
    assert np.array_equal(out, table[ids].astype(np.float32))
