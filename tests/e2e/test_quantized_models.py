"""A tiny model in every quantized format there is, on the CPU: its logits are those of its dequantized weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import tiny_files

import gllm_driver as gllm
from gllm_driver.errors import ModelFormatError
from gllm_driver.loaders.ggml_types import TENSOR_TYPES
from gllm_driver.quant.formats import FORMATS

TOKENS = [1, 5, 90, 17, 44, 2, 3, 60, 61]
TYPES = [name for name, dtype in TENSOR_TYPES.values() if dtype is not None and dtype.is_quantized]
KEYS = tiny_files.GGUF_KEYS | {"llama.embedding_length": 256, "llama.feed_forward_length": 512}


def shapes() -> dict[str, tuple[int, ...]]:
    """The tiny Llama with rows of whole blocks of 256."""
    wider = {tiny_files.HIDDEN: 256, tiny_files.FFN: 512}
    found = {}
    for name, shape in tiny_files.gguf_shapes().items():
        if "attn_output" in name:
            shape = (64, 64)
        found[name] = tuple(wider.get(n, n) for n in shape)
    q, kv = 4 * 64, 2 * 64  # heads of 64, so that rows of the output projection are 256 as well
    for name in found:
        if name.endswith(("attn_q.weight", "attn_k.weight", "attn_v.weight", "attn_output.weight")):
            found[name] = {"q": (q, 256), "k": (kv, 256), "v": (kv, 256), "o": (256, q)}[name.split("attn_")[1][0]]
    return found


def blocks(type_name: str, shape: tuple[int, int], g: np.random.Generator) -> np.ndarray:
    """Packed rows u8 [N, row_nbytes]: encoded values, or random blocks of small scale where nothing encodes."""
    dtype = next(d for n, d in TENSOR_TYPES.values() if n == type_name)
    assert dtype is not None
    fmt = FORMATS[dtype.name]
    if fmt.can_encode:
        return fmt.quantize((g.standard_normal(shape) * shape[1] ** -0.5).astype(np.float32))
    data = g.integers(0, 256, (shape[0] * shape[1] // fmt.block_size, fmt.block_nbytes)).astype(np.uint8)
    for offset in fmt.scale_offsets:
        data[:, offset : offset + 2] = np.array([1.0], "<f2").view(np.uint8)
    if type_name == "IQ1_M":  # the nibbles of its scale: 1.0
        for byte, nibble in ((49, 0), (51, 0), (53, 0xC0), (55, 0x30)):
            data[:, byte] = data[:, byte] & 15 | nibble
    if type_name == "MXFP4":
        data[:, 0] = 128
    if type_name == "NVFP4":
        data[:, :4] = 56
    size = np.abs(fmt.dequantize(data.reshape(-1), (len(data), fmt.block_size))).std()
    scale = np.float16(shape[1] ** -0.5 / 2 / size)
    for offset in fmt.scale_offsets:
        data[:, offset : offset + 2] = np.array([scale], "<f2").view(np.uint8)
    if type_name == "MXFP4":
        data[:, 0] = 128 - 7
    if type_name == "NVFP4":
        data[:, :4] = 8
    if type_name == "IQ1_M":
        bits = int(np.array([scale], "<f2").view(np.uint16)[0])
        for i, byte in enumerate((49, 51, 53, 55)):
            data[:, byte] = data[:, byte] & 15 | (bits >> 4 * i & 15) << 4
    return data.reshape(shape[0], -1)


def write(folder: Path, type_names: dict[str, str] | str) -> tuple[Path, Path]:
    """A model with packed matrices (one type, or a type by the end of the name), and the same in f32."""
    g = np.random.Generator(np.random.PCG64(7))
    packed, plain = gguf.GGUFWriter(folder / "packed.gguf", "llama"), gguf.GGUFWriter(folder / "f32.gguf", "llama")
    folder.mkdir(exist_ok=True)
    for writer in (packed, plain):
        add_keys(writer)
    for name, shape in shapes().items():
        if len(shape) == 1:
            norm = (1 + 0.1 * g.standard_normal(shape)).astype(np.float32)
            packed.add_tensor(name, norm)
            plain.add_tensor(name, norm)
            continue
        kind = type_names if isinstance(type_names, str) else next(t for n, t in type_names.items() if n in name)
        data = blocks(kind, (shape[0], shape[1]), g)
        type_id, dtype = next((i, d) for i, (n, d) in TENSOR_TYPES.items() if n == kind)
        packed.add_tensor(name, data, raw_dtype=gguf.GGMLQuantizationType(type_id))
        assert dtype is not None
        plain.add_tensor(name, FORMATS[dtype.name].dequantize(data, shape))
    for writer in (packed, plain):
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    return folder / "packed.gguf", folder / "f32.gguf"


def add_keys(writer: Any) -> None:
    for key, value in KEYS.items():
        if isinstance(value, bool):
            writer.add_bool(key, value)
        elif isinstance(value, int):
            writer.add_uint32(key, value)
        elif isinstance(value, float):
            writer.add_float32(key, value)
        elif isinstance(value, str):
            writer.add_string(key, value)
        else:
            writer.add_array(key, value)


def logits_of(path: Path) -> np.ndarray:
    with gllm.load(path, device="cpu", threads=2) as llm:
        return llm.logits(TOKENS)


def check_close(packed: np.ndarray, plain: np.ndarray) -> None:
    """Within what int8 activations do: their steps are 1/127 of a block's largest, twelve products in a row."""
    assert np.isfinite(plain).all()
    assert plain.std() > 1e-3
    assert np.sqrt(np.square(packed - plain).mean()) < 0.03 * plain.std()


@pytest.mark.parametrize("type_name", TYPES)
def test_every_gguf_type(tmp_path: Path, type_name: str) -> None:
    packed, plain = write(tmp_path, type_name)
    check_close(logits_of(packed), logits_of(plain))


def test_mixed_types_in_a_file(tmp_path: Path) -> None:
    mixed = {
        "attn_v": "Q6_K",
        "ffn_down": "Q5_0",
        "attn": "Q4_K",
        "ffn": "IQ2_S",
        "token_embd": "Q3_K",
        "output": "Q8_0",
    }
    packed, plain = write(tmp_path, mixed)
    check_close(logits_of(packed), logits_of(plain))


def test_a_bad_scale_in_a_repacked_type_is_named(tmp_path: Path) -> None:
    path, _ = write(tmp_path, "IQ2_XS")
    tensor = next(t for t in gguf.GGUFReader(path).tensors if t.name == "blk.1.ffn_up.weight")
    data = bytearray(path.read_bytes())
    data[tensor.data_offset : tensor.data_offset + 2] = b"\x00\x7e"
    path.write_bytes(data)
    with pytest.raises(ModelFormatError, match=r"'blk\.1\.ffn_up\.weight'.*NaN or infinite value at element 0"):
        gllm.load(path, device="cpu")
