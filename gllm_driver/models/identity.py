"""Which model this is, as a digest: two models with one digest may share KV pages."""

from __future__ import annotations

import hashlib

from ..types import Tensor
from .checkpoint import Checkpoint

SAMPLES = 8  # stretches of each tensor that are read
SAMPLE_NBYTES = 64


def weights_digest(checkpoint: Checkpoint) -> bytes:
    """SHA-256 over the architecture, the table of tensors, and a sample of the bytes of each.

    Names of files and directories are left out, so a copy elsewhere is the same model. Reading all weights would take
    seconds; samples spread over every tensor tell fine-tuned and re-quantized models apart. Costs milliseconds.
    """
    digest = hashlib.sha256(b"gllm-driver weights 1\0")
    digest.update(repr(checkpoint.arch).encode())
    for slot, tensor in sorted(checkpoint.tensors.items()):
        digest.update(f"\0{slot} {tensor.dtype.name} {tensor.shape}\0".encode())
        for sample in _samples(tensor):
            digest.update(sample)
    return digest.digest()


def _samples(tensor: Tensor) -> list[bytes]:
    """Stretches at even distances, the first and the last bytes among them."""
    import ctypes

    nbytes = tensor.nbytes
    if nbytes <= SAMPLES * SAMPLE_NBYTES:
        return [ctypes.string_at(tensor.address, nbytes)]
    last = nbytes - SAMPLE_NBYTES
    return [ctypes.string_at(tensor.address + last * i // (SAMPLES - 1), SAMPLE_NBYTES) for i in range(SAMPLES)]
