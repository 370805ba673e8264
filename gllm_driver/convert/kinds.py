"""Types by the names users give them, and which file can hold which."""

from __future__ import annotations

from ..errors import RequestError
from ..loaders.ggml_types import TENSOR_TYPES
from ..quant.formats import FORMATS, NATIVE_FORMATS
from ..types import DTYPES, FLOAT_DTYPES, DType, native_name

# Types a GGUF file can hold, by our names, with ggml's id. q1_0 is int1_128.
GGUF_IDS: dict[str, int] = {
    dtype.name: type_id
    for type_id, (_, dtype) in TENSOR_TYPES.items()
    if dtype is not None and (dtype.name in FLOAT_DTYPES or FORMATS[dtype.name].can_encode)
}
_GGUF_NAMES = {TENSOR_TYPES[type_id][0].lower(): name for name, type_id in GGUF_IDS.items()}
# What int8, int4, int2 and int1 mean: the block size and kind that lose least for their bits on small models.
_SHORT = {"int8": (8, 32, ""), "int4": (4, 64, "m"), "int2": (2, 64, "m"), "int1": (1, 64, "m")}
BLOCK_SIZES = (32, 64, 128)


def is_gguf_name(name: str) -> bool:
    """Whether this is the name of a type of GGUF files."""
    return name in _GGUF_NAMES


def gguf_types() -> str:
    """The names of all types of GGUF files."""
    return ", ".join(sorted(_GGUF_NAMES))


def dtype_named(name: str, block: int | None = None) -> DType:
    """The type a user means; `block` is the block size for int8, int4, int2 and int1.

    Raises RequestError for an unknown type, and for a block size where the type has its own.
    """
    if name in _SHORT:
        bits, size, kind = _SHORT[name]
        return DTYPES[native_name(bits, block or size, kind)]
    if name not in _GGUF_NAMES and name not in NATIVE_FORMATS:
        raise RequestError(f"the type {name!r} is unknown; known: {known_types()}")
    if block is not None:
        raise RequestError(f"a block size goes with {', '.join(_SHORT)}; blocks of {name} have their own")
    return DTYPES[_GGUF_NAMES.get(name, name)]


def known_types() -> str:
    """All names, for help and errors."""
    return f"{', '.join(_SHORT)}, int{{8,4,2,1}}_{{32,64,128}}{{,z,m}}, {gguf_types()}"


def bits_per_weight(dtype: DType) -> float:
    """Bits of an element, scales included."""
    return 8 * dtype.block_nbytes / dtype.block_size


def stored_bits(dtype: DType) -> int:
    """Bits of a quant alone: 2 for q2_k."""
    return int(bits_per_weight(dtype) if dtype.name not in NATIVE_FORMATS else NATIVE_FORMATS[dtype.name].bits)
