"""The contracts as data: what `bind` refuses and in which words, the structs, and that the sets of names agree."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest

from gllm_driver.errors import ContractError
from gllm_driver.ops import CONTRACTS
from gllm_driver.ops.contract import Array, Contract, Rule, Scalar
from gllm_driver.types import BF16, DTYPES, F16, F32, I32, I64, Q4_0, Q8_0, DType, Tensor

ROOT = Path(__file__).parents[2]
ADDRESS = 0x1000  # bind looks at no memory


def tensor(dtype: DType, *shape: int, address: int = ADDRESS) -> Tensor:
    return Tensor(address, shape, dtype)


LINEAR = {"x": tensor(F32, 3, 64), "weight": tensor(Q8_0, 7, 64), "out": tensor(F32, 3, 7)}
KV = tensor(F16, 9, 2, 2, 2, 4, 8)
FLASH = {
    "q": tensor(F32, 5, 32),
    "kv": KV,
    "page_table": tensor(I32, 2, 6),
    "positions": tensor(I64, 5),
    "offsets": tensor(I32, 3),
    "out": tensor(F32, 5, 32),
}
PAGED = {
    "q": tensor(F32, 2, 32),
    "kv": KV,
    "page_table": tensor(I32, 2, 6),
    "positions": tensor(I64, 2),
    "out": tensor(F32, 2, 32),
}
QKV = {
    "x": tensor(F32, 5, 64),
    "norm": tensor(F32, 64),
    "wq": tensor(Q4_0, 32, 64),
    "wk": tensor(Q8_0, 16, 64),
    "wv": tensor(BF16, 16, 64),
    "cos_sin": tensor(F32, 5, 2, 4),
    "positions": tensor(I64, 5),
    "seq": tensor(I32, 5),
    "page_table": tensor(I32, 2, 6),
    "kv": KV,
    "q": tensor(F32, 5, 32),
}
RMS = {"x": tensor(F32, 4, 10), "weight": tensor(F32, 10), "out": tensor(F32, 4, 10)}
GATE = {
    "x": tensor(F32, 4, 32),
    "norm": tensor(F32, 32),
    "gate": tensor(F32, 9, 32),
    "up": tensor(F32, 9, 32),
    "out": tensor(F32, 4, 9),
}
SAMPLE = {
    "logits": tensor(F32, 2, 50),
    "params": tensor(I32, 2, 12),
    "tokens": tensor(I32, 2),
    "positions": tensor(I64, 2),
}
ATTENTION = {"layer": 1, "window": 0, "scale": 0.35}
ROPE = {"layer": 1, "rope_style": 0, "eps": 1e-5}
GATED = {"eps": 1e-5, "activation": 0}
VALID: list[tuple[str, Mapping[str, Tensor], Mapping[str, float]]] = [
    ("linear", LINEAR, {}),
    ("flash_attention", FLASH, ATTENTION),
    ("paged_attention", PAGED, ATTENTION),
    ("fused_qkv_rope", QKV, ROPE),
    ("rms_norm", RMS, {"eps": 1e-5}),
    ("fused_gate_up_silu", GATE, GATED),
    ("sample", SAMPLE, {}),
]


@pytest.mark.parametrize(("op", "arrays", "scalars"), VALID, ids=[v[0] for v in VALID])
def test_valid_calls_are_packed(op: str, arrays: Mapping[str, Tensor], scalars: Mapping[str, float]) -> None:
    contract = CONTRACTS[op]
    packed = contract.bind(arrays, scalars)
    assert packed.dtype == contract.struct
    for array in contract.arrays:
        assert packed[array.name] == (ADDRESS if array.name in arrays else 0)
        if array.has_dtype_field and array.name in arrays:
            assert packed[f"{array.name}_dtype"] == arrays[array.name].dtype.code
        if array.name in arrays:
            for axis, n in zip(array.axes, arrays[array.name].shape, strict=True):
                assert axis == n if isinstance(axis, int) else packed[axis] == n
    for scalar in contract.scalars:
        assert packed[scalar.name] == np.float32(scalars.get(scalar.name, scalar.default))


REFUSED = [
    ("linear", LINEAR, {"x": None}, {}, "linear: x is required"),
    ("linear", LINEAR, {"x": tensor(F16, 3, 64)}, {}, "linear: x has dtype f16, expected f32"),
    (
        "linear",
        LINEAR,
        {"weight": tensor(I32, 7, 64)},
        {},
        "weight has dtype i32, expected f32 or f16 or bf16 or a block format",
    ),
    ("linear", LINEAR, {"weight": tensor(F32, 7, 63)}, {}, "weight axis 1 is K=64 (from x), got 63"),
    ("linear", LINEAR, {"out": tensor(F32, 3, 8)}, {}, "out axis 1 is N=7 (from weight), got 8"),
    ("linear", LINEAR, {"out": tensor(F32, 21)}, {}, "out has shape (21,), expected axes [T, N]"),
    ("linear", LINEAR, {"bias": tensor(F32, 3)}, {}, "bias axis 0 is N=7 (from weight), got 3"),
    ("linear", LINEAR, {"x": tensor(F32, 3, 64, address=0)}, {}, "x has no memory (address 0)"),
    ("linear", LINEAR, {"wieght": LINEAR["weight"]}, {}, "linear: wieght is not an argument of this op"),
    ("linear", LINEAR, {}, {"alpha": 1.0}, "linear: alpha is not an argument of this op"),
    ("rms_norm", RMS, {}, {"eps": None}, "rms_norm: eps is required"),
    ("rms_norm", RMS, {}, {"eps": -1e-9}, "eps must be in [0.0, 1.0], got -1e-09"),
    ("rms_norm", RMS, {}, {"eps": float("nan")}, "eps must be in [0.0, 1.0], got nan"),
    ("rms_norm", RMS, {"out": tensor(F32, 2, 10)}, {}, "without rows, out has as many rows as x"),
    ("rms_norm", RMS, {"rows": tensor(I32, 4), "residual": RMS["x"]}, {}, "rows and residual exclude each other"),
    ("flash_attention", FLASH, {}, {"layer": 2}, "layer is a layer of the cache"),
    ("flash_attention", FLASH, {}, {"layer": -1}, "layer must be in [0, inf], got -1"),
    ("flash_attention", FLASH, {}, {"window": -1}, "window must be in"),
    ("flash_attention", FLASH, {"q": tensor(F32, 5, 24), "out": tensor(F32, 5, 24)}, {}, "multiple of KV heads"),
    ("flash_attention", FLASH, {"offsets": tensor(I32, 2)}, {}, "offsets has one entry more than there are sequences"),
    (
        "flash_attention",
        FLASH,
        {"kv": tensor(F16, 9, 2, 3, 2, 4, 8)},
        {},
        "kv axis 2 is 2=2 (from the contract), got 3",
    ),
    ("flash_attention", FLASH, {"kv": tensor(Q8_0, 9, 2, 2, 2, 4, 32)}, {}, "kv has dtype q8_0, expected f32 or f16"),
    ("paged_attention", PAGED, {"positions": tensor(I32, 2)}, {}, "positions has dtype i32, expected i64"),
    ("paged_attention", PAGED, {}, {"layer": 2}, "layer is a layer of the cache"),
    ("paged_attention", PAGED, {"q": tensor(F32, 2, 24), "out": tensor(F32, 2, 24)}, {}, "multiple of KV heads"),
    ("paged_attention", PAGED, {"positions": tensor(I64, 3)}, {}, "positions axis 0 is S=2 (from q), got 3"),
    ("fused_qkv_rope", QKV, {}, {"layer": 2}, "layer is a layer of the cache"),
    ("fused_qkv_rope", QKV, {}, {"rope_style": 2}, "rope_style must be in [0, 1], got 2"),
    ("fused_qkv_rope", QKV, {"kv": tensor(F16, 9, 2, 2, 3, 4, 8)}, {}, "KD = HK · Dh"),
    ("fused_qkv_rope", QKV, {"wq": tensor(F32, 24, 64), "q": tensor(F32, 5, 24)}, {}, "multiple of KV heads"),
    ("fused_qkv_rope", QKV, {"cos_sin": tensor(F32, 5, 2, 5)}, {}, "the rotated dims fit in a head"),
    ("fused_qkv_rope", QKV, {"q_norm": tensor(F32, 8)}, {}, "q_norm and k_norm come together"),
    ("fused_qkv_rope", QKV, {"bq": tensor(F32, 16)}, {}, "bq axis 0 is QD=32 (from wq), got 16"),
    ("fused_gate_up_silu", GATE, {"up_bias": tensor(F32, 9)}, {}, "gate_bias and up_bias come together"),
    ("fused_gate_up_silu", GATE, {}, {"activation": 3}, "activation must be in [0, 2], got 3 (index into ACTIVATIONS)"),
    ("fused_gate_up_silu", GATE, {"gate": None, "gate_bias": tensor(F32, 9)}, {}, "a gate_bias needs a gate"),
    ("rms_norm", RMS, {}, {"center": 2}, "center must be in [0, 1], got 2 (0 RMSNorm, 1 LayerNorm"),
    ("rms_norm", RMS, {"bias": tensor(F32, 9)}, {}, "bias axis 0 is D=10 (from x), got 9"),
    ("paged_attention", PAGED, {}, {"alibi_max_bias": -1.0}, "alibi_max_bias must be in [0.0, 1000.0], got -1.0"),
    ("sample", SAMPLE, {"params": tensor(I32, 2, 11)}, {}, "params axis 1 is 12=12 (from the contract), got 11"),
    ("sample", SAMPLE, {"logits": tensor(F32, 2, 1 << 30)}, {}, "fewer than 2**30 tokens"),
]


@pytest.mark.parametrize(("op", "arrays", "changed", "scalars", "message"), REFUSED)
def test_bind_refuses(
    op: str,
    arrays: Mapping[str, Tensor],
    changed: Mapping[str, Tensor | None],
    scalars: Mapping[str, float | None],
    message: str,
) -> None:
    usual = next(dict(v[2]) for v in VALID if v[0] == op)
    given = {k: v for k, v in {**usual, **scalars}.items() if v is not None}
    with pytest.raises(ContractError) as caught:
        CONTRACTS[op].bind({**arrays, **changed}, given)
    assert caught.value.op == op
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_every_rule_and_range_is_refused_somewhere() -> None:
    said = " | ".join(r[4] for r in REFUSED)
    for contract in CONTRACTS.values():
        for rule in contract.rules:
            assert any(r[0] == contract.name and r[4] in rule.message for r in REFUSED), (contract.name, rule.message)
    for word in ("is required", "has dtype", "axis", "expected axes", "must be in", "is not an argument", "no memory"):
        assert word in said


@pytest.mark.parametrize("op", CONTRACTS)
def test_struct_has_natural_alignment_and_every_field(op: str) -> None:
    contract = CONTRACTS[op]
    fields = contract.struct.fields
    assert fields is not None
    end = 0
    for name in contract.struct.names or ():
        dtype, offset = fields[name][:2]
        assert offset % dtype.itemsize == 0, name
        assert offset == -(-end // dtype.itemsize) * dtype.itemsize, f"{name}: padding beyond what C would put"
        end = offset + dtype.itemsize
    assert contract.struct.itemsize == -(-end // 8) * 8
    expected = {a.name for a in contract.arrays} | set(contract.dims) | {s.name for s in contract.scalars}
    assert set(fields) == expected | {f"{a.name}_dtype" for a in contract.arrays if a.has_dtype_field}


@pytest.mark.parametrize("op", CONTRACTS)
def test_contract_is_complete(op: str) -> None:
    contract = CONTRACTS[op]
    assert contract.name == op
    assert contract.reference is not None
    assert contract.cases is not None
    cases = list(contract.cases())
    assert len({c.label for c in cases}) == len(cases) >= 10
    axes = {axis for a in contract.arrays for axis in a.axes if isinstance(axis, str)}
    assert axes == set(contract.dims)
    assert set().union(*(a.dtypes for a in contract.arrays)) <= set(DTYPES)
    for case in cases:
        inputs = {a.name for a in contract.arrays if a.role != "out"}
        required = {a.name for a in contract.arrays if a.role != "out" and not a.optional}
        assert required <= set(case.arrays) <= inputs, case.label
        assert set(case.scalars) <= {s.name for s in contract.scalars}, case.label
    optional = {a.name for a in contract.arrays if a.optional}
    for name in optional:
        assert {name in c.arrays for c in cases} == {True, False}, f"{name} is not tried both ways"


def test_cases_are_the_same_every_time() -> None:
    for contract in CONTRACTS.values():
        assert contract.cases is not None
        for first, second in zip(contract.cases(), contract.cases(), strict=True):
            assert first.label == second.label
            for name, array in first.arrays.items():
                assert array.tobytes() == second.arrays[name].tobytes(), f"{contract.name} {first.label}: {name}"


def test_names_agree_with_the_files() -> None:
    contracts = {p.stem for p in (ROOT / "gllm_driver" / "ops").glob("[!_]*.py")} - {"contract", "header"}
    assert contracts == set(CONTRACTS)
    assert set(CONTRACTS) <= {p.stem for p in (ROOT / "cpu_backend").glob("*.py")}


def small(**changes: object) -> Contract:
    parts: dict[str, object] = {
        "name": "small",
        "doc": "",
        "dims": {"T": "tokens"},
        "arrays": (Array("x", ("T",)),),
        "scalars": (Scalar("eps", "f32"),),
    }
    return Contract(**{**parts, **changes})  # type: ignore[arg-type]


def test_abi_hash_follows_the_layout_and_nothing_else() -> None:
    base = small().abi_hash
    assert small(doc="other", rules=(Rule(lambda v: True, ""),)).abi_hash == base
    assert small(name="other").abi_hash != base
    assert small(dims={"N": "tokens"}).abi_hash != base
    assert small(arrays=(Array("x", ("T",), ("f32", "f16")),)).abi_hash != base
    assert small(arrays=(Array("x", ("T",)), Array("y", ("T",)))).abi_hash != base
    assert small(scalars=(Scalar("eps", "i32"),)).abi_hash != base
    assert len({c.abi_hash for c in CONTRACTS.values()}) == len(CONTRACTS)


def test_a_dim_nobody_gives_is_an_error() -> None:
    contract = small(dims={"T": "", "N": ""}, arrays=(Array("x", ("T",)), Array("y", ("N",), optional=True)))
    with pytest.raises(ContractError, match="N cannot be known: no array given has this axis"):
        contract.bind({"x": tensor(F32, 3)}, {"eps": 0.0})
