"""The weights of a model in types that a backend computes."""

from __future__ import annotations

from collections.abc import Collection

from ..errors import ModelFormatError
from ..quant.repack import BadWeights, repack, repacked_dtype
from ..types import Tensor
from .base import ModelWeights, Progress


def repacked_weights(
    model: ModelWeights, computed: Collection[str], dtype: str, workers: int, progress: Progress | None
) -> dict[str, Tensor]:
    """The model's tensors by slot: those of types in `computed` as they are, others repacked, one after the other.

    Raises ModelFormatError for NaN and infinite scales of the latter, with the tensor's name.
    """
    strange = {t.address: t for t in model.tensors.values() if repacked_dtype(t.dtype, computed, dtype) is not t.dtype}
    total, done = sum(t.nbytes for t in strange.values()), 0
    made: dict[int, Tensor] = {}
    for slot, tensor in model.tensors.items():
        if tensor.address in strange and tensor.address not in made:
            try:
                made[tensor.address] = repack(tensor, computed, dtype, workers)
            except BadWeights as error:
                problem = f"has a {error}: the file is damaged or was written wrongly"
                raise ModelFormatError(problem, path=model.path, tensor=model.sources.get(slot, slot)) from None
            done += tensor.nbytes
            if progress:
                progress("load", done, total)
    return {slot: made.get(t.address, t) for slot, t in model.tensors.items()}
