"""Which model it is: the same wherever the file lies, another as soon as a weight differs."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np

import gllm_driver.llm as llm
from gllm_driver.loaders.open import open_checkpoint
from gllm_driver.models.identity import weights_digest
from gllm_driver.types import Tensor


def test_a_copy_is_the_same_model(tmp_path: Path) -> None:
    copy = tmp_path / "another name.gguf"
    copy.write_bytes(llm.demo_model_path().read_bytes())
    original = weights_digest(open_checkpoint(llm.demo_model_path(), progress=False))
    assert weights_digest(open_checkpoint(copy, progress=False)) == original
    assert len(original) == 32


def test_other_weights_or_numbers_are_another_model() -> None:
    checkpoint = open_checkpoint(llm.demo_model_path(), progress=False)
    norm = checkpoint.tensors["layers.0.attn_norm"]
    values = norm.to_numpy().copy()
    values[-1] = np.nextafter(values[-1], 2, dtype=values.dtype)
    tuned = replace(checkpoint, tensors={**checkpoint.tensors, "layers.0.attn_norm": Tensor.from_numpy(values)})
    same = replace(checkpoint, tensors={**checkpoint.tensors, "layers.0.attn_norm": Tensor.from_numpy(norm.to_numpy())})
    other_arch = replace(checkpoint, arch=replace(checkpoint.arch, rope_theta=checkpoint.arch.rope_theta * 2))
    digests = [weights_digest(c) for c in (checkpoint, tuned, other_arch)]
    assert len(set(digests)) == 3
    assert weights_digest(same) == digests[0]
