"""Reading GGUF: every value type, every tensor type, and every way the structure can be wrong."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from tiny_files import GGUF_KEYS, gguf_shapes, tensors_of, write_gguf

from gllm_driver.errors import ModelFormatError
from gllm_driver.loaders.ggml_types import READABLE, TENSOR_TYPES
from gllm_driver.loaders.gguf import read_gguf


def string(text: str | bytes) -> bytes:
    data = text.encode() if isinstance(text, str) else text
    return struct.pack("<Q", len(data)) + data


def pair(key: str | bytes, type_id: int, value: bytes) -> bytes:
    return string(key) + struct.pack("<I", type_id) + value


def described(name: str, dims: list[int], type_id: int = 0, offset: int = 0) -> bytes:
    return string(name) + struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, type_id, offset)


def raw(path: Path, pairs: list[bytes], tensors: list[bytes], data: int = 0, version: int = 3, **counts: int) -> Path:
    head = b"GGUF" + struct.pack(
        "<IQQ", version, counts.get("num_tensors", len(tensors)), counts.get("num_pairs", len(pairs))
    )
    body = head + b"".join(pairs) + b"".join(tensors)
    path.write_bytes(body + bytes(-len(body) % 32 + data))
    return path


def test_types_are_those_of_the_gguf_package() -> None:
    for type_id, (name, dtype) in TENSOR_TYPES.items():
        kind = gguf.GGMLQuantizationType(type_id)
        assert kind.name == name
        if dtype is not None:
            assert gguf.GGML_QUANT_SIZES[kind] == (dtype.block_size, dtype.block_nbytes)
    assert set(TENSOR_TYPES) == set(gguf.GGMLQuantizationType)


def test_every_kind_of_value(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "llama")
    writer.add_uint8("u8", 200)
    writer.add_int8("i8", -100)
    writer.add_uint16("u16", 60000)
    writer.add_int16("i16", -30000)
    writer.add_uint32("u32", 4_000_000_000)
    writer.add_int32("i32", -2_000_000_000)
    writer.add_uint64("u64", 2**63 + 1)
    writer.add_int64("i64", -(2**62))
    writer.add_float32("f32", 0.5)
    writer.add_float64("f64", 0.1)
    writer.add_bool("yes", True)
    writer.add_string("text", "héllo\n😀")
    writer.add_array("strings", ["", "a", "日本", "x" * 1000])
    writer.add_array("ints", [1, -2, 3])
    writer.add_array("floats", [1.0, -0.5])
    writer.add_array("flags", [True, False, True])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    metadata = read_gguf(tmp_path / "m.gguf").metadata
    arrays = {key: metadata.pop(key) for key in ("ints", "floats", "flags")}
    assert metadata == {
        "general.architecture": "llama",
        "u8": 200,
        "i8": -100,
        "u16": 60000,
        "i16": -30000,
        "u32": 4_000_000_000,
        "i32": -2_000_000_000,
        "u64": 2**63 + 1,
        "i64": -(2**62),
        "f32": 0.5,
        "f64": 0.1,
        "yes": True,
        "text": "héllo\n😀",
        "strings": ["", "a", "日本", "x" * 1000],
    }
    assert type(metadata["yes"]) is bool
    assert {key: value.tolist() for key, value in arrays.items()} == {
        "ints": [1, -2, 3],
        "floats": [1.0, -0.5],
        "flags": [True, False, True],
    }


def test_strings_that_are_not_utf8_stay_recoverable(tmp_path: Path) -> None:
    path = raw(tmp_path / "m.gguf", [pair("k", 8, string(b"a\xff\xfe"))], [])
    assert read_gguf(path).metadata["k"].encode("utf-8", "surrogateescape") == b"a\xff\xfe"


@pytest.mark.parametrize("version", [2, 3])
@pytest.mark.parametrize("quantize", [None, "F16", "BF16", "Q8_0", "Q4_0"])
def test_tensors_are_the_bytes_that_were_written(tmp_path: Path, quantize: str | None, version: int) -> None:
    path = tmp_path / "m.gguf"
    written = write_gguf(path, quantize=quantize)
    data = bytearray(path.read_bytes())
    data[4:8] = struct.pack("<I", version)  # version 2 has the same layout
    path.write_bytes(data)
    tensors = read_gguf(path).tensors
    assert tensors.keys() == written.keys()
    for name, array in written.items():
        tensor = tensors[name].open(READABLE)
        kind = "F32" if quantize is None or array.ndim == 1 else quantize
        assert (tensor.shape, tensor.dtype.name.upper()) == (array.shape, kind)
        expected = gguf.quants.quantize(array, gguf.GGMLQuantizationType[kind]).tobytes()
        assert tensor.owner.tobytes() == expected
        assert tensor.address % 32 == 0


def test_alignment_of_the_file_is_followed(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_custom_alignment(128)
    values = np.arange(5, dtype=np.float32)
    writer.add_tensor("a", values)
    writer.add_tensor("b", values + 5)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    tensors = read_gguf(path).tensors
    assert tensors["a"].offset % 128 == 0
    assert tensors["b"].offset - tensors["a"].offset == 128
    assert tensors["b"].open(READABLE).owner.view(np.float32).tolist() == [5, 6, 7, 8, 9]


def test_unreadable_types_are_named(tmp_path: Path) -> None:
    path = raw(tmp_path / "m.gguf", [], [described("blk.0.attn_q.weight", [256], 15)], data=292)
    with pytest.raises(ModelFormatError, match=r"'blk.0.attn_q.weight': has type Q8_K.*F32, F16, Q4_0, Q4_1.*Q4_K"):
        read_gguf(path).tensors["blk.0.attn_q.weight"].open(READABLE)


U32_PAIR = pair("k", 4, struct.pack("<I", 1))


@pytest.mark.parametrize(
    ("pairs", "tensors", "options", "problem"),
    [
        ([], [], {"version": 1}, "version 1; versions 2 and 3"),
        ([], [], {"version": 4}, "version 4"),
        ([], [], {"version": 0x03000000}, "big-endian"),
        ([], [], {"version": 0}, "version 0"),
        ([], [], {"num_pairs": 2**40}, "claims 1099511627776 key-value pairs"),
        ([], [], {"num_tensors": 2**63}, "claims 9223372036854775808 tensors"),
        ([U32_PAIR, U32_PAIR], [], {}, "'k' occurs twice"),
        ([pair(b"\xff", 4, bytes(4))], [], {}, "a key is not UTF-8"),
        ([pair("k", 13, bytes(4))], [], {}, "unknown value type 13"),
        ([pair("k", 9, struct.pack("<IQ", 9, 1))], [], {}, "array of type 9"),
        ([pair("k", 9, struct.pack("<IQ", 0, 2**40))], [], {}, "claims 1099511627776 values"),
        ([pair("k", 9, struct.pack("<IQ", 12, 2**61))], [], {}, "claims .* values"),
        ([pair("k", 9, struct.pack("<IQ", 8, 2**60))], [], {}, "claims .* strings"),
        ([pair("k", 9, struct.pack("<IQQ", 8, 1, 2**63))], [], {}, "strings of k run past the end"),
        ([pair("k", 9, struct.pack("<IQQ", 8, 1, 2**64 - 1))], [], {}, "strings of k run past the end"),
        ([pair("k", 8, struct.pack("<Q", 2**64 - 1))], [], {}, "needs 18446744073709551615 bytes"),
        ([pair("general.alignment", 4, struct.pack("<I", 48))], [], {}, "power of two"),
        ([pair("general.alignment", 4, bytes(4))], [], {}, "power of two"),
        ([pair("general.alignment", 8, string("x"))], [], {}, "power of two"),
        ([], [described("a", [4]), described("a", [4])], {"data": 16}, "'a', at byte 57: is described twice"),
        ([], [described("a", [1] * 5)], {"data": 4}, "5 axes"),
        ([], [described("a", [4, 0])], {"data": 4}, r"shape \[0, 4\]"),
        ([], [described("a", [2**63])], {"data": 4}, "shape"),
        ([], [described("a", [2**62, 2**62, 2**62, 2**62])], {"data": 4}, "the file at byte"),
        ([], [described("a", [4], 0, 16)], {"data": 32}, "no multiple of 32"),
        ([], [described("a", [4], 0, 2**63)], {"data": 32}, "the file at byte"),
        ([], [described("a", [4], 5)], {"data": 32}, "unknown ggml type 5"),
        ([], [described("a", [4], 12, 2**40)], {"data": 32}, "the file at byte"),
        ([], [described("a", [9]), described("b", [4], 0, 32)], {"data": 64}, "begins inside the tensor 'a'"),
        ([], [described("a", [8]), described("b", [4], 0, 32)], {"data": 32}, "the file at byte"),
    ],
)
def test_bad_structure(
    tmp_path: Path, pairs: list[bytes], tensors: list[bytes], options: dict[str, Any], problem: str
) -> None:
    path = raw(tmp_path / "m.gguf", pairs, tensors, **options)
    with pytest.raises(ModelFormatError, match=problem) as caught:
        read_gguf(path)
    assert caught.value.path == path


def test_rows_that_hold_no_whole_blocks(tmp_path: Path) -> None:
    path = raw(tmp_path / "m.gguf", [], [described("a", [48, 2], 8)], data=102)
    with pytest.raises(ModelFormatError, match="blocks of 32"):
        read_gguf(path).tensors["a"].open(READABLE)
    path = raw(tmp_path / "m.gguf", [], [described("a", [128, 2], 12)], data=144)  # Q4_K, one block across two rows
    with pytest.raises(ModelFormatError, match="rows of 128 elements hold no whole number of q4_k blocks of 256"):
        read_gguf(path).tensors["a"].open(READABLE)


@pytest.mark.parametrize(("type_id", "nbytes"), [(12, 144), (14, 210), (29, 56), (39, 17 * 8), (41, 36)])
def test_truncated_blocks(tmp_path: Path, type_id: int, nbytes: int) -> None:
    tensors = [described("a", [256, 3], type_id)]
    with pytest.raises(ModelFormatError, match=r"'a'.*is truncated or damaged"):
        read_gguf(raw(tmp_path / "m.gguf", [], tensors, data=3 * nbytes - 1))
    assert read_gguf(raw(tmp_path / "m.gguf", [], tensors, data=3 * nbytes)).tensors["a"].open(READABLE).nbytes


def test_not_gguf(tmp_path: Path) -> None:
    (tmp_path / "m.gguf").write_bytes(b"GGML" + bytes(100))
    with pytest.raises(ModelFormatError, match="not begin with the bytes GGUF"):
        read_gguf(tmp_path / "m.gguf")
    (tmp_path / "m.gguf").write_bytes(b"GG")
    with pytest.raises(ModelFormatError, match="not begin with the bytes GGUF"):
        read_gguf(tmp_path / "m.gguf")


def write_split(folder: Path) -> list[Path]:
    """A model in three parts, as llama.cpp's gguf-split writes it: the first part has the keys."""
    tensors = tensors_of(gguf_shapes())
    paths = []
    for number in range(3):
        part = dict(list(tensors.items())[number::3])
        keys = {"split.no": number, "split.count": 3, "split.tensors.count": len(tensors)}
        path = folder / f"m-{number + 1:05}-of-00003.gguf"
        write_gguf(path, {**(GGUF_KEYS if number == 0 else {}), **keys}, part)
        paths.append(path)
    return paths


def test_split_models(tmp_path: Path) -> None:
    first, second, third = write_split(tmp_path)
    file = read_gguf(first)
    expected = tensors_of(gguf_shapes())
    assert file.tensors.keys() == expected.keys()
    for name, array in expected.items():
        np.testing.assert_array_equal(file.tensors[name].open(READABLE).owner, array.reshape(-1).view(np.uint8))
    with pytest.raises(ModelFormatError, match=r"is part 00002 of 3; open m-00001-of-00003.gguf"):
        read_gguf(second)
    renamed = first.with_name("other.gguf")
    renamed.write_bytes(first.read_bytes())
    with pytest.raises(ModelFormatError, match="is not named"):
        read_gguf(renamed)
    third.write_bytes(second.read_bytes())
    with pytest.raises(ModelFormatError, match="does not say that it is part 3"):
        read_gguf(first)
    third.unlink()
    with pytest.raises(ModelFormatError, match=r"m-00003-of-00003\.gguf: no such file"):
        read_gguf(first)
