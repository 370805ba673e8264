"""Packed types: how a GPU holds quantized weights. Made once at upload from what a file stores (op `pack_weight`).

A packed row of K elements, all counts rounded up to whole segments of 256 elements:

    quants   [segments][32 · bits] bytes: unsigned integers u of 8, 4, 2 or 1 bits, in the order below
    scales   [segments][256 / group_size][1 or 2] f16: d, and for the kinds z and m a second value a beside it

and zeros up to a multiple of 32 bytes, so that every segment and every row can be read 16 bytes at a time. A weight is

    kind ""   d · (u − 2^(bits−1)) for 8 and 4 bits, d · (2u − (2^bits − 1)) for 2 and 1 bits
    kind "z"  d · (u − a)
    kind "m"  d · u + a

Groups past K have d = a = 0. The order within a segment is that of tensor-core operands: lane t of four holds the
elements 16j + 4t + {0, 1, 2, 3} of every stretch j of 16, in this order, n = 32 / bits of them to a 32-bit word. Field
f of a word (from the low bits up) is its element 2 (f mod n/2) + f div n/2, so that one mask leaves two neighbours in
the halves of the word. Words of a lane are shared out in pieces of 16 bytes (8 for 1 bit), piece 0 of lanes 0 to 3
first, then piece 1.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from types import MappingProxyType

from .types import DType

PACKED_BITS = (1, 2, 4, 8)
GROUP_SIZES = (16, 32, 64, 128)
KINDS = ("", "z", "m")  # symmetric, zero point, minimum
SEGMENT = 256  # elements of K that lie together
ROW_ALIGNMENT = 32
CODE_FLAG = 256  # set in the code of every packed type, and of no other


@dataclass(frozen=True)
class PackedDType(DType):
    """A packed type. Its code says it all: CODE_FLAG | log2(bits) | log2(block_size / 16) << 2 | kind << 4."""

    bits: int
    kind: str

    def quants_nbytes(self, num_elements: int) -> int:
        """Bytes of a row's quants: where its scales start."""
        return _segments(num_elements) * SEGMENT // 8 * self.bits

    def row_nbytes(self, num_elements: int) -> int:
        """Bytes of a row. ValueError unless `num_elements` is a multiple of the group size."""
        super().row_nbytes(num_elements)
        scales = _segments(num_elements) * (SEGMENT // self.block_size) * (4 if self.kind else 2)
        return -(-(self.quants_nbytes(num_elements) + scales) // ROW_ALIGNMENT) * ROW_ALIGNMENT

    __repr__ = DType.__repr__


def _segments(num_elements: int) -> int:
    return -(-num_elements // SEGMENT)


def _all() -> dict[str, PackedDType]:
    found = {}
    for i, bits in enumerate(PACKED_BITS):
        for j, group in enumerate(GROUP_SIZES):
            for k, kind in enumerate(KINDS):
                name = f"p{bits}_{group}{kind}"
                nbytes = group * bits // 8 + (4 if kind else 2)
                found[name] = PackedDType(name, CODE_FLAG | i | j << 2 | k << 4, group, nbytes, bits, kind)
    return found


PACKED_DTYPES = MappingProxyType(_all())

# GGUF's formats. Scales of K-quants are products of two stored numbers and are rounded to f16 here.
_PACKED_AS = {
    "q8_0": "p8_32",
    "q4_0": "p4_32",
    "q4_1": "p4_32m",
    "q5_0": "p8_32",
    "q5_1": "p8_32m",
    "q2_k": "p2_16m",
    "q3_k": "p4_16",
    "q4_k": "p4_32m",
    "q5_k": "p8_32m",
    "q6_k": "p8_16",
    "iq4_nl": "p8_32",
    "iq4_xs": "p8_32",
}
_NATIVE = re.compile(r"int([1248])_(32|64|128)([zm]?)")


def packed_dtype(stored: str) -> PackedDType | None:
    """The type in which a GPU holds weights stored as `stored`; None for types that are not packed (floats)."""
    native = _NATIVE.fullmatch(stored)
    name = "p{}_{}{}".format(*native.groups()) if native else _PACKED_AS.get(stored)
    return PACKED_DTYPES[name] if name else None
