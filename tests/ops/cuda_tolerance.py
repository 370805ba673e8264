"""How exact CUDA kernels have to be, where a contract cannot say it of every backend."""

from __future__ import annotations

import dataclasses

from op_memory import Storage

from gllm_driver.launch._attention import TENSOR_CORE_DIMS
from gllm_driver.ops import CONTRACTS
from gllm_driver.ops.contract import Case, Contract


def contract_for(op: str, case: Case, storage: Storage) -> Contract:
    """The op's contract, with the tolerance its CUDA kernels are held to.

    Prefill attention on tensor cores rounds queries and softmax weights to the type of the cache.
    """
    contract = CONTRACTS[op]
    if op == "flash_attention" and case.arrays["kv"].shape[-1] in TENSOR_CORE_DIMS:
        return dataclasses.replace(contract, tolerance={"f32": contract.tolerance[storage["kv"]]})
    return contract
