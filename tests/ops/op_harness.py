"""Runs an op's cases on a backend and judges the results.

Memory around every array is poisoned and checked afterwards, inputs must come back bit for bit, and what an op must not
touch of an array it updates (the rest of a KV cache) must keep its bits too.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any

import numpy as np
from op_judge import Alternatives, Judge, first_difference
from op_memory import Placed, Storage, decode, dtype_named, encode, rounded

from gllm_driver.ops._sample_reference import certain_rows
from gllm_driver.ops.contract import Case, Contract
from gllm_driver.packed_types import packed_dtype
from gllm_driver.types import FLOAT_DTYPES, WEIGHT_DTYPES, Tensor

Runner = Callable[[str, Mapping[str, Tensor | None], Mapping[str, float]], None]


BASIC_WEIGHTS = (*FLOAT_DTYPES, "q8_0", "q4_0")


def storages(contract: Contract, case: Case, weights: Collection[str] = BASIC_WEIGHTS) -> Iterator[Storage]:
    """Every storage of the case's arrays: those with the same list of dtypes vary together, but for the case's own.

    Of the types a weight matrix may have, only `weights`: those that the backend at hand computes.
    """
    groups: dict[Any, list[str]] = {}
    choices: dict[Any, list[str]] = {}
    for array in contract.arrays:
        if array.name not in case.arrays:
            continue
        allowed: Collection[str] = case.storage.get(array.name, array.dtypes)
        if array.dtypes == WEIGHT_DTYPES:
            packed = [p.name for d in allowed if array.packed and (p := packed_dtype(d))]
            allowed = [d for d in dict.fromkeys((*allowed, *packed)) if d in weights]
        row = case.arrays[array.name].shape[-1]
        usable = [d for d in allowed if row % dtype_named(d).block_size == 0]
        assert usable or len(allowed) == 1, f"{contract.name} {case.label}: {array.name} fits no dtype"
        if not usable:
            return
        key = array.dtypes if len(usable) > 1 else array.name
        groups.setdefault(key, []).append(array.name)
        choices[key] = [d for d in choices.get(key, usable) if d in usable]
    for combination in itertools.product(*choices.values()):
        yield {name: dtype for names, dtype in zip(groups.values(), combination, strict=True) for name in names}


def label(contract: Contract, storage: Storage) -> str:
    """The dtypes a test id must tell: those of arrays that may come in several."""
    names = [a.name for a in contract.arrays if a.has_dtype_field and a.name in storage]
    if len({storage[n] for n in names if n != "kv"}) == 1:
        names = [n for n in names if n == "kv"] + [n for n in names if n != "kv"][:1]
    return "-".join(storage[n] for n in names)


def run_case(
    contract: Contract,
    case: Case,
    storage: Storage,
    runner: Runner,
    shift: int = 0,
    alternatives: Alternatives | None = None,
    in_halves: Collection[str] = (),
) -> None:
    """Place the arrays, run the op, check memory and results. AssertionError says what is wrong.

    in_halves: weights that the kernel rounds to f16, as the judge then does.
    """
    placed: dict[str, Placed] = {}
    inputs: dict[str, np.ndarray] = {}
    for i, (name, values) in enumerate(case.arrays.items()):
        data = encode(values, storage[name])
        inputs[name] = decode(data, storage[name], values.shape)
        if name in in_halves:
            inputs[name] = rounded(inputs[name], "f16")
        placed[name] = Placed(data, dtype_named(storage[name]), values.shape, shift * (i + 1))
    judge = Judge(contract, case, storage, inputs, alternatives)
    for array in contract.arrays:
        if array.role == "out":
            shared = case.aliases.get(array.name)
            shape = judge.exact[array.name].shape
            placed[array.name] = (
                placed[shared] if shared else Placed.unwritten(dtype_named(judge.dtype(array)), shape, shift)
            )
    tensors = {a.name: placed[a.name].tensor if a.name in placed else None for a in contract.arrays}
    runner(contract.name, tensors, case.scalars)
    for array in contract.arrays:
        if array.name in placed:
            placed[array.name].check_guards(array.name)
            if array.role == "in" and array.name not in case.aliases.values():
                placed[array.name].check_unchanged(array.name)
            if array.role == "inout":
                check_untouched(array.name, placed[array.name], judge)
    actual = {a.name: placed[a.name].values() for a in contract.arrays if a.role != "in" and a.name in placed}
    if contract.name == "sample":
        ignore_uncertain(actual, judge)
    judge.check(actual)


def check_untouched(name: str, place: Placed, judge: Judge) -> None:
    """Elements that the reference leaves alone keep their bits.

    A NaN is known to be left alone only where no NaN or infinity came in elsewhere, from which it could be computed.
    """
    before, expected = judge.inputs[name], judge.exact[name]
    clean = all(np.isfinite(v).all() for k, v in judge.inputs.items() if k != name)
    untouched = (before == expected) | (np.isnan(before) & np.isnan(expected) & clean)
    width = place.dtype.block_nbytes
    changed = (place.data.reshape(-1, width) != place.before.reshape(-1, width)).any(axis=1).reshape(place.shape)
    bad = untouched & changed
    assert not bad.any(), f"{name}: elements to be left alone changed, {first_difference(place.values(), before, bad)}"


def ignore_uncertain(actual: dict[str, np.ndarray], judge: Judge) -> None:
    """Where float32 may choose another token than float64, take the kernel's word, if it is a token at all."""
    uncertain = np.flatnonzero(~certain_rows(judge.inputs))
    vocab_size = judge.inputs["logits"].shape[1]
    assert ((actual["tokens"] >= -1) & (actual["tokens"] < vocab_size)).all()
    for name in actual:
        actual[name][uncertain] = judge.exact[name][uncertain]
