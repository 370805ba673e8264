"""Block formats: how consecutive weights of a row share a scale. One class per format; `FORMATS` knows them by name.

The layouts of GGUF's types are ggml's, so tensors of a GGUF file are used as they are; the native ones are described in
native.py. Little-endian throughout.
"""

from __future__ import annotations

from ...types import NATIVE_BITS, NATIVE_BLOCK_SIZES, NATIVE_KINDS
from .base import BlockFormat, Planes
from .foreign import FOREIGN
from .iq4 import IQ4_NLFormat, IQ4_XSFormat
from .k_quants import Q2_KFormat, Q3_KFormat, Q4_KFormat, Q5_KFormat, Q6_KFormat
from .native import NativeFormat
from .simple import Q4_0Format, Q4_1Format, Q5_0Format, Q5_1Format, Q8_0Format

__all__ = ["FORMATS", "NATIVE_FORMATS", "BlockFormat", "NativeFormat", "Planes"]

NATIVE_FORMATS: dict[str, NativeFormat] = {
    f.name: f
    for f in (
        NativeFormat(bits, block_size, kind)
        for bits in NATIVE_BITS
        for block_size in NATIVE_BLOCK_SIZES
        for kind in NATIVE_KINDS
    )
}
FORMATS: dict[str, BlockFormat] = {
    f.name: f
    for f in (
        Q8_0Format(),
        Q4_0Format(),
        Q4_1Format(),
        Q5_0Format(),
        Q5_1Format(),
        Q2_KFormat(),
        Q3_KFormat(),
        Q4_KFormat(),
        Q5_KFormat(),
        Q6_KFormat(),
        IQ4_NLFormat(),
        IQ4_XSFormat(),
        *NATIVE_FORMATS.values(),
        *FOREIGN,
    )
}
