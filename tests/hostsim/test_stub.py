"""The stub speaks the driver's binary interface, and cubins written by nvcc are read as the driver reads them."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from gllm_driver import driver
from hostsim import build, session

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
        count, named = module.function("conformance__count"), module.function("conformance__named_barrier")
        assert (count.param_nbytes, count.max_threads, count.binary_arch) == ([16, 8], 32, 80)
        assert count.num_registers > 0
        assert (named.max_threads, named.static_smem_nbytes) == (128, 512)
        assert len(module.symbols()) == 10
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


def test_a_folder_is_the_last_line_printed() -> None:
    done = subprocess.run(
        ["python", str(build.HERE / "build.py"), "--help"], capture_output=True, text=True, check=True
    )
    assert "last line" not in done.stderr
    assert build.default_folder().name == "hostsim"
    assert build.default_folder("asan", ["linear"]).name == "hostsim-asan-linear"
