"""Looking for devices never raises and always says why; most of it in processes of their own."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from hostsim import build, session

from gllm_driver import driver

ROOT = Path(__file__).parents[2]
needs_no_gpu = pytest.mark.skipif(session.on_real_gpu(), reason="there is a driver")


def probe_in_process(environment: dict[str, str], code: str = "") -> str:
    """What a fresh process finds, one line per device: usable, name, reason."""
    code = code or (
        "from gllm_driver.driver import probe\n"
        "for d in probe(['80', '90']): print(d.usable, d.device, d.reason, sep=' | ')"
    )
    clean = {k: v for k, v in os.environ.items() if not k.startswith("HOSTSIM_") and k != "LD_LIBRARY_PATH"}
    environment = clean | {"PYTHONPATH": str(ROOT)} | environment
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@needs_no_gpu
def test_no_driver() -> None:
    assert probe_in_process({}) == "False | cuda | no NVIDIA driver: libcuda.so.1 was not found or cannot be loaded"


@needs_no_gpu
def test_no_driver_loads_no_binding() -> None:
    code = "import sys\nfrom gllm_driver.driver import probe\nprobe(['80'])\nprint('cuda' in sys.modules)"
    assert probe_in_process({}, code) == "False"


@needs_no_gpu
def test_a_library_that_is_none(tmp_path: Path) -> None:
    (tmp_path / "libcuda.so.1").write_bytes(b"not a library")
    assert probe_in_process({"LD_LIBRARY_PATH": str(tmp_path)}).startswith("False | cuda | no NVIDIA driver")


@needs_no_gpu
def test_a_library_without_entry_points(tmp_path: Path) -> None:
    compiler = shutil.which("g++") or pytest.skip("needs g++")
    command = [compiler, "-shared", "-x", "c++", "/dev/null", "-Wl,-soname,libcuda.so.1"]
    subprocess.run([*command, "-o", str(tmp_path / "libcuda.so.1")], check=True)
    found = probe_in_process({"LD_LIBRARY_PATH": str(tmp_path)})
    assert found.startswith("False | cuda | no NVIDIA driver")


@needs_no_gpu
def test_the_printed_folder_is_all_it_takes() -> None:
    folder = {"LD_LIBRARY_PATH": str(session.folder())}
    assert (
        probe_in_process(folder)
        == "True | cuda:0 | compute capability 8.0, kernels of sm_80, which have never run on hardware"
    )
    found = probe_in_process(folder | {"HOSTSIM_CC": "7.0,8.6,9.0"}).splitlines()
    assert found == [
        "False | cuda:0 | no kernels for compute capability 7.0; there are sm_80, sm_90",
        "True | cuda:1 | compute capability 8.6, kernels of sm_80, which have never run on hardware",
        "True | cuda:2 | compute capability 9.0, kernels of sm_90",
    ]
    assert "too old" in probe_in_process(folder | {"HOSTSIM_DRIVER": "12040"})


@needs_no_gpu
def test_only_the_driver_is_in_the_process() -> None:
    code = (
        "from gllm_driver.driver import open_device\n"
        "d = open_device(); b = d.alloc(1000); d.close()\n"
        "import sys\n"
        "maps = open('/proc/self/maps').read()\n"
        "print('cudart' in maps, 'libcuda.so.1' in maps, 'cuda.bindings.runtime' in sys.modules)"
    )
    assert probe_in_process({"LD_LIBRARY_PATH": str(session.folder())}, code) == "False True False"


@pytest.mark.parametrize(
    ("faults", "reason"),
    [
        ("cuInit:*=100", "sees no NVIDIA GPU"),
        ("cuInit:*=999", "the NVIDIA driver does not work: cuInit failed with CUDA_ERROR_UNKNOWN (999)"),
        ("cuDriverGetVersion:*=1", "the NVIDIA driver does not work"),
        ("cuDeviceGetCount:*=999", "cuDeviceGetCount failed"),
        ("cuDeviceGetAttribute:*=999", "cuDeviceGetAttribute failed"),
    ],
)
def test_a_broken_driver(stub: session.Stub, faults: str, reason: str) -> None:
    stub.set_faults(faults)
    found = driver.probe(["80"])
    assert [d.usable for d in found] == [False]
    assert reason in found[0].reason
    assert "\n" not in found[0].reason
    assert stub.live() == {}


def test_no_devices(stub: session.Stub) -> None:
    stub.reset(CC=",")
    found = driver.probe(["80"])
    assert [d.usable for d in found] == [False] or found[0].cc == (0, 0)


def test_no_kernels_at_all(stub: session.Stub) -> None:
    assert driver.probe([])[0].reason == "no kernels for compute capability 8.0; there are none at all"


def test_probing_opens_nothing(stub: session.Stub) -> None:
    found = driver.probe(["80"])
    assert found[0].usable
    assert found[0].total_nbytes == 4 << 30
    assert stub.num_calls("cuDevicePrimaryCtxRetain") == 0
    assert stub.live() == {}


def test_the_stub_is_no_part_of_the_package() -> None:
    packaged = [p for top in ("gllm_driver", "cpu_backend") for p in (ROOT / top).rglob("*.so*")]
    assert packaged == []
    assert build.HERE.is_relative_to(ROOT / "tests")
