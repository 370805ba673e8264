"""The stub speaks the driver's binary interface, and cubins written by nvcc are read as the driver reads them."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from gllm_driver import driver
from hostsim import build, session
from hostsim.direct import HostKernels

pytestmark = pytest.mark.skipif(session.on_real_gpu(), reason="about the simulated device")

ABI = (build.HERE / "stub" / "abi.h").read_text()


def test_codes_are_the_drivers() -> None:
    from cuda.bindings import driver as cu

    codes = re.findall(r"X\((\w+), (\d+)\)", ABI)
    assert len(codes) > 30
    for name, code in codes:
        full = "CUDA_SUCCESS" if name == "SUCCESS" else f"CUDA_ERROR_{name}"
        assert int(getattr(cu.CUresult, full)) == int(code), name


@pytest.mark.parametrize(
    ("namespace", "enumeration", "prefix"),
    [
        ("attribute", "CUdevice_attribute", "CU_DEVICE_ATTRIBUTE"),
        ("function_attribute", "CUfunction_attribute", "CU_FUNC_ATTRIBUTE"),
    ],
)
def test_attributes_are_the_drivers(namespace: str, enumeration: str, prefix: str) -> None:
    from cuda.bindings import driver as cu

    body = re.search(rf"namespace {namespace} \{{.*?\n(.*?)\n\}}", ABI, re.DOTALL)
    assert body is not None
    constants = re.findall(r"(\w+) = (\d+)", body[1])
    assert constants
    for name, value in constants:
        assert int(getattr(getattr(cu, enumeration), f"{prefix}_{name}")) == int(value), name


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc")
def test_a_cubin_from_nvcc_says_what_the_tables_say(tmp_path: Path) -> None:
    out = tmp_path / "conformance.cubin"
    command = ["nvcc", "-std=c++17", "-cubin", "-arch=sm_80", f"-I{build.KERNELS}", "-o", str(out)]
    subprocess.run([*command, str(build.TEST_KERNELS / "conformance.cu")], check=True, capture_output=True)
    session.stub().reset()
    device = driver.open_device()
    with device:
        module = device.load(out.read_bytes(), "conformance")
        count, ldmatrix = module.function("conformance__count"), module.function("conformance__ldmatrix")
        assert (count.param_nbytes, count.max_threads, count.binary_arch) == ([16, 8], 32, 80)
        assert count.num_registers > 0
        assert (ldmatrix.max_threads, ldmatrix.static_smem_nbytes) == (32, 2048)
        assert module.symbols() == [n for n in HostKernels(session.folder()).names() if n.startswith("conformance__")]
    device.close()


def test_objects_left_behind_are_counted() -> None:
    stub = session.stub()
    stub.reset()
    device = driver.open_device()
    with device:
        keep = device.alloc(10), device.stream(), device.event(), device.pinned(10)
        graph = keep[1].capture(lambda: None)
        module = device.load(session.cubin_for_tests("bugs"))
    assert stub.live() == dict.fromkeys(
        ("device memory", "pinned memory", "streams", "events", "graph execs", "modules", "contexts"), 1
    )
    device.close()
    assert stub.live() == {}
    del graph, module


def test_the_last_line_printed_is_the_folder(tmp_path: Path) -> None:
    """With one op only: the whole build is what the other tests run on."""
    done = subprocess.run(
        [sys.executable, str(build.HERE / "build.py"), "--op", "rms_norm", "--out", str(tmp_path)],
        capture_output=True,
        text=True,
        check=True,
    )
    folder = Path(done.stdout.splitlines()[-1])
    assert folder == tmp_path
    assert sorted(p.name for p in folder.glob("lib*")) == ["libcuda.so.1", "libkernels_host.so"]


def test_builds_of_a_part_have_their_own_folder() -> None:
    names = [build.default_folder(*a).name for a in ((), ("asan",), ("asan", ["linear"]), ("none", []))]
    assert names == ["hostsim", "hostsim-asan", "hostsim-asan-linear", "hostsim-tests"]


def test_a_kernel_that_does_not_compile(tmp_path: Path) -> None:
    source = tmp_path / "broken.cu"
    source.write_text('#include "common/dev.cuh"\nextern "C" __global__ void broken__x(int *p) { *p = nonsense; }\n')
    with pytest.raises(build.BuildError, match=r"broken\.cu.*nonsense"):
        build.Builder(tmp_path, "none", "g++").kernels(source)
    source.write_text('#include "common/dev.cuh"\nint x;\n')
    with pytest.raises(build.BuildError, match="no kernel"):
        build.Builder(tmp_path, "none", "g++").kernels(source)
