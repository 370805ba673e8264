"""Every op's CUDA kernels on the simulated device, in every dtype, on every case, against the contract's reference."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from cuda_runner import DEVICE_WEIGHTS, ROOT, direct, kernel_ops, simulated_driver
from cuda_tolerance import activations_for, contract_for
from op_harness import label, run_case, storages
from op_memory import Storage

from gllm_driver.config import SamplingConfig
from gllm_driver.launch import Launch
from gllm_driver.launch import kv_pages as kv_pages_launch
from gllm_driver.launch import sample as sample_launch
from gllm_driver.ops import CONTRACTS
from gllm_driver.ops._case_tools import normal, rng
from gllm_driver.ops._sample_cases import _case
from gllm_driver.ops._sample_params import SEEN_IN_PROMPT
from gllm_driver.ops.contract import Case
from gllm_driver.types import Tensor

pytestmark = pytest.mark.hostsim


def parameters() -> list[Any]:
    found: list[Any] = []
    for op in kernel_ops():
        contract = CONTRACTS[op]
        assert contract.cases is not None
        for case in contract.cases():
            for storage in storages(contract, case, DEVICE_WEIGHTS):
                name = "-".join(filter(None, (op, case.label, label(contract, storage))))
                found.append(pytest.param(op, case, storage, len(found), id=name))
    return found


@pytest.mark.parametrize(("op", "case", "storage", "index"), parameters())
def test_parity(op: str, case: Case, storage: Storage, index: int) -> None:
    shift = index % 2 * (1 + index % 7)  # every other one at alignments no better than an element's
    run_case(contract_for(op, case, storage), case, storage, direct(), shift, activations_for(op, storage))


def test_aligned_rows_take_the_vector_paths() -> None:
    """Rows of whole 16-byte groups, long enough for more than one block and for registers to run out."""
    g = rng("vector paths")
    ids = np.array([2, 0, 2], np.int32)
    for D in (2048, 2080, 8192, 8256):
        x, weight = normal(g, 3, D), normal(g, D)
        norm = Case(f"{D}", {"x": x, "weight": weight}, {"eps": 1e-6})
        added = Case(f"{D}-residual", {"x": x, "weight": weight, "residual": normal(g, 3, D)}, {"eps": 1e-6})
        for case in (norm, added):
            run_case(CONTRACTS["rms_norm"], case, {"x": "f32", "weight": "f32", "residual": "f32"}, direct())
        lookup = Case(f"{D}", {"ids": ids, "weight": x})
        for storage in storages(CONTRACTS["embedding"], lookup, DEVICE_WEIGHTS):
            run_case(CONTRACTS["embedding"], lookup, storage, direct())


def test_more_pages_than_a_grid_has_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kv_pages_launch, "MAX_GRID_YZ", 2)
    contract = CONTRACTS["kv_pages"]
    assert contract.cases is not None
    for case in contract.cases():
        run_case(contract, case, next(storages(contract, case)), direct())


def large_vocabulary(vocab_size: int, *, flat: bool) -> Case:
    """Rows of every kind of sampling at once; `flat` leaves more candidates than the list holds."""
    g = rng("large vocabulary", vocab_size, flat)
    configs = [
        SamplingConfig(),
        SamplingConfig(0.8, seed=1),
        SamplingConfig(0.8, top_k=40, seed=2),
        SamplingConfig(1.0, top_p=0.9, seed=3),
        SamplingConfig(1.2, top_k=100, top_p=0.8, min_p=0.01, seed=4),
        SamplingConfig(0.7, top_k=20, seed=5, repetition_penalty=1.2, frequency_penalty=0.1),
        SamplingConfig(0.05, top_k=50, seed=6),  # fewer than 50 tokens weigh anything
        SamplingConfig(1.0, top_k=vocab_size - 1, top_p=0.999, seed=7),
        SamplingConfig(1.0, min_p=0.3, seed=8, presence_penalty=0.5),
        SamplingConfig(1.0, top_p=0.5, seed=9),
        SamplingConfig(0.9, top_p=0.9, seed=10),
        SamplingConfig(1.0, top_k=1, seed=11),
    ]
    rows = len(configs)
    logits = normal(g, rows, vocab_size, scale=0.01 if flat else 3.0)
    logits[9], logits[10, ::2] = np.nan, -np.inf
    logits[8, vocab_size - 1] = np.inf
    counts = np.where(g.random((rows, vocab_size)) < 0.1, g.integers(1, 4, (rows, vocab_size)), 0)
    counts |= np.where(g.random((rows, vocab_size)) < 0.1, SEEN_IN_PROMPT, 0)
    return _case(f"large-{vocab_size}-{flat}", logits, configs, counts=counts, advance=True)


@pytest.mark.parametrize("flat", [False, True])
@pytest.mark.parametrize("vocab_size", [sample_launch.SPLIT_FROM, 20_011])
def test_sampling_from_large_vocabularies(vocab_size: int, flat: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Four kernels per row must choose what one block per row chooses, and what the reference says."""
    case, contract = large_vocabulary(vocab_size, flat=flat), CONTRACTS["sample"]
    storage = next(storages(contract, case))
    run_case(contract, case, storage, direct())
    tokens = []
    for split_from in (0, 1 << 30):
        monkeypatch.setattr(sample_launch, "SPLIT_FROM", split_from)
        tokens.append(tokens_of(case))
    assert tokens[0] == tokens[1]


@pytest.mark.parametrize("blocks", [1, 2])
def test_long_rows_take_several_tiles_per_block(blocks: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sample_launch, "MAX_BLOCKS", blocks)
    case, contract = large_vocabulary(20_011, flat=False), CONTRACTS["sample"]
    expected = tokens_of(case)
    monkeypatch.undo()
    assert tokens_of(case) == expected
    run_case(contract, case, next(storages(contract, case)), direct())


def tokens_of(case: Case) -> list[int]:
    arrays = {name: values.copy() for name, values in case.arrays.items()}
    arrays["tokens"] = np.full(len(arrays["logits"]), -7, np.int32)
    tensors: dict[str, Tensor | None] = {n: Tensor.from_numpy(a) for n, a in arrays.items()}
    direct()("sample", tensors, {})
    return [int(t) for t in arrays["tokens"]]


def test_the_scratch_of_a_row_is_as_large_as_its_struct() -> None:
    text = (ROOT / "kernels_cu" / "sample.cu").read_text()
    assert f"static_assert(sizeof(RowScratch) == {sample_launch.ROW_SCRATCH_NBYTES}," in text


@pytest.mark.parametrize("op", kernel_ops())
def test_through_the_driver(op: str) -> None:
    """The committed binaries' names, parameters and limits, and real addresses: one case of each op in every dtype."""
    contract = CONTRACTS[op]
    assert contract.cases is not None
    case = max(contract.cases(), key=lambda c: sum(a.size for a in c.arrays.values()) % 20_011)
    for shift, storage in enumerate(storages(contract, case, DEVICE_WEIGHTS)):
        held_to = contract_for(op, case, storage)
        run_case(held_to, case, storage, simulated_driver(), shift % 3, activations_for(op, storage))


@pytest.mark.parametrize("where", ["before", "beyond"])
def test_the_driver_runner_sees_writes_around_scratch_memory(where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    runner = simulated_driver()

    class Spoiler:
        def launch(self, grid: object, block: object, smem: int, stream: Any, params: Any) -> None:
            scratch = int.from_bytes(params.values[1].tobytes(), "little")
            runner.device.fill(scratch - 1 if where == "before" else scratch + 64, 0, 1, stream)

    monkeypatch.setattr(runner.library, "function", lambda symbol: Spoiler())
    with pytest.raises(AssertionError, match=f"written {where} the scratch memory"):
        runner.launch([Launch("sample__scan", (1, 1, 1), (32, 1, 1), 0, 64)], np.zeros((), np.int32))
