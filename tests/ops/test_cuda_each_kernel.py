"""Every CUDA kernel once, on the smallest case that launches it: quick enough for sanitizers and for shuffled threads.

python tests/hostsim/sanitize.py asan python -m pytest tests/ops/test_cuda_each_kernel.py
HOSTSIM_ORDER=rand python -m pytest tests/ops/test_cuda_each_kernel.py
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from math import prod

import pytest
from cuda_runner import DEVICE_WEIGHTS, hostsim_folder, kernel_ops
from cuda_tolerance import activations_for, contract_for
from hostsim.direct import A100_LIKE, HostKernels
from op_harness import label, run_case, storages
from op_memory import Storage, dtype_named
from test_cuda_products import ONE_SM

from gllm_driver.errors import UnsupportedError
from gllm_driver.launch import DeviceProps, Launch, launches
from gllm_driver.ops import CONTRACTS
from gllm_driver.ops.contract import Case, Contract
from gllm_driver.types import Tensor

pytestmark = pytest.mark.hostsim

T4 = DeviceProps(cc=(7, 5), num_sms=40, max_smem_optin=64 << 10)
MODES = (("deterministic", A100_LIKE, True), ("default", ONE_SM, False))


@dataclass(frozen=True)
class Choice:
    """A case in one storage and one mode, and the kernels it launches."""

    op: str
    case: Case
    storage: Storage
    mode: str
    device: DeviceProps
    deterministic: bool
    symbols: frozenset[str]
    cost: int

    @property
    def name(self) -> str:
        kinds = label(CONTRACTS[self.op], self.storage)
        return "-".join(filter(None, (self.op, self.case.label, kinds, self.mode)))


def tensors_of(contract: Contract, case: Case, storage: Storage) -> dict[str, Tensor]:
    """The call's tensors as far as launch arithmetic looks at them: aligned, nowhere."""
    sizes: dict[str | int, int] = {}
    for array in contract.arrays:
        if array.name in case.arrays:
            sizes |= dict(zip(array.axes, case.arrays[array.name].shape, strict=True))
    if "T" in sizes:
        sizes.setdefault("S", sizes["T"])  # rms_norm without `rows`
    found = {}
    for i, array in enumerate(contract.arrays):
        if array.name in case.arrays:
            shape, dtype = case.arrays[array.name].shape, storage[array.name]
        elif array.role == "out":
            shape = tuple(axis if isinstance(axis, int) else sizes[axis] for axis in array.axes)
            dtype = array.dtypes[0]
        else:
            continue
        found[array.name] = Tensor((i + 1) << 40, shape, dtype_named(dtype))
    return found


def choices(op: str, modes: tuple[tuple[str, DeviceProps, bool], ...] = MODES) -> Iterator[Choice]:
    """Everything that could be run."""
    contract = CONTRACTS[op]
    assert contract.cases is not None
    for case in contract.cases():
        for storage in storages(contract, case, DEVICE_WEIGHTS):
            tensors = tensors_of(contract, case, storage)
            args = contract.bind(tensors, case.scalars)
            dtypes = {name: tensor.dtype.name for name, tensor in tensors.items()}
            for mode, device, deterministic in modes:
                try:
                    todo = launches(op, args, dtypes, device, deterministic)
                except UnsupportedError:
                    continue
                yield Choice(
                    op, case, storage, mode, device, deterministic, frozenset(x.symbol for x in todo), cost(todo)
                )


def cost(todo: list[Launch]) -> int:
    """Threads to be run."""
    return sum(prod(launch.grid) * prod(launch.block) for launch in todo)


def smallest(op: str) -> list[Choice]:
    """Few cheap ones that together launch every kernel of the op that any case launches, cheapest kernels first."""
    every = sorted(choices(op), key=lambda c: c.cost)
    missing, found = set().union(*(c.symbols for c in every)), []
    for choice in every:
        if choice.symbols & missing:
            found.append(choice)
            missing -= choice.symbols
    return found


BEFORE_SM_80 = re.compile(r"(plain|place|rows_f32|rows_d\d+|rows_split_d\d+)$")


@pytest.mark.parametrize("op", ["linear", "fused_gate_up_silu", "fused_qkv_rope", "flash_attention", "paged_attention"])
def test_older_devices_are_asked_for_kernels_their_binaries_have(op: str) -> None:
    """TENSOR_CORE_KERNELS in kernels_cu/common/dev.cuh leaves out the others."""
    found = {symbol for choice in choices(op, (("old", T4, False), ("exact", T4, True))) for symbol in choice.symbols}
    assert found
    assert [symbol for symbol in found if not BEFORE_SM_80.fullmatch(symbol.partition("__")[2])] == []


@pytest.mark.parametrize("choice", [c for op in kernel_ops() for c in smallest(op)], ids=lambda c: c.name)
def test_the_smallest_case_of_a_kernel(choice: Choice) -> None:
    kernels = HostKernels(hostsim_folder())

    def run(op: str, arrays: dict[str, Tensor | None], scalars: dict[str, float]) -> None:
        kernels.run_op(op, arrays, scalars, device=choice.device, deterministic=choice.deterministic)

    contract = contract_for(choice.op, choice.case, choice.storage)
    run_case(contract, choice.case, choice.storage, run, alternatives=activations_for(choice.op, choice.storage))  # type: ignore[arg-type]
