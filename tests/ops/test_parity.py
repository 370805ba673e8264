"""Every op, in every dtype, on every case, on every backend, against the reference of its contract."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pytest
from op_harness import BASIC_WEIGHTS, Runner, label, run_case, storages
from op_memory import Placed, Storage, decode, encode, rounded

from cpu_backend.kernels import WEIGHT_DTYPES
from gllm_driver.ops import CONTRACTS
from gllm_driver.ops.contract import Case
from gllm_driver.types import DTYPES, Tensor


def cpu(op: str, arrays: Mapping[str, Tensor | None], scalars: Mapping[str, float], num_threads: int = 2) -> None:
    from cpu_backend.program import run_op

    run_op(op, arrays, scalars, num_threads=num_threads)


BACKENDS: dict[str, Callable[..., None]] = {"cpu": cpu}


def weights_of(op: str) -> tuple[str, ...]:
    """Ops reach a weight by the functions of its dtype: two try every one, the others some of each kind."""
    return WEIGHT_DTYPES if op in ("linear", "embedding") else (*BASIC_WEIGHTS, "q4_k", "q6_k")


def parameters() -> list[Any]:
    found: list[Any] = []
    for op, contract in CONTRACTS.items():
        assert contract.cases is not None
        for case in contract.cases():
            for storage in storages(contract, case, weights_of(op)):
                name = "-".join(filter(None, (op, case.label, label(contract, storage))))
                found.append(pytest.param(op, case, storage, len(found), id=name))
    return found


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("op", "case", "storage", "index"), parameters())
def test_parity(op: str, case: Case, storage: Storage, index: int, backend: str) -> None:
    shift = index % 2 * (1 + index % 7)  # every other one at alignments no better than an element's
    run_case(CONTRACTS[op], case, storage, BACKENDS[backend], shift)


def test_kernels_know_the_layout_of_every_weight_dtype() -> None:
    from cpu_backend.blocks import block_format
    from cpu_backend.matmul import ITEM_NBYTES

    for name in WEIGHT_DTYPES:
        format = block_format(name)
        if format is None:
            assert ITEM_NBYTES[name] == DTYPES[name].block_nbytes
        else:
            assert (format.block_size, format.block_nbytes) == (DTYPES[name].block_size, DTYPES[name].block_nbytes)
    assert set(WEIGHT_DTYPES) >= {"q4_k", "q6_k", "iq4_xs", *(n for n in DTYPES if n.startswith("int"))}


def recording(results: list[np.ndarray], num_threads: int) -> Runner:
    """A CPU runner that also keeps the bytes of what was written."""

    def run(op: str, arrays: Mapping[str, Tensor | None], scalars: Mapping[str, float]) -> None:
        cpu(op, arrays, scalars, num_threads=num_threads)
        for array in CONTRACTS[op].arrays:
            tensor = arrays[array.name]
            if array.role != "in" and tensor is not None:
                start = tensor.address - tensor.owner.ctypes.data
                results.append(tensor.owner[start : start + tensor.nbytes].copy())

    return run


@pytest.mark.parametrize("op", CONTRACTS)
def test_cpu_result_does_not_depend_on_the_number_of_threads(op: str) -> None:
    contract = CONTRACTS[op]
    assert contract.cases is not None
    largest = max(contract.cases(), key=lambda case: sum(a.size for a in case.arrays.values()))
    for storage in storages(contract, largest, weights_of(op)):
        runs: list[list[np.ndarray]] = []
        for num_threads in (1, 2, 3):
            runs.append([])
            run_case(contract, largest, storage, recording(runs[-1], num_threads))
        for run in runs[1:]:
            assert all(np.array_equal(a, b) for a, b in zip(runs[0], run, strict=True))


@pytest.mark.parametrize("dtype", ["f16", "bf16"])
def test_cpu_rounds_to_nearest_where_it_stores_half_precision(dtype: str) -> None:
    """The tolerance lets a last place pass; a value that is off by one should be rare, not the rule."""
    contract = CONTRACTS["fused_qkv_rope"]
    assert contract.cases is not None
    case = next(c for c in contract.cases() if c.label == "long-prefill")
    storage = next(s for s in storages(contract, case) if s["kv"] == dtype and s["wq"] == "f32")
    results: list[np.ndarray] = []
    run_case(contract, case, storage, recording(results, 2))
    inputs = {n: decode(encode(a, storage[n]), storage[n], a.shape) for n, a in case.arrays.items()}
    assert contract.reference is not None
    expected = contract.reference(inputs, {k: float(np.float32(v)) for k, v in case.scalars.items()})["kv"]
    written = np.isfinite(expected) & ~np.isfinite(inputs["kv"])
    actual = decode(results[0], dtype, expected.shape)
    assert (actual == rounded(expected, dtype))[written].mean() > 0.98


def by_reference(op: str, arrays: Mapping[str, Tensor | None], scalars: Mapping[str, float]) -> None:
    """A backend that is right by construction: the reference, stored."""

    def memory(tensor: Tensor) -> np.ndarray:
        start = tensor.address - tensor.owner.ctypes.data
        return tensor.owner[start : start + tensor.nbytes]

    CONTRACTS[op].bind(arrays, scalars)
    contract, given = CONTRACTS[op], {n: t for n, t in arrays.items() if t is not None}
    inputs = {
        a.name: decode(memory(given[a.name]).copy(), given[a.name].dtype.name, given[a.name].shape)
        for a in contract.arrays
        if a.role != "out" and a.name in given
    }
    assert contract.reference is not None
    for name, values in contract.reference(inputs, {k: float(np.float32(v)) for k, v in scalars.items()}).items():
        untouched = decode(memory(given[name]).copy(), given[name].dtype.name, given[name].shape)
        fresh = ~((values == untouched) | (np.isnan(values) & np.isnan(untouched)))
        data, old = encode(values, given[name].dtype.name), memory(given[name])
        width = given[name].dtype.block_nbytes
        old.reshape(-1, width)[fresh.reshape(-1)] = data.reshape(-1, width)[fresh.reshape(-1)]


@pytest.mark.parametrize("op", CONTRACTS)
def test_the_reference_passes_its_own_check(op: str) -> None:
    contract = CONTRACTS[op]
    assert contract.cases is not None
    for case in contract.cases():
        for storage in storages(contract, case):
            run_case(contract, case, storage, by_reference, shift=1)


def spoiled(how: str, op: str, arrays: Mapping[str, Tensor | None], scalars: Mapping[str, float]) -> None:
    """A right result with one thing wrong."""
    by_reference(op, arrays, scalars)
    tensors = {a.name: t for a in CONTRACTS[op].arrays if (t := arrays[a.name]) is not None}
    out, x = tensors["out"], tensors["x"]
    start = out.address - out.owner.ctypes.data
    values = out.owner[start : start + out.nbytes].view(np.float32)
    if how == "value":
        values[5] *= 1 + 1e-3
    elif how == "nan":
        values[5] = np.nan
    elif how == "inf":
        values[5] = np.inf
    elif how == "zero":
        values[:] = 0
    elif how == "before":
        out.owner[start - 1] = 0
    elif how == "after":
        out.owner[start + out.nbytes] = 0
    elif how == "input":
        x.owner[x.address - x.owner.ctypes.data] ^= 1


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("value", "out: 1 of .* wrong"),
        ("nan", "out: NaN or infinities differ"),
        ("inf", "out: NaN or infinities differ"),
        ("zero", "out: .* wrong"),
        ("before", "out: memory before"),
        ("after", "out: memory after"),
        ("input", "x: an input was written"),
    ],
)
@pytest.mark.parametrize("dtype", ["f32", "q8_0"])
def test_the_check_can_fail(dtype: str, how: str, message: str) -> None:
    contract = CONTRACTS["linear"]
    assert contract.cases is not None
    case = next(c for c in contract.cases() if c.label == "2x1056x513")
    storage = next(s for s in storages(contract, case) if s["weight"] == dtype)
    with pytest.raises(AssertionError, match=message):
        run_case(contract, case, storage, functools.partial(spoiled, how))


@pytest.mark.parametrize("name", ["bytes to be kept", "a slot elsewhere"])
def test_the_check_sees_a_write_to_the_rest_of_the_cache(name: str) -> None:
    contract = CONTRACTS["fused_qkv_rope"]
    assert contract.cases is not None
    case = next(c for c in contract.cases() if c.label == "neox-decode")
    storage = next(s for s in storages(contract, case) if s["kv"] == "f16")

    def run(op: str, arrays: Mapping[str, Tensor | None], scalars: Mapping[str, float]) -> None:
        by_reference(op, arrays, scalars)
        kv = arrays["kv"]
        assert kv is not None
        start = kv.address - kv.owner.ctypes.data
        values = kv.owner[start : start + kv.nbytes].view(np.uint16)
        spot = np.flatnonzero(np.isnan(values.view(np.float16)))[0 if name == "a slot elsewhere" else -1]
        values[spot] ^= 1

    with pytest.raises(AssertionError, match="kv: elements to be left alone changed"):
        run_case(contract, case, storage, run)


def test_placed_arrays_are_where_they_should_be() -> None:
    for shift in range(9):
        place = Placed(np.zeros(34, np.uint8), DTYPES["q8_0"], (32,), shift)
        assert place.tensor.address % 64 == 2 * (shift % 8)
        assert place.start >= 64
        assert len(place.memory) - place.end >= 64
