"""Weights on their way to the device: every byte in its place, whatever the pieces; faults and bad values named."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from cuda_models import fresh, load_cuda, open_cuda
from hostsim import session

from gllm_driver.backends.base import ModelWeights
from gllm_driver.backends.cuda import transfer, upload
from gllm_driver.backends.cuda.transfer import Span, windows
from gllm_driver.cli.app import run
from gllm_driver.cli.info import memory
from gllm_driver.errors import CapacityError, DriverError, ModelFormatError, OutOfDeviceMemory
from gllm_driver.llm import demo_model_path
from gllm_driver.loaders.open import open_checkpoint
from gllm_driver.packed_types import packed_dtype
from gllm_driver.placement import _weights_nbytes
from gllm_driver.quant.packed import pack
from gllm_driver.types import DTYPES, Tensor

pytestmark = pytest.mark.hostsim

FLOATS = {"f32": np.float32, "f16": np.float16, "bf16": ml_dtypes.bfloat16}


@pytest.fixture(autouse=True)
def stub() -> Iterator[session.Stub | None]:
    """A fresh device; nothing may be left on it."""
    if session.on_real_gpu():
        yield None
        return
    stub = fresh(THREADS="2")
    yield stub
    stub.set_faults("")
    assert stub.live() == {}


@pytest.fixture
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Many pieces, jobs and turns of the staging region, even for small tensors."""
    monkeypatch.setattr(transfer, "PIECE_NBYTES", 1536)
    monkeypatch.setattr(upload, "JOB_NBYTES", 4096)
    monkeypatch.setattr(upload, "DIRECT_JOB_NBYTES", 8192)


def blocks(g: np.random.Generator, dtype: str, N: int, K: int) -> np.ndarray:
    """Random blocks of 32 elements whose first two bytes are a finite f16."""
    nbytes = DTYPES[dtype].block_nbytes
    raw = g.integers(0, 256, (N * K // 32, nbytes), np.uint8)
    raw[:, :2] = g.standard_normal((len(raw), 1)).astype(np.float16).view(np.uint8)
    return raw.reshape(N, -1)


def arrays(stored: str) -> dict[str, np.ndarray]:
    """Matrices and vectors of odd sizes; some share memory."""
    g = np.random.default_rng(1)
    kind = FLOATS[stored]
    found = {
        f"m{i}": g.standard_normal(shape).astype(kind)
        for i, shape in enumerate([(7, 33), (61, 128), (3, 1), (9, 3000)])
    }
    found |= {f"v{i}": g.standard_normal(n).astype(kind) for i, n in enumerate((1, 128, 129, 3000))}
    found["tied"] = found["m1"]
    return found


def model_of(found: dict[str, np.ndarray], quantized: dict[str, tuple[str, int, int]] | None = None) -> ModelWeights:
    """A model of these tensors, whose names in the file are file.<slot>."""
    quantized = quantized or {}
    tensors = {}
    for slot, array in found.items():
        if slot in quantized:
            dtype, N, K = quantized[slot]
            tensors[slot] = Tensor.from_numpy(array, DTYPES[dtype], (N, K))
        else:
            tensors[slot] = Tensor.from_numpy(array)
    constants = {"table": Tensor.from_numpy(np.arange(5, dtype=np.float64)), "ids": Tensor.from_numpy(np.arange(3))}

    def forward(*_: Any) -> None:
        raise AssertionError("not run here")

    return ModelWeights(tensors, {slot: f"file.{slot}" for slot in tensors}, "a.gguf", constants, 7, forward)


def num_workspace_arrays(backend: Any) -> int:
    return len(backend.runtime.workspace._buffers)


def on_device(backend: Any, tensor: Tensor) -> bytes:
    out = np.empty(tensor.nbytes, np.uint8)
    backend.device.copy_d2h(out.ctypes.data, tensor.address, out.nbytes)
    return out.tobytes()


@pytest.mark.usefixtures("small_pieces")
@pytest.mark.parametrize("stored", list(FLOATS))
@pytest.mark.parametrize("dtype", ["auto", *FLOATS])
def test_every_tensor_arrives_in_the_type_asked_for(stored: str, dtype: str) -> None:
    found = arrays(stored)
    heard: list[tuple[int, int]] = []
    backend = open_cuda()
    try:
        weights = backend.upload_weights(model_of(found), dtype=dtype, progress=lambda _, d, t: heard.append((d, t)))
        for slot, array in found.items():
            kind = "f32" if array.ndim == 1 else stored if dtype == "auto" else dtype
            assert weights.tensors[slot].dtype.name == kind
            assert weights.tensors[slot].shape == array.shape
            assert weights.tensors[slot].address % 128 == 0
            assert on_device(backend, weights.tensors[slot]) == array.astype(FLOATS[kind]).tobytes(), slot
        assert weights.tensors["tied"].address == weights.tensors["m1"].address
        assert on_device(backend, weights.tensors["table"]) == np.arange(5, dtype=np.float64).tobytes()
        assert on_device(backend, weights.tensors["ids"]) == np.arange(3).tobytes()
        assert heard[-1] == (weights.nbytes, weights.nbytes)
        assert len(heard) > 5
        assert heard == sorted(heard)
        assert backend.device.allocations().num_live == 1 + num_workspace_arrays(backend)
    finally:
        backend.close()


@pytest.mark.usefixtures("small_pieces")
def test_blocks_arrive_as_they_were_made() -> None:
    g = np.random.default_rng(2)
    quantized = {"q8": ("q8_0", 300, 64), "q4": ("q4_0", 5, 4096), "one": ("q8_0", 1, 32)}
    found = {slot: blocks(g, *row) for slot, row in quantized.items()}
    found["v"] = g.standard_normal(64).astype(np.float32)
    backend = open_cuda()
    try:
        weights = backend.upload_weights(model_of(found, quantized))
        for slot, array in found.items():
            tensor = weights.tensors[slot]
            if slot in quantized:
                assert tensor.dtype == upload.device_dtype(Tensor.from_numpy(array, *_typed(quantized[slot])), "auto")
            expected = pack(array, *_typed_name(quantized[slot])) if slot in quantized else array
            assert on_device(backend, tensor) == expected.tobytes(), slot
    finally:
        backend.close()


@pytest.mark.usefixtures("small_pieces")
@pytest.mark.parametrize("stored", ["q8_0", "q4_0"])
def test_blocks_are_packed(stored: str) -> None:
    g, N, K = np.random.default_rng(4), 77, 384
    raw = blocks(g, stored, N, K)
    backend = open_cuda()
    try:
        tensor = backend.upload_weights(model_of({"a": raw}, {"a": (stored, N, K)})).tensors["a"]
        assert tensor.dtype is packed_dtype(stored)
        assert tensor.shape == (N, K)
        assert on_device(backend, tensor) == pack(raw, stored, (N, K)).tobytes()
        bad = raw.copy()
        bad.reshape(-1, DTYPES[stored].block_nbytes)[12 * 70 + 3, :2] = 255  # a NaN
        with pytest.raises(ModelFormatError, match=rf"element {K * 70 + 96}:"):
            backend.upload_weights(model_of({"a": bad}, {"a": (stored, N, K)}))
    finally:
        backend.close()


def _typed_name(row: tuple[str, int, int]) -> tuple[str, tuple[int, int]]:
    return row[0], row[1:]


def _typed(row: tuple[str, int, int]) -> tuple[Any, tuple[int, int]]:
    return DTYPES[row[0]], row[1:]


@pytest.mark.usefixtures("small_pieces")
@pytest.mark.parametrize(
    ("slot", "element", "value"),
    [("m3", 26_999, np.inf), ("m0", 0, np.nan), ("m1", 5000, -np.inf), ("v3", 2999, np.nan), ("v0", 0, np.inf)],
)
@pytest.mark.parametrize("dtype", ["auto", "f16"])
def test_a_value_that_is_no_number_is_named(slot: str, element: int, value: float, dtype: str) -> None:
    found = arrays("bf16")
    found[slot].reshape(-1)[element] = value
    backend = open_cuda()
    try:
        with pytest.raises(ModelFormatError, match=rf"NaN or infinite value at element {element}:") as caught:
            backend.upload_weights(model_of(found), dtype=dtype)
        assert caught.value.tensor == f"file.{slot}"
        assert str(caught.value.path) == "a.gguf"
    finally:
        backend.close()


@pytest.mark.usefixtures("small_pieces")
@pytest.mark.parametrize("dtype", ["q8_0", "q4_0"])
def test_a_block_whose_scale_is_no_number_is_named(dtype: str) -> None:
    g = np.random.default_rng(3)
    found = {"a": blocks(g, dtype, 40, 256), "b": blocks(g, dtype, 40, 256)}
    found["b"].reshape(-1, DTYPES[dtype].block_nbytes)[8 * 33 + 5, :2] = np.array([np.nan], np.float16).view(np.uint8)
    backend = open_cuda()
    try:
        with pytest.raises(ModelFormatError, match=rf"element {256 * 33 + 160}:") as caught:
            backend.upload_weights(model_of(found, dict.fromkeys(found, (dtype, 40, 256))))
        assert caught.value.tensor == "file.b"
    finally:
        backend.close()


@pytest.mark.usefixtures("small_pieces")
@pytest.mark.parametrize(
    "name", ["cuMemcpyHtoDAsync", "cuEventRecord", "cuStreamWaitEvent", "cuLaunchKernel", "cuMemcpyDtoH"]
)
@pytest.mark.parametrize("number", [1, 2, 9])
def test_a_call_that_fails_on_the_way_is_an_error_and_leaves_nothing(
    stub: session.Stub | None, name: str, number: int
) -> None:
    if stub is None:
        pytest.skip("tells the simulated device what to do")
    if name == "cuMemcpyDtoH" and number > 1:
        pytest.skip("there is one")
    backend = open_cuda()
    try:
        stub.set_faults(f"{name}:{number}=999")
        with pytest.raises(DriverError, match=name):
            backend.upload_weights(model_of(arrays("bf16")), dtype="f16")
        stub.set_faults("")
        assert backend.device.allocations().num_live == num_workspace_arrays(backend)
        backend.upload_weights(model_of(arrays("bf16")), dtype="f16")
    finally:
        backend.close()


@pytest.mark.parametrize("number", [1, 3])
def test_no_room_for_staging_is_a_lack_of_capacity(stub: session.Stub | None, number: int) -> None:
    if stub is None:
        pytest.skip("tells the simulated device what to do")
    backend = open_cuda()
    try:
        stub.set_faults(f"cuMemAlloc:{number}=2,cuMemAlloc:{number + 1}=2")
        with pytest.raises(CapacityError, match="no room on"):
            backend.upload_weights(model_of(arrays("bf16")))
        stub.set_faults("cuMemHostAlloc:2=2")
        with pytest.raises(OutOfDeviceMemory):
            backend.upload_weights(model_of(arrays("bf16")))
    finally:
        backend.close()


def test_windows_cover_everything_once() -> None:
    spans = [Span(1000, 0, 10), Span(2000, 16, 1), Span(3000, 20, 30)]
    for size in (1, 7, 16, 50, 64):
        found = bytearray(50)
        for window in windows(spans, 50, size):
            assert window.nbytes <= size
            for span in window.spans:
                assert 0 <= span.at <= span.at + span.nbytes <= window.nbytes
                for i in range(span.nbytes):
                    assert not found[window.start + span.at + i]
                    found[window.start + span.at + i] = (span.source + i) % 251
        expected = bytearray(50)
        for span in spans:
            expected[span.at : span.at + span.nbytes] = bytes((span.source + i) % 251 for i in range(span.nbytes))
        assert found == expected


@pytest.mark.parametrize("type_name", ["q6_k", "q4_k", "q8_0"])
def test_planning_counts_packed_weights_as_they_are_held(type_name: str, tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    assert run(["quantize", str(demo_model_path()), str(path), "--type", type_name]) == 0
    checkpoint = open_checkpoint(path)
    with load_cuda(path, context_length=64) as llm:
        held = {t.address: t for t in llm._engine.weights.tensors.values()}.values()
        assert memory(checkpoint, 64)["cuda"]["weights"] == sum(t.nbytes for t in held)
        stored = {slot for slot in checkpoint.tensors if slot in llm._engine.weights.tensors}
        matrices = sum(t.nbytes for t in held if t.dtype.name.startswith("p"))
        vectors = sum(checkpoint.tensors[slot].nbytes for slot in stored if len(checkpoint.tensors[slot].shape) == 1)
        assert _weights_nbytes(checkpoint, llm._backend, "auto") == matrices + vectors
