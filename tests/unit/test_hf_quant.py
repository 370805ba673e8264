"""Quantized Hugging Face checkpoints, against unpacking written element by element from the formats' descriptions."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import tiny_files
from safetensors.numpy import save_file

import gllm_driver as gllm
from gllm_driver.cli.info import describe
from gllm_driver.errors import ModelFormatError
from gllm_driver.loaders.hf_quant import PackedTensor, with_matrices
from gllm_driver.loaders.open import open_checkpoint
from gllm_driver.loaders.safetensors import read_safetensors
from gllm_driver.quant.formats import FORMATS
from gllm_driver.quant.native_file import NativeFileWriter, quantization_section
from gllm_driver.types import DTYPES, FLOAT_DTYPES, Tensor

AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
Stored = dict[str, np.ndarray]


def put(word_array: np.ndarray, index: tuple[int, ...], bit: int, value: int, bits: int) -> None:
    """Set `bits` bits from `bit` on of the words along the last axis of u32 [..., words]."""
    for i in range(bits):
        at = (*index, (bit + i) // 32)
        word_array[at] |= np.uint32((value >> i & 1) << (bit + i) % 32)


def packed(values: np.ndarray, bits: int) -> np.ndarray:
    """[..., n] → i32 [..., n · bits / 32], one stream of bits along the last axis, bit by bit."""
    words = np.zeros((*values.shape[:-1], -(-values.shape[-1] * bits // 32)), np.uint32)
    for index in np.ndindex(*values.shape[:-1]):
        for i, value in enumerate(values[index].tolist()):
            put(words, index, bits * i, value, bits)
    return words.view(np.int32)


def awq_packed(columns: np.ndarray) -> np.ndarray:
    """[n, N] → i32 [n, N / 8]: nibble p of a word is the column of eight that AWQ_ORDER names."""
    words = np.zeros((len(columns), columns.shape[1] // 8), np.uint32)
    for word in range(words.shape[1]):
        for place, column in enumerate(AWQ_ORDER):
            words[:, word] |= columns[:, 8 * word + column].astype(np.uint32) << np.uint32(4 * place)
    return words.view(np.int32)


def layer(
    kind: str, N: int, K: int, group: int, bits: int, g: np.random.Generator, **options: Any
) -> tuple[Stored, np.ndarray]:
    """The parts of one quantized matrix, and its values [N, K] in float64 from the description."""
    G = K // group
    quants = g.integers(0, 1 << bits, (N, K))
    zeros = np.full((N, G), 1 << (bits - 1)) if options.get("symmetric") else g.integers(1, 1 << bits, (N, G))
    scales = (0.02 * g.uniform(0.5, 1.5, (N, G))).astype(options.get("scale_type", np.float16))
    groups = options.get("groups", np.arange(K) // group)
    values = np.zeros((N, K))
    for k in range(K):
        values[:, k] = scales[:, groups[k]].astype(np.float64) * (quants[:, k] - zeros[:, groups[k]])
    match kind:
        case "awq":
            parts = {"qweight": awq_packed(quants.T), "qzeros": awq_packed(zeros.T), "scales": scales.T}
        case "gptq" | "gptq_v2":
            stored = zeros - (kind == "gptq")
            parts = {"qweight": packed(quants, bits).T, "qzeros": packed(stored.T, bits), "scales": scales.T}
            parts["g_idx"] = groups.astype(np.int32)
        case "pack-quantized":
            parts = {"weight_packed": packed(quants, bits), "weight_scale": scales, "weight_shape": np.array([N, K])}
            if not options.get("symmetric"):
                parts["weight_zero_point"] = packed(zeros.T, bits).T
        case "int-quantized":
            parts = {"weight": (quants - 128).astype(np.int8), "weight_scale": scales}
            if not options.get("symmetric"):
                parts["weight_zero_point"] = (zeros - 128).astype(np.int8)
        case "bitsandbytes":
            scb = (scales[:, 0].astype(np.float32) * 127).astype(np.float32)
            parts = {"weight": (quants - 128).astype(np.int8), "SCB": scb, "weight_format": np.array(0, np.uint8)}
    return {name: np.ascontiguousarray(array) for name, array in parts.items()}, values


def section(kind: str, bits: int, group: int, **options: Any) -> dict[str, Any]:
    match kind:
        case "awq":
            return {"quant_method": "awq", "bits": 4, "group_size": group, "version": "gemm", "zero_point": True}
        case "gptq" | "gptq_v2":
            desc_act = "groups" in options
            common = {"quant_method": "gptq", "bits": bits, "group_size": group, "desc_act": desc_act}
            return common if kind == "gptq" else {**common, "checkpoint_format": "gptq_v2"}
        case "pack-quantized" | "int-quantized":
            strategy = {"strategy": "group", "group_size": group} if group > 0 else {"strategy": "channel"}
            weights = {"num_bits": bits, "type": "int", "symmetric": bool(options.get("symmetric")), **strategy}
            groups = {"group_0": {"targets": ["Linear"], "weights": weights}}
            return {"quant_method": "compressed-tensors", "format": kind, "config_groups": groups}
    return {"quant_method": "bitsandbytes", "load_in_8bit": True}


def opened(folder: Path, parts: Stored, quantization: dict[str, Any]) -> Tensor:
    folder.mkdir(exist_ok=True)
    save_file({f"a.b.{name}": array for name, array in parts.items()}, folder / "model.safetensors")
    stored = read_safetensors(folder / "model.safetensors")
    found = with_matrices(stored, {"quantization_config": quantization}, folder / "config.json")
    assert set(found) == {"a.b.weight"}
    return found["a.b.weight"].open(())


def values_of(tensor: Tensor) -> np.ndarray:
    if tensor.dtype.is_quantized:
        return FORMATS[tensor.dtype.name].dequantize(tensor.to_numpy(), tensor.shape).astype(np.float64)
    return tensor.owner.view({"f16": np.float16, "bf16": ml_dtypes.bfloat16}[tensor.dtype.name]).astype(np.float64)


PERMUTED = np.random.Generator(np.random.PCG64(5)).permutation(np.arange(256) // 64)
CASES = [
    ("awq", 4, 128, {}, "int4_128z"),
    ("awq", 4, 32, {}, "int4_32z"),
    ("awq", 4, -1, {}, "int4_128z"),
    ("gptq", 4, 128, {}, "int4_128z"),
    ("gptq", 4, 64, {"symmetric": True}, "int4_64"),
    ("gptq", 3, 128, {}, "int4_128"),
    ("gptq", 2, 64, {}, "int2_64z"),
    ("gptq", 8, 32, {}, "int8_32z"),
    ("gptq", 8, 128, {"symmetric": True}, "int8_128"),
    ("gptq", 4, -1, {}, "int4_128z"),
    ("gptq", 4, 16, {}, "f16"),
    ("gptq", 4, 64, {"groups": PERMUTED}, "f16"),
    ("gptq_v2", 4, 128, {}, "int4_128z"),
    ("gptq_v2", 3, 32, {}, "int4_32"),
    ("pack-quantized", 4, 128, {}, "int4_128z"),
    ("pack-quantized", 4, 64, {"symmetric": True, "scale_type": ml_dtypes.bfloat16}, "int4_64"),
    ("pack-quantized", 8, 32, {}, "int8_32z"),
    ("pack-quantized", 8, -1, {"symmetric": True}, "int8_128"),
    ("int-quantized", 8, -1, {"symmetric": True}, "int8_128"),
    ("int-quantized", 8, -1, {}, "int8_128z"),
    ("bitsandbytes", 8, -1, {"symmetric": True, "scale_type": np.float32}, "int8_128"),
]


@pytest.mark.parametrize(("kind", "bits", "group", "options", "target"), CASES)
def test_matrices_mean_what_the_description_says(
    tmp_path: Path, kind: str, bits: int, group: int, options: dict[str, Any], target: str
) -> None:
    g = np.random.Generator(np.random.PCG64(3))
    N, K = 96, 256
    parts, expected = layer(kind, N, K, group if group > 0 else K, bits, g, **options)
    tensor = opened(tmp_path, parts, section(kind, bits, group, **options))
    assert tensor.shape == (N, K)
    assert tensor.dtype.name == target
    exact = tensor.dtype.is_quantized and kind != "bitsandbytes"
    tolerance = 1e-6 if exact else 2.0**-10  # f16 values, or scales that f16 rounds
    assert (np.abs(values_of(tensor) - expected) <= tolerance * np.abs(expected) + 1e-12).all()


def damaged(parts: Stored, how: str) -> Stored:
    match how:
        case "no scales":
            parts.pop("scales", None)
            parts.pop("weight_scale", None)
        case "no g_idx":
            parts.pop("g_idx")
        case "NaN":
            name = "scales" if "scales" in parts else "weight_scale"
            parts[name].reshape(-1)[7] = np.nan
        case "zeros":
            parts["qzeros"] = np.ascontiguousarray(parts["qzeros"][:, :-1])
        case "half":
            parts["qweight"] = np.ascontiguousarray(parts["qweight"][: len(parts["qweight"]) // 2])
        case "far group":
            parts["g_idx"][3] = 99
        case "type":
            parts["qweight"] = parts["qweight"].astype(np.int64)
    return parts


@pytest.mark.parametrize(
    ("kind", "how", "message"),
    [
        ("awq", "no scales", r"'a.b.scales': is missing"),
        ("awq", "NaN", r"'a.b.scales': has a NaN or infinite scale"),
        ("awq", "zeros", r"'a.b.qzeros': has shape \[4, 11\], expected \[4, 12\]"),
        ("awq", "half", r"expected \[2, 12\]"),
        ("awq", "type", r"'a.b.qweight': has type I64, expected I32"),
        ("gptq", "no g_idx", r"'a.b.g_idx': is missing; desc_act"),
        ("gptq", "far group", r"'a.b.g_idx': names group 99"),
        ("gptq", "NaN", r"'a.b.scales': has a NaN"),
        ("pack-quantized", "NaN", r"'a.b.weight_scale': has a NaN"),
        ("pack-quantized", "no scales", r"'a.b.weight_scale': is missing"),
    ],
)
def test_inconsistent_layers_are_one_clear_error(tmp_path: Path, kind: str, how: str, message: str) -> None:
    options = {"groups": PERMUTED} if kind == "gptq" else {}
    parts, _ = layer(kind, 96, 256, 64, 4, np.random.Generator(np.random.PCG64(3)), **options)
    with pytest.raises(ModelFormatError, match=message):
        opened(tmp_path, damaged(parts, how), section(kind, 4, 64, **options))


@pytest.mark.parametrize(
    ("quantization", "message"),
    [
        ({"quant_method": "fp8"}, r"'fp8' cannot be read; readable: AWQ"),
        ({"bits": 4}, "must be an object that names its quant_method"),
        ({"quant_method": "awq", "bits": 4, "group_size": 128, "version": "exllama"}, "'exllama' layout"),
        ({"quant_method": "awq", "bits": 8, "group_size": 128}, "bits 8, expected one of 4"),
        ({"quant_method": "gptq", "bits": 5, "group_size": 128}, "bits 5, expected one of 2, 3, 4, 8"),
        ({"quant_method": "gptq", "bits": 4, "group_size": 0}, "group_size 0"),
        ({"quant_method": "gptq", "bits": 4, "group_size": 64, "checkpoint_format": "marlin"}, "'marlin' layout"),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "nf4"),
        ({"quant_method": "compressed-tensors", "format": "float-quantized", "config_groups": {"a": {}}}, "float-quan"),
        ({"quant_method": "compressed-tensors"}, "no config_groups"),
    ],
)
def test_what_cannot_be_read_is_said(quantization: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelFormatError, match=message):
        with_matrices({}, {"quantization_config": quantization}, Path("config.json"))


MODELS = [("awq", 4, 32, {}), ("gptq", 4, 64, {}), ("gptq", 3, 32, {}), ("pack-quantized", 4, 64, {"symmetric": True})]
MODELS += [("int-quantized", 8, -1, {"symmetric": True}), ("bitsandbytes", 8, -1, {"symmetric": True})]


@pytest.mark.parametrize(("kind", "bits", "group", "options"), MODELS)
def test_a_model_gives_the_logits_of_its_dequantized_weights(
    tmp_path: Path, kind: str, bits: int, group: int, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    g = np.random.Generator(np.random.PCG64(3))
    plain, quantized = {}, {}
    for name, shape in tiny_files.hf_shapes().items():
        if "proj" not in name:
            plain[name] = quantized[name] = (g.standard_normal(shape) * 0.12 + (len(shape) == 1)).astype(np.float32)
            continue
        N, K = shape
        parts, values = layer(kind, N, K, group if group > 0 else K, bits, g, **options)
        quantized |= {name.replace("weight", part): array for part, array in parts.items()}
        plain[name] = values.astype(np.float32)
        if kind == "gptq":
            quantized[name.replace("weight", "bias")] = np.zeros(N, np.float16)
    tiny_files.write_hf(tmp_path / "plain", tensors=plain)
    config = {**tiny_files.CONFIG, "quantization_config": section(kind, bits, group, **options)}
    tiny_files.write_hf(tmp_path / "quantized", config, quantized)
    check_same_logits(tmp_path, monkeypatch)


def check_same_logits(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Within what activations in int8 do, and, with the weights repacked to f16, nearly exactly."""

    def logits(name: str) -> np.ndarray:
        with gllm.load(folder / name, device="cpu", threads=2) as llm:
            return llm.logits([1, 5, 90, 17, 44, 2])

    plain, native = logits("plain"), logits("quantized")
    monkeypatch.setattr("gllm_driver.backends.cpu.CpuBackend.weight_dtypes", FLOAT_DTYPES)
    repacked = logits("quantized")
    for found, tolerance in ((native, 0.05), (repacked, 2e-3)):
        assert np.sqrt(np.square(found - plain).mean()) < tolerance * plain.std()


@pytest.mark.parametrize("name", ["int8_64", "int4_64z", "int4_32m", "int2_64m", "int1_32z"])
def test_native_files_round_trip(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    g = np.random.Generator(np.random.PCG64(3))
    types = {n: DTYPES[name if "proj" in n else "f32"] for n in tiny_files.hf_shapes()}
    plain: Stored = {}
    data: Stored = {}
    for tensor, shape in tiny_files.hf_shapes().items():
        values = (g.standard_normal(shape) * 0.12 + (len(shape) == 1)).astype(np.float32)
        data[tensor] = FORMATS[name].quantize(values) if "proj" in tensor else values
        plain[tensor] = FORMATS[name].dequantize(data[tensor], shape) if "proj" in tensor else values
    tiny_files.write_hf(tmp_path / "plain", tensors=plain)
    config = {**tiny_files.CONFIG, "quantization_config": quantization_section(types)}
    tiny_files.write_hf(tmp_path / "quantized", config)
    path = tmp_path / "quantized" / "model.safetensors"
    with NativeFileWriter(path, {n: (types[n], s) for n, s in tiny_files.hf_shapes().items()}) as writer:
        for tensor, array in data.items():
            writer.write(tensor, array)
    found = with_matrices(read_safetensors(path), config, path)
    for tensor in data:
        assert found[tensor].dtype is types[tensor]
        assert np.array_equal(found[tensor].open(()).to_numpy().reshape(-1), data[tensor].reshape(-1))
    check_same_logits(tmp_path, monkeypatch)


def test_a_native_file_that_is_not_finished_leaves_nothing(tmp_path: Path) -> None:
    tensors = {"a": (DTYPES["int4_32"], (2, 32)), "b": (DTYPES["f32"], (3,))}
    for name, data, message in (
        ("a", np.zeros((2, 18), np.uint8), "1 tensors were not written, the first is b"),
        ("b", np.zeros(3, np.float32), "b is not the next tensor"),
        ("a", np.zeros(18, np.uint8), "a has 36 bytes, got 18"),
    ):
        writer = NativeFileWriter(tmp_path / "m.safetensors", tensors)
        with pytest.raises(ValueError, match=message), writer:
            writer.write(name, data)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("types", "message"),
    [
        ({"a.weight": "int5_32"}, "unknown type 'int5_32'"),
        ({"a.weight": "f16"}, "unknown type 'f16'"),
        ({"b.weight": "int4_32"}, "is not there"),
        ({"a.weight": "int8_32"}, r"U8 \[2, 18\], no rows of int8_32 blocks"),
    ],
)
def test_native_files_whose_config_does_not_fit(tmp_path: Path, types: dict[str, str], message: str) -> None:
    save_file({"a.weight": np.zeros((2, 18), np.uint8)}, tmp_path / "m.safetensors")
    config = {"quantization_config": {"quant_method": "gllm", "version": 1, "tensors": types}}
    with pytest.raises(ModelFormatError, match=message):
        with_matrices(read_safetensors(tmp_path / "m.safetensors"), config, tmp_path / "config.json")


def test_describing_a_model_converts_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    g = np.random.Generator(np.random.PCG64(3))
    tensors: Stored = {}
    for name, (N, *K) in tiny_files.hf_shapes().items():
        if "proj" not in name:
            tensors[name] = np.ones((N, *K), np.float32)
            continue
        parts, _ = layer("awq", N, K[0], 32, 4, g)
        tensors |= {name.replace("weight", part): array for part, array in parts.items()}
    tiny_files.write_hf(tmp_path, {**tiny_files.CONFIG, "quantization_config": section("awq", 4, 32)}, tensors)
    monkeypatch.setattr(PackedTensor, "open", None)
    facts = describe(open_checkpoint(tmp_path, describe_only=True))
    assert facts["tensor_types"]["int4_32z"]["tensors"] == 14
    assert facts["tensor_types"]["int4_32z"]["bits_per_weight"] == 5
