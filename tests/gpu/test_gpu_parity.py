"""Every op's kernels through the driver, in every dtype, on every case, against the contract's reference."""

from __future__ import annotations

import functools
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hostsim import session

TESTS = Path(__file__).parents[1]
sys.path[:0] = [str(TESTS / "ops"), str(TESTS / "e2e")]

from cuda_models import kernels  # noqa: E402
from cuda_runner import DEVICE_WEIGHTS, DriverRunner, kernel_ops  # noqa: E402
from cuda_tolerance import activations_for, contract_for  # noqa: E402
from op_harness import label, run_case, storages  # noqa: E402
from op_memory import Storage  # noqa: E402
from test_cuda_each_kernel import tensors_of  # noqa: E402

from gllm_driver.launch import DeviceProps, launches  # noqa: E402
from gllm_driver.ops import CONTRACTS  # noqa: E402
from gllm_driver.ops.contract import Case  # noqa: E402
from gllm_driver.packed_types import PACKED_DTYPES  # noqa: E402


@functools.cache
def runner(deterministic: bool = True) -> DriverRunner:
    """On the machine's GPU, or on the simulated device unless GLLM_TEST_GPU is set."""
    if not session.on_real_gpu():
        session.stub().reset(THREADS="2")
    return DriverRunner(cubins=kernels(), deterministic=deterministic)


def parameters() -> Iterator[Any]:
    index = 0
    for op in kernel_ops():
        contract = CONTRACTS[op]
        assert contract.cases is not None
        for case in contract.cases():
            for storage in storages(contract, case, DEVICE_WEIGHTS):
                name = "-".join(filter(None, (op, case.label, label(contract, storage))))
                yield pytest.param(op, case, storage, index, id=name)
                index += 1


@pytest.mark.parametrize(("op", "case", "storage", "index"), list(parameters()))
def test_parity(op: str, case: Case, storage: Storage, index: int) -> None:
    shift = index % 2 * (1 + index % 7)  # every other one at alignments no better than an element's
    run_case(contract_for(op, case, storage), case, storage, runner(), shift, activations_for(op, storage))


PRODUCTS = ("linear", "fused_gate_up_silu", "fused_qkv_rope")


@pytest.mark.parametrize(("op", "case", "storage", "index"), [p for p in parameters() if p.values[0] in PRODUCTS])
def test_products_in_default_mode(op: str, case: Case, storage: Storage, index: int) -> None:
    """Few tokens have kernels of their own there, which want aligned memory."""
    held_to, by = contract_for(op, case, storage), runner(deterministic=False)
    run_case(held_to, case, storage, by, 0, activations_for(op, storage), unpacked(op, case, storage, by.props))


def unpacked(op: str, case: Case, storage: Storage, props: DeviceProps) -> list[str]:
    """Packed weights that are unpacked to f16 before they are multiplied."""
    tensors = tensors_of(CONTRACTS[op], case, storage)
    dtypes = {name: tensor.dtype.name for name, tensor in tensors.items()}
    calls = launches(op, CONTRACTS[op].bind(tensors, case.scalars), dtypes, props, False)
    if not any(call.symbol.startswith("pack_weight__unpack") for call in calls):
        return []
    return [name for name, dtype in storage.items() if dtype in PACKED_DTYPES]
