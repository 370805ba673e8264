"""Mapping files and reading safetensors: what is there is what was written, and what is broken is one clear error."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from gllm_driver.errors import ModelFormatError
from gllm_driver.loaders.mapping import FileMapping
from gllm_driver.loaders.safetensors import READABLE, read_safetensors, read_safetensors_index
from gllm_driver.types import F16, F32, Q8_0, Tensor


def as_array(tensor: Tensor, dtype: Any) -> np.ndarray:
    assert isinstance(tensor.owner, np.ndarray)
    assert tensor.owner.ctypes.data == tensor.address
    return tensor.owner.view(dtype).reshape(tensor.shape)


def write_raw(path: Path, header: Any, data: bytes = b"", header_nbytes: int | None = None) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes((len(text) if header_nbytes is None else header_nbytes).to_bytes(8, "little") + text + data)
    return path


def entry(dtype: str, shape: list[int], begin: int, end: int) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


# -- files -----------------------------------------------------------------------------------------------------------


def test_missing_empty_directory_and_special_files_are_one_error_each(tmp_path: Path) -> None:
    (tmp_path / "empty").touch()
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    os.mkfifo(tmp_path / "fifo")
    for name, problem in {
        "absent": "no such file",
        "empty": "the file is empty",
        ".": "is a directory",
        "fifo": "not a regular file",
        "loop": "cannot be opened",
    }.items():
        with pytest.raises(ModelFormatError, match=problem) as caught:
            FileMapping(tmp_path / name)
        assert caught.value.path == tmp_path / name
        assert "\n" not in str(caught.value)
    with pytest.raises(ModelFormatError, match="cannot be opened"):
        FileMapping(tmp_path / "nul\0byte")


def test_no_permission_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "secret"
    path.write_bytes(b"x")
    if os.geteuid() == 0:  # root may read everything: let open refuse instead

        def refuse(*args: Any, **kwargs: Any) -> Any:
            raise PermissionError(13, "Permission denied")

        monkeypatch.setattr("builtins.open", refuse)
    else:
        path.chmod(0)
    with pytest.raises(ModelFormatError, match="no permission"):
        FileMapping(path)


def test_tensor_is_a_view_of_a_file_that_may_not_be_written(tmp_path: Path) -> None:
    path = tmp_path / "file"
    values = np.arange(12, dtype=np.float32).reshape(3, 4)
    path.write_bytes(b"12345678" + values.tobytes())
    path.chmod(0o444)
    file = FileMapping(path)
    tensor = file.tensor("t", F32, (3, 4), 8)
    assert tensor.address == file.data.ctypes.data + 8
    np.testing.assert_array_equal(as_array(tensor, np.float32), values)
    assert not tensor.owner.flags.writeable
    file.will_need()
    del file
    np.testing.assert_array_equal(as_array(tensor, np.float32), values)


def test_tensor_at_an_address_its_type_cannot_be_read_from_is_copied(tmp_path: Path) -> None:
    path = tmp_path / "file"
    values = np.arange(5, dtype=np.float32)
    path.write_bytes(b"123" + values.tobytes())
    file = FileMapping(path)
    tensor = file.tensor("t", F32, (5,), 3)
    assert tensor.address % 4 == 0
    np.testing.assert_array_equal(as_array(tensor, np.float32), values)


@pytest.mark.parametrize(
    ("dtype", "shape", "offset", "problem"),
    [
        (F32, (4,), 0, None),
        (F32, (5,), 0, "needs 20 bytes"),
        (F32, (4,), 1, "ends at byte 16"),
        (F32, (4,), -1, "ends at byte"),
        (F32, (1,), 17, "ends at byte"),
        (F32, (2**62, 2**62), 0, "ends at byte"),
        (F16, (2, 0), 0, "empty axis"),
        (Q8_0, (31,), 0, "blocks of 32"),
        (Q8_0, (32,), 0, "needs 34 bytes"),
    ],
)
def test_tensor_bounds(tmp_path: Path, dtype: Any, shape: tuple[int, ...], offset: int, problem: str | None) -> None:
    path = tmp_path / "file"
    path.write_bytes(bytes(16))
    file = FileMapping(path)
    if problem is None:
        file.tensor("t", dtype, shape, offset)
        return
    with pytest.raises(ModelFormatError, match=problem) as caught:
        file.tensor("t", dtype, shape, offset)
    assert (caught.value.path, caught.value.tensor) == (path, "t")


# -- one safetensors file --------------------------------------------------------------------------------------------


def test_reads_what_the_safetensors_package_wrote(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    written = {
        "f32": rng.standard_normal((3, 5)).astype(np.float32),
        "f16": rng.standard_normal((7,)).astype(np.float16),
        "bf16": rng.standard_normal((2, 3, 4)).astype(ml_dtypes.bfloat16),
    }
    save_file(written, tmp_path / "m.safetensors", metadata={"format": "pt"})
    stored = read_safetensors(tmp_path / "m.safetensors")
    assert stored.keys() == written.keys()
    for name, array in written.items():
        tensor = stored[name].open(READABLE)
        assert (tensor.shape, tensor.dtype.name) == (array.shape, name)
        np.testing.assert_array_equal(as_array(tensor, array.dtype), array)


def test_unreadable_type_is_named_when_it_is_opened(tmp_path: Path) -> None:
    save_file({"a": np.zeros(4, np.int8)}, tmp_path / "m.safetensors")
    stored = read_safetensors(tmp_path / "m.safetensors")
    with pytest.raises(ModelFormatError, match=r"tensor 'a': has type I8.*it reads F32, F16, BF16"):
        stored["a"].open(READABLE)


GOOD = entry("F32", [2], 0, 8)


@pytest.mark.parametrize(
    ("header", "data", "problem"),
    [
        ({"a": entry("F32", [2], 0, 4)}, 8, "takes 8 bytes, but data_offsets gives 4"),
        ({"a": entry("F32", [2], 8, 0)}, 8, "claims bytes 8 … 0"),
        ({"a": entry("F32", [4], 0, 16)}, 8, "claims bytes 0 … 16 of 8"),
        ({"a": entry("F32", [-2], 0, 8)}, 8, "has the shape"),
        ({"a": entry("F32", [2.0], 0, 8)}, 8, "has the shape"),  # type: ignore[list-item]
        ({"a": entry("F32", [True, 2], 0, 8)}, 8, "has the shape"),
        ({"a": entry("F32", [1] * 9 + [2], 0, 8)}, 8, "has the shape"),
        ({"a": entry("F32", [2**62, 2**62, 4], 0, 8)}, 8, "takes .* bytes"),
        ({"a": entry("F32", [2**64], 0, 8)}, 8, "has the shape"),
        ({"a": entry("F31", [2], 0, 8)}, 8, "unknown type 'F31'"),
        ({"a": {**GOOD, "dtype": None}}, 8, "unknown type None"),
        ({"a": {**GOOD, "data_offsets": [0]}}, 8, "data_offsets"),
        ({"a": {**GOOD, "data_offsets": [0, 8.0]}}, 8, "data_offsets"),
        ({"a": {"dtype": "F32", "shape": [2]}}, 8, "needs dtype, shape and data_offsets"),
        ({"a": [1, 2]}, 8, "needs dtype, shape and data_offsets"),
        ({"a": GOOD}, 12, "4 bytes follow the last tensor"),
        ({"a": GOOD, "b": entry("F32", [1], 4, 8)}, 8, "overlaps"),
        ({"a": GOOD, "b": entry("F32", [1], 12, 16)}, 16, "hole"),
        ([1], 0, "must be a JSON object"),
        (b"{", 0, "not valid JSON"),
        (b"\xff\xfe", 0, "not valid JSON"),
        (b'{"a": 1, "a": 2}', 0, "the key 'a' twice"),
        (b"[" * 100_000, 0, "nested too deeply|not valid JSON"),
        (b'{"a": ' + b"9" * 100_000 + b"}", 0, "not valid JSON|needs dtype"),
    ],
)
def test_bad_headers(tmp_path: Path, header: Any, data: int, problem: str) -> None:
    path = write_raw(tmp_path / "m.safetensors", header, bytes(data))
    with pytest.raises(ModelFormatError, match=problem) as caught:
        read_safetensors(path)
    assert caught.value.path == path
    assert len(str(caught.value)) < 400


@pytest.mark.parametrize("header_nbytes", [17, 2**20, 2**40, 2**63, 2**64 - 1])
def test_header_length_is_bounded_by_the_file(tmp_path: Path, header_nbytes: int) -> None:
    path = write_raw(tmp_path / "m.safetensors", b"{}".ljust(16), header_nbytes=header_nbytes)
    with pytest.raises(ModelFormatError, match=f"claims {header_nbytes} bytes"):
        read_safetensors(path)


def test_a_file_of_fewer_bytes_than_the_length_field(tmp_path: Path) -> None:
    (tmp_path / "m.safetensors").write_bytes(b"1234567")
    with pytest.raises(ModelFormatError, match="too short"):
        read_safetensors(tmp_path / "m.safetensors")


# -- shards ----------------------------------------------------------------------------------------------------------


def write_index(folder: Path, weight_map: Any) -> Path:
    path = folder / "model.safetensors.index.json"
    path.write_text(json.dumps({"weight_map": weight_map}))
    return path


def test_shards(tmp_path: Path) -> None:
    save_file({"a": np.arange(3, dtype=np.float32)}, tmp_path / "1.safetensors")
    save_file({"b": np.arange(4, dtype=np.float16)}, tmp_path / "2.safetensors")
    stored = read_safetensors_index(write_index(tmp_path, {"a": "1.safetensors", "b": "2.safetensors"}))
    assert {name: tensor.path.name for name, tensor in stored.items()} == {"a": "1.safetensors", "b": "2.safetensors"}
    np.testing.assert_array_equal(as_array(stored["b"].open(READABLE), np.float16), np.arange(4))


def test_shards_that_contradict_the_index(tmp_path: Path) -> None:
    save_file({"a": np.zeros(3, np.float32)}, tmp_path / "1.safetensors")
    save_file({"a": np.zeros(3, np.float32), "b": np.zeros(3, np.float32)}, tmp_path / "2.safetensors")
    for weight_map, problem in [
        ({"a": "1.safetensors", "b": "3.safetensors"}, "the shard 3.safetensors is missing"),
        ({"a": "1.safetensors", "b": "2.safetensors"}, "tensor 'a': is in two shards"),
        ({"a": "1.safetensors", "c": "1.safetensors"}, "tensor 'c': is not in the shard 1.safetensors"),
        ({"a": 1}, "must map"),
        (["a"], "must map"),
        (None, "must map"),
    ]:
        with pytest.raises(ModelFormatError, match=problem):
            read_safetensors_index(write_index(tmp_path, weight_map))


@pytest.mark.parametrize(
    "shard",
    [
        "../1.safetensors",
        "/etc/1.safetensors",
        "x/1.safetensors",
        "x\\1.safetensors",
        "..",
        "",
        "passwd",
        "a\0.safetensors",
    ],
)
def test_an_index_may_not_lead_out_of_its_folder(tmp_path: Path, shard: str) -> None:
    (tmp_path / "inner").mkdir()
    save_file({"a": np.zeros(3, np.float32)}, tmp_path / "1.safetensors")
    with pytest.raises(ModelFormatError, match="no safetensors file of this folder"):
        read_safetensors_index(write_index(tmp_path / "inner", {"a": shard}))
