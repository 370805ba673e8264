"""What the loader makes of every tiny model, from its directory and from its GGUF, without running anything: sizes,
windows, rotary frequencies and every weight must be those the model was built with."""

from __future__ import annotations

import ctypes
from pathlib import Path

import gguf
import ml_dtypes
import numpy as np
import pytest
from oracle import alibi_models, numpy_model, tiny_models, to_gguf

from gllm_driver.loaders.open import open_checkpoint
from gllm_driver.models.checkpoint import Checkpoint
from gllm_driver.models.rope import rope_inv_freq
from gllm_driver.types import Tensor

ROWS = [pytest.param(row, id=row.name) for row in tiny_models.ROWS]
GGUF_ROWS = [pytest.param(row, id=row.name) for row in tiny_models.ROWS if row.gguf]
_NUMPY = {"f32": np.float32, "f16": np.float16, "bf16": ml_dtypes.bfloat16}
_GGML = {"q8_0": gguf.GGMLQuantizationType.Q8_0, "q4_0": gguf.GGMLQuantizationType.Q4_0}


def _to_f32(tensor: Tensor) -> np.ndarray:
    data = np.frombuffer(ctypes.string_at(tensor.address, tensor.nbytes), dtype=np.uint8)
    if tensor.dtype.name in _GGML:
        return gguf.quants.dequantize(data.reshape(tensor.num_rows, -1), _GGML[tensor.dtype.name])
    return data.view(_NUMPY[tensor.dtype.name]).astype(np.float32).reshape(tensor.shape)


def _check_alibi_arch(row: tiny_models.Row, checkpoint: Checkpoint) -> None:
    arch, is_bloom = checkpoint.arch, row.family == "bloom"
    *sizes, kv_heads = row.sizes
    assert [arch.vocab_size, arch.hidden_size, arch.intermediate_size, arch.num_layers, arch.num_heads] == sizes
    assert (arch.num_kv_heads, arch.head_dim, arch.rotary_dim) == (kv_heads, sizes[1] // sizes[4], 0)
    assert (arch.norm, arch.norm_bias, arch.embed_norm, arch.gated_mlp) == ("layer", is_bloom, is_bloom, False)
    assert arch.norm_eps == pytest.approx(1e-5)
    assert (arch.qkv_bias, arch.o_bias, arch.mlp_bias) == (is_bloom,) * 3
    assert (arch.activation, arch.alibi_max_bias) == ("gelu_tanh" if is_bloom else "gelu", 8.0)
    assert arch.tie_word_embeddings
    assert arch.context_length == 512


def _check_arch(row: tiny_models.Row, checkpoint: Checkpoint) -> None:
    if row.family in alibi_models.FAMILIES:
        _check_alibi_arch(row, checkpoint)
        return
    config, arch = tiny_models.config(row), checkpoint.arch
    head_dim = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    *sizes, kv_heads = row.sizes
    assert [arch.vocab_size, arch.hidden_size, arch.intermediate_size, arch.num_layers, arch.num_heads] == sizes
    assert (arch.num_kv_heads, arch.head_dim, arch.rotary_dim) == (kv_heads, head_dim, head_dim)
    assert arch.norm_eps == pytest.approx(config["rms_norm_eps"], rel=1e-6)
    assert arch.tie_word_embeddings is config.get("tie_word_embeddings", False)
    assert [arch.window(i) for i in range(arch.num_layers)] == [
        numpy_model.window(config, i) or 0 for i in range(arch.num_layers)
    ]
    factors = checkpoint.tensors.get("rope_factors")
    found, found_factor = rope_inv_freq(arch, None if factors is None else _to_f32(factors), 64)
    expected, expected_factor = numpy_model.frequencies(config, head_dim)
    np.testing.assert_allclose(found, expected, rtol=1e-6)  # GGUF keeps its numbers in f32
    assert found_factor == pytest.approx(expected_factor, rel=1e-6)


def _part(row: tiny_models.Row, slot: str, stored: np.ndarray, *, by_head: bool) -> np.ndarray:
    """What the slot should hold of the tensor it lies in: all of it, or a third of the rows (of each head)."""
    part = slot.rsplit(".")[-1].removesuffix("_bias")
    if row.family not in alibi_models.FAMILIES or part not in ("q", "k", "v"):
        return stored
    groups = stored.reshape(row.sizes[4] if by_head else 1, 3, -1, *stored.shape[1:])
    return groups[:, "qkv".index(part)].reshape(-1, *stored.shape[1:])


@pytest.mark.parametrize("row", ROWS)
def test_directory(row: tiny_models.Row, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(tiny_models.build(row, tmp_path / "model"))
    _check_arch(row, checkpoint)
    weights = tiny_models.weights(row)
    assert set(checkpoint.sources.values()) == set(weights)
    for slot, name in checkpoint.sources.items():
        assert checkpoint.tensors[slot].dtype.name == row.dtype
        expected = _part(row, slot, weights[name].astype(np.float32), by_head=row.family == "bloom")
        np.testing.assert_array_equal(_to_f32(checkpoint.tensors[slot]), expected, name)


@pytest.mark.parametrize("row", GGUF_ROWS)
def test_gguf(row: tiny_models.Row, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(to_gguf.convert(row, tmp_path / "model.gguf"))
    _check_arch(row, checkpoint)
    stored = {tensor.name: tensor.data for tensor in gguf.GGUFReader(checkpoint.path).tensors}
    assert set(checkpoint.sources.values()) == set(stored)
    for slot, name in checkpoint.sources.items():
        expected = _part(row, slot, stored[name], by_head=False)
        np.testing.assert_array_equal(_to_f32(checkpoint.tensors[slot]), expected, name)


@pytest.mark.parametrize("file_type", ["f16", "bf16", "q8_0", "q4_0"])
def test_gguf_types(file_type: to_gguf.FileType, tmp_path: Path) -> None:
    row = tiny_models.BY_NAME["qwen3_tied"]  # whose rows GGUF does not reorder
    path = to_gguf.convert(row, tmp_path / "model.gguf", file_type)
    checkpoint, expected = open_checkpoint(path), to_gguf.dequantized(row, path)
    names = {to_gguf.gguf_name(name): name for name in expected}
    for slot, name in checkpoint.sources.items():
        tensor = checkpoint.tensors[slot]
        assert tensor.dtype.name == ("f32" if len(tensor.shape) == 1 else file_type)
        np.testing.assert_array_equal(_to_f32(tensor), expected[names[name]], name)
