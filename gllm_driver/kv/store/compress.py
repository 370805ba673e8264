"""Lossless compression of bodies. The packages are optional, and an unpacked size is known before anything is unpacked.

The bytes of floats compress better apart: all lowest bytes first, then all next ones (the shuffle of HDF5 and Blosc).
"""

from __future__ import annotations

import importlib.util

import numpy as np

from ...errors import RequestError, StoreError

_PACKAGES = {"zstd": "zstandard", "lz4": "lz4"}
_ZSTD_LEVEL = 1  # KV is nearly noise: higher levels take longer and gain nothing


def require(compression: str) -> None:
    """Raise RequestError unless the package of a compression is installed."""
    package = _PACKAGES.get(compression)
    if package is not None and importlib.util.find_spec(package) is None:
        raise RequestError(
            f"KV compression {compression} needs the package {package}: pip install 'gllm-driver[{compression}]'"
        )


def compress(body: np.ndarray, compression: str, width: int) -> np.ndarray | None:
    """The body in fewer bytes, u8; None if they are not fewer. `width`: bytes of a number in it."""
    shuffled = np.ascontiguousarray(body.reshape(-1, width).T).data
    if compression == "zstd":
        import zstandard

        packed = zstandard.ZstdCompressor(level=_ZSTD_LEVEL, write_checksum=False).compress(shuffled)
    else:
        import lz4.block

        packed = lz4.block.compress(shuffled, store_size=False)
    return np.frombuffer(packed, np.uint8) if len(packed) < body.nbytes else None


def decompress(data: memoryview, compression: str, nbytes: int, width: int) -> np.ndarray:
    """Exactly `nbytes`, u8. Allocates no more than a small multiple of that. Raises StoreError."""
    if importlib.util.find_spec(_PACKAGES[compression]) is None:
        raise StoreError("compression", f"{compression} needs the package {_PACKAGES[compression]}")
    raw = _unzstd(data, nbytes) if compression == "zstd" else _unlz4(data, nbytes)
    if len(raw) != nbytes:
        raise StoreError("compression", f"unpacks to {len(raw)} bytes, not {nbytes}")
    return np.frombuffer(raw, np.uint8).reshape(width, -1).T.reshape(-1)


def _unzstd(data: memoryview, nbytes: int) -> bytes:
    import zstandard

    try:
        frame = zstandard.get_frame_parameters(data)
        if frame.content_size != nbytes:
            raise StoreError("compression", f"a frame of {frame.content_size} bytes, wanted {nbytes}")
        return zstandard.ZstdDecompressor().decompress(data, max_output_size=nbytes, allow_extra_data=False)
    except zstandard.ZstdError as error:
        raise StoreError("compression", str(error)) from error


def _unlz4(data: memoryview, nbytes: int) -> bytes:
    import lz4.block

    try:
        return bytes(lz4.block.decompress(data, uncompressed_size=nbytes))
    except (lz4.block.LZ4BlockError, ValueError) as error:
        raise StoreError("compression", str(error)) from error
