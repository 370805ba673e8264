"""Modules and launches: parameters, limits, counters; the shipped binaries as they are."""

from __future__ import annotations

import ctypes
import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
from hostsim import session
from hostsim.direct import HostKernels
from hostsim.fake_cubin import FakeKernel, fake_cubin
from wrapper_kernels import conformance_cubin

from gllm_driver import driver
from gllm_driver.driver.device import Device
from gllm_driver.driver.launch import PackedParams
from gllm_driver.driver.manifest import FOLDER, read_manifest
from gllm_driver.driver.module import KernelLibrary, Module
from gllm_driver.errors import ContextLost, CubinError, DriverError, NoKernelImage
from gllm_driver.launch._wgmma import UNPACK_ARGS
from gllm_driver.ops import CONTRACTS

SCALE = np.dtype([("in", "<i8"), ("out", "<i8"), ("n", "<i4"), ("shared_floats", "<i4"), ("factor", "<f4")], align=True)
REDUCE = np.dtype([("in", "<i8"), ("out", "<i8")])


plants_a_bug = pytest.mark.skipif(session.is_sanitized(), reason="a sanitizer ends the process at the bug")


@pytest.fixture
def module(device: Device) -> Module:
    return device.load(conformance_cubin(device.cc), "conformance")


def scale_args(source: int, out: int, n: int, shared_floats: int, factor: float) -> np.ndarray:
    return np.array((source, out, n, shared_floats, factor), SCALE)


@pytest.mark.parametrize("shared_floats", [0, 1000, 24_000])  # the last needs more than 48 kB
def test_a_launch(device: Device, module: Module, shared_floats: int) -> None:
    n, stream = 1001, device.stream()
    data, back = np.arange(n, dtype=np.float32), np.zeros(n, np.float32)
    source, out = device.alloc(data.nbytes), device.alloc(data.nbytes)
    device.copy_h2d(source.address, data.ctypes.data, data.nbytes)
    params = PackedParams(scale_args(source.address, out.address, n, shared_floats, 2.5))
    function = module.function("conformance__scale")
    assert params.nbytes == function.param_nbytes
    function.launch((8, 1, 1), (128, 1, 1), 4 * shared_floats, stream, params)
    function.launch((8, 1, 1), (128, 1, 1), 4 * shared_floats, stream, params.address)
    stream.synchronize()
    device.copy_d2h(back.ctypes.data, out.address, back.nbytes)
    assert np.array_equal(back, data * np.float32(2.5))
    assert module.function("conformance__scale") is function


def test_parameters_are_taken_at_the_call(device: Device, module: Module) -> None:
    stream, data = device.stream(), np.ones(32, np.float32)
    buffers = [device.alloc(128) for _ in range(3)]
    device.copy_h2d(buffers[0].address, data.ctypes.data, 128)
    params = PackedParams(scale_args(buffers[0].address, buffers[1].address, 32, 0, 3.0))
    function = module.function("conformance__scale")
    function.launch((1, 1, 1), (128, 1, 1), 0, stream, params)
    params.values[0].view(SCALE)["out"] = buffers[2].address
    params.values[0].view(SCALE)["factor"] = 4.0
    function.launch((1, 1, 1), (128, 1, 1), 0, stream, params)
    stream.synchronize()
    for buffer, expected in zip(buffers[1:], (3.0, 4.0), strict=True):
        device.copy_d2h(data.ctypes.data, buffer.address, 128)
        assert (data == expected).all()


def test_two_parameters(device: Device, module: Module) -> None:
    stream, counter, io = device.stream(), device.alloc(4), device.alloc(256)
    device.fill(counter.address, 0, 4, stream)
    device.fill(io.address, 0, 256, stream)
    params = PackedParams(np.array((io.address, io.address + 128), REDUCE), counter.address)
    module.function("conformance__count").launch((37, 2, 3), (32, 1, 1), 0, stream, params)
    stream.synchronize()
    count = np.zeros(1, np.int32)
    device.copy_d2h(count.ctypes.data, counter.address, 4)
    assert count[0] == 37 * 2 * 3


def test_kernels_in_a_graph(device: Device, module: Module) -> None:
    stream, data = device.stream(), np.ones(32, np.float32)
    source, out = device.alloc(128), device.alloc(128)
    device.copy_h2d(source.address, data.ctypes.data, 128)
    params = PackedParams(scale_args(source.address, out.address, 32, 0, 2.0))
    back = PackedParams(scale_args(out.address, source.address, 32, 0, 1.0))
    function = module.function("conformance__scale")

    def record() -> None:
        function.launch((1, 1, 1), (128, 1, 1), 0, stream, params)
        function.launch((1, 1, 1), (128, 1, 1), 0, stream, back)

    graph = stream.capture(record)
    assert (graph.num_nodes, graph.num_kernels) == (2, 2)
    allocs = device.allocations()
    for _ in range(10):
        graph.launch(stream)
    stream.synchronize()
    device.copy_d2h(data.ctypes.data, source.address, 128)
    assert (data == 2.0**10).all()
    assert device.allocations() == allocs


@pytest.mark.parametrize(
    ("grid", "block", "smem"),
    [
        ((0, 1, 1), (128, 1, 1), 0),
        ((1, 65536, 1), (128, 1, 1), 0),
        ((1, 1, 65536), (128, 1, 1), 0),
        ((1, 1, 1), (0, 1, 1), 0),
        ((1, 1, 1), (256, 1, 1), 0),  # its launch bounds say 128
        ((1, 1, 1), (2048, 1, 1), 0),
        ((1, 1, 1), (1, 1, 65), 0),
        ((1, 1, 1), (128, 1, 1), 1 << 20),
    ],
)
def test_launches_beyond_the_limits(
    device: Device, module: Module, grid: tuple[int, int, int], block: tuple[int, int, int], smem: int
) -> None:
    params = PackedParams(scale_args(0, 0, 0, 0, 0.0))
    with pytest.raises(DriverError):
        module.function("conformance__scale").launch(grid, block, smem, device.stream(), params)
    device.synchronize()


def test_what_the_binary_says(module: Module) -> None:
    function = module.function("conformance__count")
    assert function.param_nbytes == [16, 8]
    assert function.num_registers > 0
    assert function.max_threads == 32
    assert 1 <= function.occupancy(32, 0) <= 64
    assert "conformance__scale" in module.symbols()
    with pytest.raises(CubinError, match="no kernel conformance__nothing"):
        module.function("conformance__nothing")


def test_a_launch_without_the_context(stub: session.Stub, device: Device, module: Module) -> None:
    """The simulated device is the stricter one: a real driver (580, H200) takes the context from the stream."""
    function, stream = module.function("conformance__scale"), device.stream()
    params = PackedParams(scale_args(0, 0, 0, 0, 0.0))
    device.__exit__(None, None, None)
    try:
        with pytest.raises(DriverError, match="no context is current on this thread: call inside `with device:`"):
            function.launch((1, 1, 1), (128, 1, 1), 0, stream, params)
    finally:
        device.__enter__()


@pytest.mark.parametrize("sm", [75, 86, 89, 90, 120])
def test_binaries_of_other_architectures(stub: session.Stub, sm: int) -> None:
    device = driver.open_device()
    with pytest.raises(NoKernelImage, match="another architecture"):
        device.load(fake_cubin({"a__x": FakeKernel()}, sm))
    device.close()
    assert stub.live() == {}


def test_what_is_no_binary_never_reaches_the_driver(stub: session.Stub) -> None:
    device = driver.open_device()
    for image in (b"", b".version 8.0", b"\x50\xed\x55\xba" + bytes(99), fake_cubin({})[:-9]):
        with pytest.raises(CubinError):
            device.load(image)
    assert stub.num_calls("cuModuleLoadData") == 0
    device.close()


def test_a_binary_whose_parameters_the_host_build_does_not_have(stub: session.Stub) -> None:
    device = driver.open_device()
    with pytest.raises(DriverError, match="INVALID_IMAGE"):
        device.load(fake_cubin({"conformance__scale": FakeKernel([40])}))
    assert "parameters" in stub.last_message()
    device.close()


@plants_a_bug
def test_a_kernel_that_fails_ends_the_context(stub: session.Stub) -> None:
    device = driver.open_device()
    with device:
        function = device.load(session.cubin_for_tests("bugs"), "bugs").function("bugs__null_pointer")
        stream, memory = device.stream(), device.alloc(1024)
        device.fill(memory.address, 0x3F, 1024, stream)
        function.launch((1, 1, 1), (128, 1, 1), 0, stream, PackedParams(memory.address, memory.address))
        with pytest.raises(ContextLost, match=r"ILLEGAL_ADDRESS.*start it again"):
            stream.synchronize()
        with pytest.raises(ContextLost):
            device.alloc(7)
    assert "bugs__null_pointer" in stub.last_message()
    device.close()


@plants_a_bug
def test_a_kernel_that_writes_past_its_output(stub: session.Stub) -> None:
    device = driver.open_device()
    with device:
        function = device.load(session.cubin_for_tests("bugs"), "bugs").function("bugs__global_overrun")
        stream, source, out = device.stream(), device.alloc(512), device.alloc(512)
        device.fill(source.address, 0, 512, stream)
        function.launch((1, 1, 1), (128, 1, 1), 0, stream, PackedParams(out.address, source.address))
        with pytest.raises(ContextLost):
            stream.synchronize()
    assert "bugs__global_overrun: memory after the allocation of 512 bytes" in stub.last_message()
    device.close()


def test_packed_parameters_are_an_array_of_pointers() -> None:
    args = np.array((1, 2), REDUCE)
    params = PackedParams(args, 0x1122334455667788)
    pointers = (ctypes.c_void_p * 2).from_address(params.address)
    assert ctypes.string_at(pointers[0] or 0, 16) == args.tobytes()
    assert ctypes.string_at(pointers[1] or 0, 8) == bytes.fromhex("8877665544332211")


# ---- what is shipped

needs_binaries = pytest.mark.skipif(not (FOLDER / "manifest.json").exists(), reason="no binaries have been built")


@needs_binaries
def test_every_shipped_binary_is_whole() -> None:
    manifest = read_manifest()
    for entry in manifest.entries.values():
        assert manifest.read(entry)[:4] == b"\x7fELF"


@needs_binaries
def test_the_library_loads_what_is_shipped(device: Device) -> None:
    library = KernelLibrary(device)
    for op in dict.fromkeys(op for op, _ in library.manifest.entries):
        entry = library.entries(op)[0]
        if entry.abi_hash != CONTRACTS[op].abi_hash:
            pytest.fail(f"{op}: the binaries are of another ABI; run build_cubins.py")
        for symbol in entry.kernels:
            if session.on_real_gpu() or op in ("embedding", "rms_norm"):
                function = library.function(symbol)
                struct = UNPACK_ARGS if symbol.startswith("pack_weight__unpack") else CONTRACTS[op].struct
                assert function.param_nbytes[0] == struct.itemsize


def test_a_kernel_comes_from_the_best_binary_that_has_it(stub: session.Stub, tmp_path: Path) -> None:
    """A set for one device exactly may hold a few kernels only; whatever else is asked for comes from the whole set."""
    stub.reset(CC="9.0")
    host = HostKernels(session.folder())
    held = {"80": ["none"], "90": ["none", "block_order"], "90a": ["block_order", "null_pointer"]}
    files = {}
    for arch, names in held.items():
        kernels = {f"bugs__{name}": FakeKernel(host.param_nbytes(f"bugs__{name}")) for name in names}
        image = fake_cubin(kernels, int(arch.rstrip("a")))
        (tmp_path / f"{arch}.cubin").write_bytes(image)
        about = {"op": "bugs", "arch": arch, "abi_hash": "", "kernels": list(kernels)}
        files[f"{arch}.cubin"] = about | {"sha256": hashlib.sha256(image).hexdigest()}
    (tmp_path / "manifest.json").write_text(json.dumps({"format": 1, "files": files}))
    device = driver.open_device()
    library = KernelLibrary(device, tmp_path)
    with device:
        assert [entry.arch for entry in library.entries("bugs")] == ["90a", "90"]
        for name, arch in (("none", "90"), ("block_order", "90a"), ("null_pointer", "90a")):
            entry = library.entries("bugs")[arch == "90"]
            assert library.function(f"bugs__{name}") is library.module(entry).function(f"bugs__{name}")
        library.load_all()
        with pytest.raises(CubinError, match="no kernel bugs__nothing"):
            library.function("bugs__nothing")
    device.close()


@needs_binaries
def test_a_binary_of_another_abi(device: Device, tmp_path: Path) -> None:
    text = (FOLDER / "manifest.json").read_text()
    hashes = {CONTRACTS[op].abi_hash for op in CONTRACTS}
    for value in hashes:
        text = text.replace(value, "0123456789abcdef")
    (tmp_path / "manifest.json").write_text(text)
    with pytest.raises(CubinError, match="built for other arguments of embedding"):
        KernelLibrary(device, tmp_path).function("embedding__f32")


@needs_binaries
@pytest.mark.parametrize("cc", ["7.0", "5.2", "8.7"])
def test_a_device_nothing_is_shipped_for(stub: session.Stub, cc: str) -> None:
    stub.reset(CC=cc)
    device = driver.open_device()
    with pytest.raises(NoKernelImage, match=rf"no kernels of any op for compute capability {cc} \(sm_"):
        KernelLibrary(device)
    device.close()
    assert stub.live() == {}
