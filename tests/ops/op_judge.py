"""Judges an op's results by the reference of its contract: NaN and infinities first, then the error.

Products with block weights get two references, exact and with activations quantized to int8 per block as a kernel may
do: results must be tight to one of them, and loosely near the exact one always. A backend may name further ones.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from op_memory import Storage, rounded

from gllm_driver.ops.contract import Array, Case, Contract
from gllm_driver.packed_types import PACKED_DTYPES
from gllm_driver.quant.formats import FORMATS


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


Activation = Callable[[str, np.ndarray], np.ndarray]
Alternatives = Mapping[str, Sequence[Activation]]


class Judge:
    """Compares an op's outputs with the reference, in the dtypes they are stored in.

    `alternatives` are other ways in which a kernel may take the activations of a product, by name: each a few hooks of
    the reference between whose results the kernel's must lie.
    """

    def __init__(
        self,
        contract: Contract,
        case: Case,
        storage: Storage,
        inputs: Mapping[str, np.ndarray],
        alternatives: Alternatives | None = None,
    ) -> None:
        assert contract.reference is not None
        self.alternatives = dict(alternatives or {})
        self.contract, self.case, self.storage, self.inputs = contract, case, storage, inputs
        self.scalars = {k: float(np.float32(v)) for k, v in case.scalars.items()}
        self.block_weights = frozenset(n for n, d in storage.items() if d in FORMATS or d in PACKED_DTYPES)
        has_products = "activation" in inspect.signature(contract.reference).parameters
        self.int8 = has_products and bool(self.block_weights)
        self.exact = contract.reference(inputs, self.scalars)

    def dtype(self, array: Array) -> str:
        return self.storage.get(array.name, array.dtypes[0])

    def resolved(self, resolve: Callable[[np.ndarray], np.ndarray]) -> Mapping[str, np.ndarray]:
        """The reference with activations quantized for the block weights."""
        return self.resolved_by(Int8Activations(self.block_weights, resolve))

    def resolved_by(self, hook: Activation) -> Mapping[str, np.ndarray]:
        """The reference with activations as `hook` makes them."""
        assert self.contract.reference is not None
        return self.contract.reference(self.inputs, self.scalars, activation=hook)

    def check(self, actual: Mapping[str, np.ndarray]) -> None:
        """AssertionError naming array, place, values."""
        outputs = [a for a in self.contract.arrays if a.role != "in" and a.name in self.exact]
        assert {a.name for a in outputs} == set(self.exact) == set(actual)
        for array in outputs:
            expected = self.exact[array.name]
            if self.dtype(array).startswith(("i", "u")):
                bad = actual[array.name] != expected
                assert not bad.any(), f"{array.name}: {first_difference(actual[array.name], expected, bad)}"
            else:
                stored = rounded(expected, self.dtype(array))
                check_pattern(array.name, actual[array.name], stored, finite_only=self.int8)
        floats = [a for a in outputs if not self.dtype(a).startswith(("i", "u"))]
        if not self.int8 and not self.alternatives:
            self.check_within(floats, actual, [self.exact])
            return
        candidates = {"float activations": [self.exact]}  # a kernel may also dequantize and multiply in f32
        if self.int8:
            self.check_quantization_error(floats, actual)
            g = np.random.Generator(np.random.PCG64(0))
            edges = [nearest(-EDGE), nearest(EDGE), *(random_edges(g) for _ in range(6))]
            candidates["int8 activations"] = [self.resolved(edge) for edge in edges]
        candidates |= {name: [self.resolved_by(hook) for hook in hooks] for name, hooks in self.alternatives.items()}
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
        samples += [self.resolved_by(hook) for hooks in self.alternatives.values() for hook in hooks]
        for array in arrays:
            exact = rounded(self.exact[array.name], self.dtype(array))
            tolerance = self.contract.tolerance[self.dtype(array)] * self.case.condition
            with np.errstate(invalid="ignore"):
                moved = np.max([np.abs(s[array.name] - self.exact[array.name]) for s in samples], axis=0)
            pad = 4 * magnitude(moved, array.error_axes) + tolerance * magnitude(exact, array.error_axes)
            check_close(array.name, actual[array.name], exact, exact, pad)
