"""The PTX wrappers of sm_90a against numpy, and tensor maps. Also meant for real GPUs of compute capability 9.0."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import ml_dtypes
import numpy as np
import pytest
from hostsim import session
from wrapper_kernels import hopper_cubin

from gllm_driver import driver
from gllm_driver.driver.device import Device
from gllm_driver.driver.launch import PackedParams
from gllm_driver.driver.memory import DeviceBuffer
from gllm_driver.driver.tensor_map import encode_tensor_map
from gllm_driver.errors import DriverError

TYPES = {"f16": np.float16, "bf16": ml_dtypes.bfloat16}
Run = Callable[..., np.ndarray]


@pytest.fixture
def hopper() -> Iterator[Device]:
    """An open device of compute capability 9.0, its context current."""
    if not session.on_real_gpu():
        session.stub().reset(CC="9.0")
    opened = driver.open_device()
    if opened.cc != (9, 0):
        opened.close()
        pytest.skip("needs a device of compute capability 9.0")
    with opened:
        yield opened
    opened.close()


class Uploads:
    """Arrays on the device, and kernels run on them."""

    def __init__(self, device: Device) -> None:
        self.device = device
        self.stream = device.stream()
        self.module = device.load(hopper_cubin(), "hopper")
        self._buffers: list[DeviceBuffer] = []

    def put(self, array: np.ndarray) -> int:
        """The device address of a copy."""
        buffer = self.device.alloc(array.nbytes)
        self._buffers.append(buffer)
        self.device.copy_h2d(buffer.address, array.ctypes.data, array.nbytes)
        return buffer.address

    def run(
        self,
        kernel: str,
        threads: int,
        smem_nbytes: int,
        out: np.ndarray,
        fields: list[tuple[str, int]],
        *maps: np.ndarray,
    ) -> np.ndarray:
        """`fields` follow the output's address in the kernel's struct: (type, value)."""
        address = self.put(out)
        dtype = np.dtype([("out", "<i8"), *((f"f{i}", kind) for i, (kind, _) in enumerate(fields))], align=True)
        struct = np.array((address, *(value for _, value in fields)), dtype)
        function = self.module.function(f"hopper__{kernel}")
        function.launch((1, 1, 1), (threads, 1, 1), smem_nbytes, self.stream, PackedParams(struct, *maps))
        self.stream.synchronize()
        self.device.copy_d2h(out.ctypes.data, address, out.nbytes)
        return out


@pytest.fixture
def uploads(hopper: Device) -> Uploads:
    return Uploads(hopper)


def swizzled(rows: np.ndarray) -> np.ndarray:
    """Rows of 128 bytes as they lie in shared memory: of row r, the 16-byte piece p is at p ^ r % 8."""
    out = np.empty_like(rows)
    for r in range(len(rows)):
        for piece in range(8):
            at = piece ^ r % 8
            out[r, at * 16 : at * 16 + 16] = rows[r, piece * 16 : piece * 16 + 16]
    return out


@pytest.mark.parametrize(("x", "y"), [(0, 0), (64, 8), (40, 30), (8, 97), (128, 200)])
@pytest.mark.parametrize("box_rows", [8, 24, 128])
def test_copy_box(uploads: Uploads, x: int, y: int, box_rows: int) -> None:
    """Boxes within the array and across its ends, where zeros stand for what there is not."""
    source = np.random.default_rng(x).integers(1, 2**16, (100, 104), dtype=np.uint16)
    padded = np.zeros((y + box_rows + 100, x + 64 + 104), np.uint16)
    padded[:100, :104] = source
    expected = np.ascontiguousarray(padded[y : y + box_rows, x : x + 64]).view(np.uint8)
    tensor_map = encode_tensor_map(uploads.put(source), "f16", source.shape, (box_rows, 64))
    out = np.zeros((box_rows, 128), np.uint8)
    fields = [("<i4", x), ("<i4", y), ("<i4", out.nbytes)]
    uploads.run("copy_box", 32, out.nbytes + 8, out, fields, tensor_map)
    assert np.array_equal(out, swizzled(expected))


def registers(d: np.ndarray) -> np.ndarray:
    """[64, N] → [128, N / 2], as the PTX ISA lays out the accumulator of a warpgroup."""
    out = np.zeros((128, d.shape[1] // 2), np.float32)
    for thread in range(128):
        for i in range(out.shape[1]):
            row = thread // 32 * 16 + thread % 32 // 4 + i // 2 % 2 * 8
            out[thread, i] = d[row, i // 4 * 8 + thread % 4 * 2 + i % 2]
    return out


@pytest.mark.parametrize("n", [64, 128, 192, 256])
@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("is_exact", [True, False])
@pytest.mark.parametrize("accumulates", [True, False])
def test_wgmma(uploads: Uploads, n: int, dtype: str, *, is_exact: bool, accumulates: bool) -> None:
    g = np.random.default_rng(n)
    a, b, c = g.standard_normal((64, 64)), g.standard_normal((n, 64)), g.standard_normal((64, n))
    if is_exact:  # small integers are exact in any order
        a, b, c = g.integers(-8, 9, a.shape), g.integers(-8, 9, b.shape), g.integers(-99, 99, c.shape)
    a, b, c = a.astype(TYPES[dtype]), b.astype(TYPES[dtype]), c.astype(np.float32) * accumulates
    maps = [encode_tensor_map(uploads.put(m), dtype, m.shape, m.shape) for m in (a, b)]
    out = np.full((128, n // 2), np.nan, np.float32)
    smem_nbytes = (64 + n) * 128 + 8
    before = uploads.put(registers(c)) if accumulates else 0
    address = uploads.put(out)
    struct = np.array((before, address), [("c", "<i8"), ("d", "<i8")])
    function = uploads.module.function(f"hopper__wgmma_{dtype}_{n}")
    function.launch((1, 1, 1), (128, 1, 1), smem_nbytes, uploads.stream, PackedParams(struct, *maps))
    uploads.stream.synchronize()
    uploads.device.copy_d2h(out.ctypes.data, address, out.nbytes)
    exact = registers(a.astype(np.float64) @ b.astype(np.float64).T + c)
    assert np.abs(out - exact).max() <= (0 if is_exact else 1e-4)


@pytest.mark.parametrize("boxes", [1, 2, 3, 9])
def test_a_ring_of_barriers(uploads: Uploads, boxes: int) -> None:
    source = np.random.default_rng(boxes).integers(1, 2**16, (boxes * 8, 64), dtype=np.uint16)
    tensor_map = encode_tensor_map(uploads.put(source), "bf16", source.shape, (8, 64))
    out = np.zeros((boxes * 8, 128), np.uint8)
    uploads.run("ring", 160, 2048 + 32, out, [("<i4", boxes)], tensor_map)
    assert np.array_equal(out, swizzled(source.view(np.uint8)))


@pytest.mark.parametrize(("address", "cols", "box"), [(8, 64, (8, 64)), (0, 12, (8, 64)), (0, 64, (257, 64))])
def test_arrays_the_copy_engine_cannot_take(hopper: Device, address: int, cols: int, box: tuple[int, int]) -> None:
    memory = hopper.alloc(1 << 16)
    with pytest.raises(DriverError, match="cuTensorMapEncodeTiled failed with CUDA_ERROR_INVALID_VALUE"):
        encode_tensor_map(memory.address + address, "bf16", (64, cols), box)
    memory.free()
