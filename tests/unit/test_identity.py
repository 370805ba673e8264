"""Which model it is: the same wherever the file lies, another as soon as a weight differs."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np

import gllm_driver.llm as llm
from gllm_driver.loaders.open import open_checkpoint
from gllm_driver.models.identity import BLOCK, weights_digest, whole_digest
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


def test_the_whole_digest_sees_any_byte() -> None:
    """Sizes around a block and a word; samples alone would miss most of these changes."""
    checkpoint = open_checkpoint(llm.demo_model_path(), progress=False)
    for size in (1, 7, 8, 4096, 8 * BLOCK - 1, 8 * BLOCK, 8 * BLOCK + 1, 24 * BLOCK + 13):
        data = np.random.default_rng(size).integers(0, 256, size, np.uint8)

        def digest(values: np.ndarray) -> bytes:
            return whole_digest(replace(checkpoint, tensors={"x": Tensor.from_numpy(values)}))

        original = digest(data)
        assert digest(data.copy()) == original
        for at in {0, size // 3, size // 2, size - 1}:
            for bit in (1, 128):
                changed = data.copy()
                changed[at] ^= bit
                assert digest(changed) != original
        if size > 16:
            assert digest(np.roll(data, 8)) != original


def test_samples_miss_what_the_whole_digest_sees() -> None:
    checkpoint = open_checkpoint(llm.demo_model_path(), progress=False)
    embed = checkpoint.tensors["embed"]
    tuned = embed.to_numpy().copy()
    tuned[embed.shape[0] // 5] ^= 1  # the row of one token
    other = replace(
        checkpoint, tensors={**checkpoint.tensors, "embed": Tensor.from_numpy(tuned, embed.dtype, embed.shape)}
    )
    assert weights_digest(other) == weights_digest(checkpoint)
    assert whole_digest(other) != whole_digest(checkpoint)
