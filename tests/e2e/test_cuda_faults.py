"""What the CUDA backend does when device, driver or binaries fail: typed errors, and nothing left behind."""

from __future__ import annotations

import json
import logging
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from cuda_models import kernels, load_cuda, open_cuda, tiny
from hostsim import session

import gllm_driver as gllm
from gllm_driver import driver
from gllm_driver.backends import select
from gllm_driver.backends.cuda.transfer import MAX_WORKERS
from gllm_driver.driver.manifest import read_manifest
from gllm_driver.errors import (
    BackendError,
    BackendUnavailableError,
    CapacityError,
    ContextLost,
    CubinError,
    DriverError,
    ModelFormatError,
)
from gllm_driver.loaders.open import open_checkpoint
from gllm_driver.models.decoder import model_weights
from gllm_driver.ops import CONTRACTS
from gllm_driver.types import Tensor

pytestmark = pytest.mark.hostsim

MODEL = "qwen2_bias"
PROMPT = [5, 9, 2, 7]
ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def stub() -> Iterator[session.Stub]:
    """The simulated device as new; nothing may be left on it, unless its context was lost."""
    if session.on_real_gpu():
        pytest.skip("tells the simulated device what to do")
    stub = session.stub()
    stub.reset()
    yield stub
    stub.set_faults("")
    assert stub.live() == {}


def generate(llm: gllm.LLM) -> list[int]:
    return llm.generate(PROMPT, max_tokens=6, temperature=0, ignore_eos=True).tokens


@pytest.fixture(scope="module")
def expected() -> list[int]:
    with gllm.load(tiny(MODEL), device="cpu", context_length=64) as llm:
        return generate(llm)


# ---- memory


def test_a_model_too_large_for_the_device_is_refused_before_anything_is_copied(stub: session.Stub) -> None:
    stub.reset(MEM="100000")
    stub.set_faults("")  # counts calls from here
    with pytest.raises(CapacityError, match=r"the weights need .* free"):
        load_cuda(tiny(MODEL), context_length=64)
    assert stub.num_calls("cuMemcpyHtoDAsync") == stub.num_calls("cuMemAlloc") == 0 < stub.num_calls("cuMemGetInfo")


def test_a_cache_too_large_for_the_device_is_refused(stub: session.Stub) -> None:
    weights = open_checkpoint(tiny(MODEL), progress=False).nbytes
    stub.reset(MEM=str(weights + 100_000))
    with pytest.raises(CapacityError, match="a KV cache of 512 tokens needs"):
        load_cuda(tiny(MODEL), context_length=512)


def test_the_default_context_is_what_fits_beside_the_weights(stub: session.Stub, expected: list[int]) -> None:
    weights = open_checkpoint(tiny(MODEL), progress=False).nbytes
    stub.reset(MEM=str(weights + 400_000))
    with load_cuda(tiny(MODEL)) as llm:
        assert 64 < llm.context_length < llm.arch.context_length
        assert generate(llm) == expected


@pytest.mark.parametrize("number", [1, 2, 5, 8])
def test_no_room_for_a_step_ends_that_request_alone(stub: session.Stub, number: int, expected: list[int]) -> None:
    with load_cuda(tiny(MODEL), context_length=64) as llm:
        stub.set_faults(f"cuMemAlloc:{number}=2,cuMemAlloc:{number + 1}=2")  # the pool may try twice
        with pytest.raises(CapacityError, match="no room on"):
            generate(llm)
        stub.set_faults("")
        assert generate(llm) == expected
        llm._engine.pool.audit()


@pytest.mark.parametrize("name", ["cuMemHostAlloc", "cuStreamCreateWithPriority", "cuModuleLoadData", "cuEventCreate"])
def test_a_load_that_fails_leaves_nothing(stub: session.Stub, name: str) -> None:
    stub.set_faults(f"{name}:1=2")
    with pytest.raises(BackendError):
        load_cuda(tiny(MODEL), context_length=64)
    assert 1 <= stub.num_calls(name) <= MAX_WORKERS  # threads of the upload may ask at the same time


# ---- failing work


@pytest.mark.parametrize(
    "fault", ["cuLaunchKernel:3=1", "cuGraphInstantiate:1=999", "cuStreamEndCapture:1=901", "cuGraphLaunch:2=999"]
)
def test_a_call_that_fails_ends_that_request_alone(stub: session.Stub, fault: str, expected: list[int]) -> None:
    with load_cuda(tiny(MODEL), context_length=64) as llm:
        stub.set_faults(fault)
        with pytest.raises(DriverError) as caught:
            generate(llm)
        assert not isinstance(caught.value, ContextLost)
        stub.set_faults("")
        assert generate(llm) == expected


@pytest.mark.parametrize("fault", ["cuLaunchKernel:5=700", "cuGraphLaunch:2=719", "cuEventSynchronize:3=700"])
def test_a_lost_context_says_so_from_then_on(stub: session.Stub, fault: str) -> None:
    llm = load_cuda(tiny(MODEL), context_length=64)
    stub.set_faults(fault)
    for _ in range(2):
        with pytest.raises(ContextLost, match="start it again"):
            generate(llm)
    llm.close()  # quietly: the first error said what happened
    stub.reset()
    with load_cuda(tiny(MODEL), context_length=64) as fresh:
        assert generate(fresh)


# ---- weights


@pytest.mark.parametrize("dtype", ["auto", "f16", "bf16"])
def test_weights_that_are_no_numbers_are_named(dtype: str) -> None:
    checkpoint = open_checkpoint(tiny(MODEL), progress=False)
    weights = model_weights(checkpoint, 64)
    damaged = weights.tensors["layers.1.down"].to_numpy().copy()
    damaged[3, 5] = np.inf
    tensors = {**weights.tensors, "layers.1.down": Tensor.from_numpy(damaged)}
    backend = open_cuda()
    try:
        with pytest.raises(ModelFormatError) as caught:
            backend.upload_weights(type(weights)(**{**vars(weights), "tensors": tensors}), dtype=dtype)
        index = 3 * damaged.shape[1] + 5
        assert f"NaN or infinite value at element {index}:" in str(caught.value)
        assert caught.value.tensor == "model.layers.1.mlp.down_proj.weight"
    finally:
        backend.close()


# ---- binaries and architectures


def damaged_kernels(folder: Path, damage: str) -> Path:
    shutil.copytree(kernels(), folder)
    path = folder / "linear.cubin"
    data = path.read_bytes()
    if damage == "truncated":
        path.write_bytes(data[: len(data) // 2])
    elif damage == "ptx":
        path.write_text("//\n.version 8.0\n.target sm_80\n")
    elif damage == "another file":
        shutil.copy(folder / "sample.cubin", path)
    elif damage == "other arguments":
        manifest = json.loads((folder / "manifest.json").read_text())
        manifest["files"]["linear.cubin"]["abi_hash"] = "0" * 16
        (folder / "manifest.json").write_text(json.dumps(manifest))
    elif damage == "missing":
        path.unlink()
    return folder


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ("truncated", "cut off or damaged"),
        ("ptx", "PTX"),
        ("another file", "not the file the manifest describes"),
        ("other arguments", "built for other arguments of linear"),
        ("missing", "No such file"),
    ],
)
def test_damaged_binaries_are_refused_by_name(tmp_path: Path, damage: str, message: str) -> None:
    folder = damaged_kernels(tmp_path / "cubin", damage)
    with pytest.raises(CubinError, match=message) as caught:
        load_cuda(tiny(MODEL), context_length=64, kernels=folder)
    assert "linear.cubin" in str(caught.value)


@pytest.mark.parametrize("cc", ["7.0", "9.0"])
def test_an_architecture_without_kernels_is_refused(stub: session.Stub, cc: str) -> None:
    stub.reset(CC=cc)
    with pytest.raises(BackendUnavailableError, match=rf"compute capability {cc} \(sm_80\)"):
        open_cuda()


# ---- the choice of a device


@pytest.fixture
def shipped(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if the stand-ins for kernels were those of the package."""
    from gllm_driver.backends.cuda import backend

    class WithKernels(backend.CudaBackend):
        def __init__(self, index: int, **options: object) -> None:
            super().__init__(index, kernels=kernels(), **options)  # type: ignore[arg-type]

    archs = read_manifest(kernels()).archs
    monkeypatch.setattr(select, "probe", lambda: driver.probe(archs))
    monkeypatch.setattr("gllm_driver.backends.cuda.CudaBackend", WithKernels)


@pytest.mark.usefixtures("shipped")
def test_auto_takes_the_gpu_and_numbers_choose_among_several(stub: session.Stub) -> None:
    stub.reset(CC="7.0,8.0,8.6")
    assert [(d.name, d.usable) for d in select.devices()][:3] == [("cuda:0", False), ("cuda:1", True), ("cuda:2", True)]
    for device, name in (("auto", "cuda:1"), ("cuda", "cuda:1"), ("cuda:2", "cuda:2"), ("cpu", "cpu")):
        backend = select.open_backend(device)
        assert backend.name == name
        backend.close()
    with pytest.raises(BackendUnavailableError, match=r"no kernels for compute capability 7\.0"):
        select.open_backend("cuda:0")
    with pytest.raises(BackendUnavailableError, match="no such device, there are cuda:0, cuda:1, cuda:2"):
        select.open_backend("cuda:3")


@pytest.mark.usefixtures("shipped")
@pytest.mark.parametrize(
    ("settings", "reason"),
    [({"CC": "7.0"}, "no kernels for compute capability 7.0"), ({"DRIVER": "12080"}, "driver is too old")],
)
def test_auto_goes_to_the_cpu_where_no_gpu_serves(stub: session.Stub, settings: dict[str, str], reason: str) -> None:
    stub.reset(**settings)
    assert reason in select.devices()[0].reason
    backend = select.open_backend("auto")
    assert backend.name == "cpu"
    backend.close()
    with pytest.raises(BackendUnavailableError, match=reason):
        select.open_backend("cuda")


@pytest.mark.usefixtures("shipped")
@pytest.mark.parametrize("code", [2, 46])  # no memory for a context; another process has the device for itself
def test_auto_goes_to_the_cpu_where_no_context_can_be_had(stub: session.Stub, code: int) -> None:
    stub.reset(FAULTS=f"cuDevicePrimaryCtxRetain:1={code}")
    with gllm.load(tiny(MODEL), context_length=64) as llm:
        assert llm.device == "cpu"
    stub.reset(FAULTS=f"cuDevicePrimaryCtxRetain:1={code}")
    with pytest.raises(BackendUnavailableError, match="cuda:0"):
        gllm.load(tiny(MODEL), device="cuda", context_length=64)


@pytest.mark.usefixtures("shipped")
@pytest.mark.parametrize("settings", [{"MEM": "100000"}, {"FAULTS": "cuModuleLoadData:2=200"}])
def test_auto_goes_to_the_cpu_with_a_warning_when_the_gpu_cannot_take_the_model(
    stub: session.Stub, settings: dict[str, str], caplog: pytest.LogCaptureFixture
) -> None:
    stub.reset(**settings)
    with caplog.at_level(logging.WARNING), gllm.load(tiny(MODEL), context_length=64) as llm:
        assert llm.device == "cpu"
    assert "using the CPU: " in caplog.text
    stub.reset(**settings)
    with pytest.raises((CapacityError, BackendError)):
        gllm.load(tiny(MODEL), device="cuda", context_length=64)


def test_without_a_driver_the_reason_is_one_line() -> None:
    environment = {k: v for k, v in os.environ.items() if k != "LD_LIBRARY_PATH"}
    code = (
        "from gllm_driver.backends import select\n"
        "backend = select.open_backend('auto'); print(backend.name); backend.close()\n"
        "print(select.devices()[0].reason)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True, check=True
    )
    lines = done.stdout.splitlines()
    if lines[0] != "cpu":
        pytest.skip("this machine has a GPU")
    assert len(lines) == 2
    assert lines[1]


def test_the_command_line_on_the_simulated_device_with_the_shipped_binaries() -> None:
    """LD_LIBRARY_PATH and nothing else."""
    try:
        entries = read_manifest().entries
    except CubinError as error:
        pytest.skip(str(error))
    if missing := [op for op in CONTRACTS if (op, "80") not in entries]:
        pytest.skip(f"no binaries for {', '.join(missing)}: run build_cubins.py")
    line = "generate --device cuda --tokens 5,9,2,7 --max-tokens 6 --temperature 0 --ignore-eos --json --context 64"
    done = subprocess.run(
        [sys.executable, "-m", "gllm_driver", *line.split(), "--model", str(tiny(MODEL))],
        cwd=ROOT,
        env={**os.environ, "LD_LIBRARY_PATH": str(session.folder())},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["device"] == "cuda:0"
    assert result["traffic"]["d2h_bytes"] == 4 * 6
