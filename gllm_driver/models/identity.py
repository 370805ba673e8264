"""Which model this is, as a digest: two models with one digest may share KV pages."""

from __future__ import annotations

import ctypes
import hashlib
import os
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from ..types import Tensor
from .checkpoint import Checkpoint

SAMPLES = 8  # stretches of each tensor that are read
SAMPLE_NBYTES = 64
BLOCK = 1 << 15  # 64-bit words of a block that is summed up


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


def whole_digest(checkpoint: Checkpoint) -> bytes:
    """Like `weights_digest`, but every byte counts: for KV that outlives the process.

    A model that was tuned in a few rows only, such as the embeddings of new tokens, passes for the original by samples.
    Reads all weights, at some GB/s a thread: each block of 64-bit words is its sum with random odd weights modulo 2⁶⁴
    (a universal hash), and SHA-256 is taken over the sums.
    """
    digest = hashlib.sha256(b"gllm-driver whole weights 1\0" + weights_digest(checkpoint))
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        for sums in pool.map(_sums, (tensor for _, tensor in sorted(checkpoint.tensors.items()))):
            digest.update(len(sums).to_bytes(8, "little") + sums)
    return digest.digest()


def _sums(tensor: Tensor) -> bytes:
    """A word for each block of a tensor, the last one of them short, and the bytes after the last whole word."""
    data = np.ctypeslib.as_array((ctypes.c_uint8 * tensor.nbytes).from_address(tensor.address))
    words = data[: len(data) // 8 * 8].view("<u8")
    whole = len(words) // BLOCK * BLOCK
    weights = np.random.PCG64(1).random_raw(BLOCK) | np.uint64(1)  # its raw stream is the same in every version
    sums = words[:whole].reshape(-1, BLOCK) @ weights
    rest = words[whole:] @ weights[: len(words) - whole]
    return sums.astype("<u8").tobytes() + int(rest).to_bytes(8, "little") + data[len(words) * 8 :].tobytes()


def _samples(tensor: Tensor) -> list[bytes]:
    """Stretches at even distances, the first and the last bytes among them."""
    nbytes = tensor.nbytes
    if nbytes <= SAMPLES * SAMPLE_NBYTES:
        return [ctypes.string_at(tensor.address, nbytes)]
    last = nbytes - SAMPLE_NBYTES
    return [ctypes.string_at(tensor.address + last * i // (SAMPLES - 1), SAMPLE_NBYTES) for i in range(SAMPLES)]
