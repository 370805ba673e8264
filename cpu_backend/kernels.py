"""What the CPU backend can compile: op kernels, the functions per dtype, the team's own. Names only; no numba here."""

from __future__ import annotations

from collections.abc import Iterable

from gllm_driver.types import DTYPES, FLOAT_DTYPES

from .blocks import block_format
from .compile import Entry

OPS = (
    "embedding",
    "rms_norm",
    "rope_table",
    "fused_qkv_rope",
    "flash_attention",
    "paged_attention",
    "linear",
    "fused_gate_up_silu",
    "sample",
    "kv_pages",
    "pack_weight",
    "pool_rows",
)
WEIGHT_DTYPES: tuple[str, ...] = tuple(
    d for d in DTYPES if d in FLOAT_DTYPES or block_format(d) is not None
)  # stored types that products and look-ups compute
TABLES = ("matmul", "dequantize", "weigh")  # fields of the team's struct, indexed by dtype code


def op_entry(op: str) -> Entry:
    """The kernel of an op: `kernel(args, team, thread)` in the module of the same name."""
    return Entry(op, f"cpu_backend.{op}", "kernel")


def team_entries() -> list[Entry]:
    return [Entry(f"team_{name}", "cpu_backend.sync", "make", (name,)) for name in ("lead", "post", "work")]


def table_entries(dtypes: Iterable[str]) -> list[tuple[str, int, Entry]]:
    """(table, dtype code, function) for the dtypes a program touches."""
    entries = []
    for name in sorted(set(dtypes)):
        code = DTYPES[name].code
        entries.append(("matmul", code, Entry(f"matmul_{name}", "cpu_backend.matmul", "make", (name,))))
        entries.append(
            ("dequantize", code, Entry(f"dequantize_{name}", "cpu_backend.formats", "make_dequantize", (name,)))
        )
        if name in FLOAT_DTYPES:
            entries.append(("weigh", code, Entry(f"weigh_{name}", "cpu_backend.formats", "make_weigh", (name,))))
    return entries


def all_entries(dtypes: Iterable[str]) -> list[Entry]:
    """Every function that a model with weights and KV of these dtypes will need."""
    names = sorted({*dtypes, "f32"})
    entries = [*team_entries(), *(op_entry(op) for op in OPS), *(entry for _, _, entry in table_entries(names))]
    return entries + [first_bad_entry(name) for name in names]


def first_bad_entry(dtype: str) -> Entry:
    """first_bad(address, n), see weights.py."""
    return Entry(f"first_bad_{dtype}", "cpu_backend.weights", "make_first_bad", (dtype,))


def convert_entry(dtype: str) -> Entry:
    """convert(address, n, out, out_dtype, scratch), see weights.py."""
    return Entry(f"convert_{dtype}", "cpu_backend.weights", "make_convert", (dtype,))
