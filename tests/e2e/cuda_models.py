"""The CUDA backend on a test's device: the simulated one with cubins made up for its kernels, or a real GPU."""

from __future__ import annotations

import functools
import hashlib
import json
import os
import re
import shutil
import tempfile
from pathlib import Path
from typing import Any

import pytest
from hostsim import session
from oracle import tiny_models, to_gguf

import gllm_driver as gllm
from gllm_driver.driver.manifest import FOLDER, FORMAT
from gllm_driver.llm import demo_model_path
from gllm_driver.loaders.open import open_checkpoint
from gllm_driver.ops import CONTRACTS
from gllm_driver.placement import Sharing, place

SIMULATED_ARCH = "80"
TENSOR_CORE_KERNEL = re.compile(r"__(dot|gemv|mma|slots|bytes|rows_b?f16|split|b?f16_d)")
ORDER = {name: os.environ[f"HOSTSIM_{name}"] for name in ("ORDER", "SEED") if f"HOSTSIM_{name}" in os.environ}


def fresh(**settings: str) -> session.Stub:
    """The simulated device as a new process finds it, but for `settings`; the order of threads is what CI asks for."""
    stub = session.stub()
    stub.reset(**ORDER, **settings)
    return stub


@functools.cache
def kernels(arch: str = SIMULATED_ARCH) -> Path:
    """A folder of kernel binaries: the shipped ones on a real GPU, else stand-ins for what the simulated device has.

    Those of architectures before sm_80 lack the kernels that TENSOR_CORE_KERNELS in the sources leaves out.
    """
    if session.on_real_gpu():
        return FOLDER
    if shutil.which("g++") is None:
        pytest.skip("the simulated device needs g++")
    from hostsim.direct import HostKernels
    from hostsim.fake_cubin import FakeKernel, fake_cubin

    folder = Path(tempfile.mkdtemp(prefix="gllm-cubins-"))
    host = HostKernels(session.folder())
    files: dict[str, Any] = {}
    for op, contract in CONTRACTS.items():
        names = [name for name in host.names() if name.startswith(f"{op}__")]
        if int(arch) < 80:
            names = [name for name in names if not TENSOR_CORE_KERNEL.search(name)]
        image = fake_cubin({n: FakeKernel(host.param_nbytes(n)) for n in names}, int(arch))
        file = f"{op}.cubin"
        (folder / file).write_bytes(image)
        files[file] = {
            "op": op,
            "arch": arch,
            "abi_hash": contract.abi_hash,
            "sha256": hashlib.sha256(image).hexdigest(),
            "kernels": names,
        }
    (folder / "manifest.json").write_text(json.dumps({"format": FORMAT, "files": files}))
    return folder


def open_cuda(**options: Any) -> Any:
    """A CudaBackend."""
    from gllm_driver.backends.cuda import CudaBackend

    return CudaBackend(**{"kernels": kernels(), **options})


def load_cuda(
    path: Path | None = None,
    *,
    dtype: str = "auto",
    context_length: int | None = None,
    sharing: Sharing | None = None,
    **options: Any,
) -> gllm.LLM:
    """A model on the device under test; None is the demonstration model. `options` are those of CudaBackend."""
    checkpoint = open_checkpoint(demo_model_path() if path is None else path, progress=False)
    # Tests write into pages directly, so none may be found again as a prefix; one context's memory, as they count it.
    sharing = sharing or Sharing(max_batch=1, prefix_reuse=False)
    engine = place(checkpoint, open_cuda(**options), dtype, context_length, None, sharing, True)
    return gllm.LLM(checkpoint, engine.backend, engine, 0.0)


_models = Path(tempfile.mkdtemp(prefix="gllm-tiny-"))


def tiny(name: str, file_type: str = "") -> Path:
    """A tiny model as a Hugging Face directory, or as a GGUF of `file_type`; made at its first use."""
    row = tiny_models.BY_NAME[name]
    path = _models / (f"{name}-{file_type}.gguf" if file_type else name)
    if path.exists():
        return path
    return to_gguf.convert(row, path, file_type) if file_type else tiny_models.build(row, path)  # type: ignore[arg-type]
