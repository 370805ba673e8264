"""Runs an op's cases on a backend and judges the results by the contract's reference.

Memory around every array is poisoned and checked afterwards, inputs must come back bit for bit, and what an op must not
touch of an array it updates (the rest of a KV cache) must keep its bits too.
"""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np

from gllm_driver.ops.contract import Array, Case, Contract
from gllm_driver.quant.formats import FORMATS
from gllm_driver.types import DTYPES, DType, Tensor

Storage = Mapping[str, str]  # dtype name of each array
Runner = Callable[[str, Mapping[str, Tensor | None], Mapping[str, float]], None]

NUMPY = {
    "f32": np.dtype(np.float32),
    "f16": np.dtype(np.float16),
    "bf16": np.dtype(ml_dtypes.bfloat16),
    "f64": np.dtype(np.float64),
    "i32": np.dtype(np.int32),
    "i64": np.dtype(np.int64),
    "u8": np.dtype(np.uint8),
}
GUARD = 128  # poisoned bytes before and after each array


def encode(values: np.ndarray, dtype: str) -> np.ndarray:
    """The bytes of `values` as stored in `dtype`."""
    if dtype in FORMATS:
        return FORMATS[dtype].quantize(values).reshape(-1)
    with np.errstate(over="ignore"):
        return np.ascontiguousarray(values).astype(NUMPY[dtype]).reshape(-1).view(np.uint8)


def decode(data: np.ndarray, dtype: str, shape: tuple[int, ...]) -> np.ndarray:
    """What the bytes mean: float64, or integers."""
    if dtype in FORMATS:
        return FORMATS[dtype].dequantize(data, shape).astype(np.float64)
    values = data.view(NUMPY[dtype]).reshape(shape)
    return values.astype(np.int64 if dtype.startswith(("i", "u")) else np.float64)


def rounded(values: np.ndarray, dtype: str) -> np.ndarray:
    """`values` after being stored in `dtype`."""
    return decode(encode(values, dtype), dtype, values.shape)


class Placed:
    """An array in the middle of poisoned memory, `shift` elements off a 64-byte boundary."""

    def __init__(self, data: np.ndarray, dtype: DType, shape: tuple[int, ...], shift: int) -> None:
        element = 2 if dtype.is_quantized else dtype.block_nbytes  # blocks start with an f16
        poison = 0xA5 if dtype.name.startswith(("i", "u")) else 0xFF  # 0xFF… is NaN in every float type
        self.memory = np.full(data.size + 2 * GUARD + 128, poison, np.uint8)
        start = GUARD + (-(self.memory.ctypes.data + GUARD)) % 64 + shift % 8 * element
        self.poison, self.start, self.end = poison, start, start + data.size
        self.data = self.memory[start : self.end]
        self.data[:] = data
        self.before = data.copy()
        self.dtype, self.shape = dtype, shape
        self.tensor = Tensor(self.memory.ctypes.data + start, shape, dtype, self.memory)

    @classmethod
    def unwritten(cls, dtype: DType, shape: tuple[int, ...], shift: int) -> Placed:
        """Room for an output, poisoned as well."""
        nbytes = Tensor(0, shape, dtype).nbytes
        poison = 0xA5 if dtype.name.startswith("i") else 0xFF
        return cls(np.full(nbytes, poison, np.uint8), dtype, shape, shift)

    def values(self) -> np.ndarray:
        return decode(self.data.copy(), self.dtype.name, self.shape)

    def check_guards(self, name: str) -> None:
        """AssertionError if anything was written around the array."""
        for side, guard in (("before", self.memory[: self.start]), ("after", self.memory[self.end :])):
            assert (guard == self.poison).all(), f"{name}: memory {side} the array was written"

    def check_unchanged(self, name: str) -> None:
        assert np.array_equal(self.data, self.before), f"{name}: an input was written"


def storages(contract: Contract, case: Case) -> Iterator[Storage]:
    """Every storage of the case's arrays: those with the same list of dtypes vary together, but for the case's own."""
    groups: dict[Any, list[str]] = {}
    choices: dict[Any, list[str]] = {}
    for array in contract.arrays:
        if array.name not in case.arrays:
            continue
        allowed = case.storage.get(array.name, array.dtypes)
        row = case.arrays[array.name].shape[-1]
        usable = [d for d in allowed if row % DTYPES[d].block_size == 0]
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


def first_difference(actual: np.ndarray, expected: np.ndarray, bad: np.ndarray) -> str:
    where = tuple(int(i) for i in np.argwhere(bad)[0])
    return (
        f"{int(bad.sum())} of {bad.size} wrong, first at {where}: got {actual[where]!r}, expected {expected[where]!r}"
    )


def check_pattern(name: str, actual: np.ndarray, expected: np.ndarray, *, finite_only: bool = False) -> None:
    """NaN and infinities where the reference has them; `finite_only` takes one for the other."""
    assert actual.shape == expected.shape, f"{name}: shape {actual.shape}, expected {expected.shape}"
    if finite_only:
        bad = np.isfinite(actual) != np.isfinite(expected)
    else:
        bad = np.isnan(actual) != np.isnan(expected)
        bad |= (np.isinf(actual) | np.isinf(expected)) & (actual != expected) & ~np.isnan(actual)
    assert not bad.any(), f"{name}: NaN or infinities differ, {first_difference(actual, expected, bad)}"


def magnitude(expected: np.ndarray, axes: int) -> np.ndarray:
    """The largest finite magnitude along the last `axes` axes, kept for broadcasting."""
    finite = np.where(np.isfinite(expected), np.abs(expected), 0.0)
    return finite.max(axis=tuple(range(-axes, 0)), keepdims=True, initial=0.0)


def check_close(name: str, actual: np.ndarray, low: np.ndarray, high: np.ndarray, pad: np.ndarray) -> None:
    """Finite values inside [low − pad, high + pad]."""
    finite = np.isfinite(low) & np.isfinite(high)
    with np.errstate(invalid="ignore"):
        error = np.maximum(low - actual, actual - high)
        bad = finite & ~(error <= pad)
    if bad.any():
        worst = np.where(bad, error / np.maximum(pad, 1e-300), 0.0).max()
        raise AssertionError(f"{name}: {first_difference(actual, low, bad)}; worst is {worst:.3g} × the tolerance")


@dataclass(frozen=True)
class Int8Activations:
    """What a dot with block weights may do to its other side: blocks of 32 in steps of their maximum / 127.

    `resolve` takes values in steps to the ones used; float32 may round one within EDGE of an edge either way.
    """

    weights: frozenset[str]
    resolve: Callable[[np.ndarray], np.ndarray]

    def __call__(self, weight: str, x: np.ndarray) -> np.ndarray:
        if weight not in self.weights:
            return x
        blocks = x.reshape(len(x), -1, 32)
        with np.errstate(invalid="ignore", divide="ignore"):
            step = np.abs(blocks).max(axis=-1, keepdims=True) / 127
            scaled = np.where(step > 0, blocks / step, 0.0)
            back = np.where(np.isfinite(step), self.resolve(scaled) * step, blocks)
        return back.reshape(x.shape)


EDGE = 2e-4


def nearest(offset: float) -> Callable[[np.ndarray], np.ndarray]:
    return lambda scaled: np.floor(scaled + 0.5 + offset)


def random_edges(generator: np.random.Generator) -> Callable[[np.ndarray], np.ndarray]:
    return lambda scaled: np.floor(scaled + 0.5 + generator.choice([-EDGE, EDGE], scaled.shape))


def random_steps(generator: np.random.Generator) -> Callable[[np.ndarray], np.ndarray]:
    return lambda scaled: scaled + generator.uniform(-0.5, 0.5, scaled.shape)


class Judge:
    """Compares an op's outputs with the reference, in the dtypes they are stored in."""

    def __init__(self, contract: Contract, case: Case, storage: Storage, inputs: Mapping[str, np.ndarray]) -> None:
        assert contract.reference is not None
        self.contract, self.case, self.storage, self.inputs = contract, case, storage, inputs
        self.scalars = {k: float(np.float32(v)) for k, v in case.scalars.items()}
        self.block_weights = frozenset(n for n, d in storage.items() if d in FORMATS)
        has_products = "activation" in inspect.signature(contract.reference).parameters
        self.int8 = has_products and bool(self.block_weights)
        self.exact = contract.reference(inputs, self.scalars)

    def dtype(self, array: Array) -> str:
        return self.storage.get(array.name, array.dtypes[0])

    def resolved(self, resolve: Callable[[np.ndarray], np.ndarray]) -> Mapping[str, np.ndarray]:
        """The reference with activations quantized for the block weights."""
        assert self.contract.reference is not None
        hook = Int8Activations(self.block_weights, resolve)
        return self.contract.reference(self.inputs, self.scalars, activation=hook)

    def check(self, actual: Mapping[str, np.ndarray]) -> None:
        """AssertionError naming array, place, values."""
        outputs = [a for a in self.contract.arrays if a.role != "in" and a.name in self.exact]
        assert {a.name for a in outputs} == set(self.exact) == set(actual)
        for array in outputs:
            expected = self.exact[array.name]
            if self.dtype(array).startswith("i"):
                bad = actual[array.name] != expected
                assert not bad.any(), f"{array.name}: {first_difference(actual[array.name], expected, bad)}"
            else:
                stored = rounded(expected, self.dtype(array))
                check_pattern(array.name, actual[array.name], stored, finite_only=self.int8)
        floats = [a for a in outputs if not self.dtype(a).startswith("i")]
        if not self.int8:
            self.check_within(floats, actual, [self.exact])
            return
        self.check_quantization_error(floats, actual)
        g = np.random.Generator(np.random.PCG64(0))
        edges = [nearest(-EDGE), nearest(EDGE), *(random_edges(g) for _ in range(6))]
        candidates = {
            "float activations": [self.exact],  # a kernel may also dequantize and multiply in f32
            "int8 activations": [self.resolved(edge) for edge in edges],
        }
        problems = {name: self.problem_within(floats, actual, refs) for name, refs in candidates.items()}
        assert None in problems.values(), "; ".join(f"with {name}: {problem}" for name, problem in problems.items())

    def problem_within(
        self, arrays: list[Array], actual: Mapping[str, np.ndarray], references: list[Mapping[str, np.ndarray]]
    ) -> str | None:
        """What check_within has to say, if anything."""
        try:
            self.check_within(arrays, actual, references)
        except AssertionError as error:
            return str(error)
        return None

    def check_within(
        self, arrays: list[Array], actual: Mapping[str, np.ndarray], references: list[Mapping[str, np.ndarray]]
    ) -> None:
        """Between the references, and off them by no more than the contract's tolerance."""
        for array in arrays:
            dtype = self.dtype(array)
            stack = np.stack([rounded(r[array.name], dtype) for r in references])
            low, high = stack.min(axis=0), stack.max(axis=0)
            tolerance = self.contract.tolerance[dtype] * self.case.condition
            with np.errstate(invalid="ignore"):
                pad = tolerance * magnitude(stack[0], array.error_axes) + (high - low) / 2
            check_close(array.name, actual[array.name], low, high, pad)

    def check_quantization_error(self, arrays: list[Array], actual: Mapping[str, np.ndarray]) -> None:
        """Off the exact result by no more than activations moved within their rounding step can do."""
        g = np.random.Generator(np.random.PCG64(1))
        samples = [self.resolved(random_steps(g)) for _ in range(8)]
        for array in arrays:
            exact = rounded(self.exact[array.name], self.dtype(array))
            tolerance = self.contract.tolerance[self.dtype(array)] * self.case.condition
            with np.errstate(invalid="ignore"):
                moved = np.max([np.abs(s[array.name] - self.exact[array.name]) for s in samples], axis=0)
            pad = 4 * magnitude(moved, array.error_axes) + tolerance * magnitude(exact, array.error_axes)
            check_close(array.name, actual[array.name], exact, exact, pad)


def run_case(contract: Contract, case: Case, storage: Storage, runner: Runner, shift: int = 0) -> None:
    """Place the arrays, run the op, check memory and results. AssertionError says what is wrong."""
    placed: dict[str, Placed] = {}
    inputs: dict[str, np.ndarray] = {}
    for i, (name, values) in enumerate(case.arrays.items()):
        data = encode(values, storage[name])
        inputs[name] = decode(data, storage[name], values.shape)
        placed[name] = Placed(data, DTYPES[storage[name]], values.shape, shift * (i + 1))
    judge = Judge(contract, case, storage, inputs)
    for array in contract.arrays:
        if array.role == "out":
            shared = case.aliases.get(array.name)
            shape = judge.exact[array.name].shape
            placed[array.name] = (
                placed[shared] if shared else Placed.unwritten(DTYPES[judge.dtype(array)], shape, shift)
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
    from gllm_driver.ops._sample_reference import certain_rows

    uncertain = np.flatnonzero(~certain_rows(judge.inputs))
    vocab_size = judge.inputs["logits"].shape[1]
    assert ((actual["tokens"] >= -1) & (actual["tokens"] < vocab_size)).all()
    for name in actual:
        actual[name][uncertain] = judge.exact[name][uncertain]
