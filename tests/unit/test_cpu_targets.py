"""Kernels are built for CPUs that are not here, and their inner loops use those CPUs' vector instructions."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

# Prints the assembly of the entries named on the command line for the target in GLLM_CPU_TARGET.
SCRIPT = """
import sys
import llvmlite.binding as llvm
from cpu_backend.compile import optimized_module
from cpu_backend.kernels import OPS, op_entry, table_entries
from cpu_backend.target import current

llvm.initialize_all_targets()
llvm.initialize_all_asmprinters()
target = current()
machine = llvm.Target.from_triple(target.triple).create_target_machine(
    cpu=target.cpu, features=target.features, opt=3, reloc="pic", codemodel="small"
)
entries = [op_entry(op) for op in OPS]
entries += [entry for _, _, entry in table_entries(sys.argv[1:])]
for entry in entries:
    print(f"=== {entry.name}")
    print(machine.emit_assembly(optimized_module(entry, target, machine)))
"""

# One of each way to store weights
DTYPES = ("f32", "f16", "bf16", "q8_0", "q4_0", "q4_k", "q6_k", "iq4_nl", "int1_32")

# target → entry → instructions its assembly must contain
FMA, ROUND_TRIP = r"vfmadd\d+ps", r"vcvtph2ps"
EXPECTED = {
    "x86-64-v3": {
        "register": r"%ymm\d+",
        "matmul_f32": [FMA],
        "matmul_f16": [FMA, ROUND_TRIP],
        "matmul_bf16": [FMA, r"vpslld"],
        "matmul_q8_0": [r"vpsignb", r"vpmaddubsw", r"vpmaddwd", FMA],
        **{f"matmul_{name}": [r"vpmaddubsw", r"vpmaddwd", FMA] for name in DTYPES[4:]},
        "matmul_iq4_nl": [r"vpshufb", r"vpmaddubsw", FMA],
        "weigh_f16": [FMA, ROUND_TRIP],
    },
    "x86-64-v4": {
        "register": r"%zmm\d+",
        "matmul_f32": [FMA],
        "matmul_f16": [FMA, ROUND_TRIP],
        "matmul_bf16": [FMA, r"vpslld"],
        **{f"matmul_{name}": [r"vpdpbusd", FMA] for name in DTYPES[3:]},
        "matmul_q4_k": [r"vpdpbusd", r"vpermt2|vpermi2", FMA],
        "matmul_iq4_nl": [r"vpdpbusd", r"vpshufb", FMA],
        "weigh_f16": [FMA, ROUND_TRIP],
    },
    "aarch64": {
        "register": r"v\d+\.4s",
        "matmul_f32": [r"fmla"],
        "matmul_f16": [r"fmla", r"fcvtl"],
        "matmul_bf16": [r"fmla", r"shll|ushll"],
        **{f"matmul_{name}": [r"sdot", r"fmla"] for name in DTYPES[3:]},
        "matmul_iq4_nl": [r"sdot", r"tbl", r"fmla"],
        "weigh_f16": [r"fmla", r"fcvtl"],
    },
}
# Kernels whose work on rows is vector code too, apart from the functions above that they call.
VECTOR_OPS = ("rms_norm", "fused_qkv_rope", "fused_gate_up_silu", "flash_attention", "paged_attention", "linear")


@pytest.mark.parametrize("target", EXPECTED)
def test_hot_loops_use_the_targets_vector_instructions(target: str) -> None:
    run = subprocess.run(
        [sys.executable, "-c", SCRIPT, *DTYPES],
        capture_output=True,
        text=True,
        env={**os.environ, "GLLM_CPU_TARGET": target},
    )
    assert run.returncode == 0, run.stderr[-2000:]
    assembly = dict(part.split("\n", 1) for part in run.stdout.split("=== ")[1:])
    expected = dict(EXPECTED[target])
    register = expected.pop("register")
    for entry in VECTOR_OPS:
        assert re.search(str(register), assembly[entry]), f"{entry} has no {register} for {target}"
    for entry, patterns in expected.items():
        assert re.search(str(register), assembly[entry]), f"{entry} has no {register} for {target}"
        for pattern in patterns:
            assert re.search(pattern, assembly[entry]), f"{entry} has no {pattern} for {target}"


def test_kernels_for_a_lower_level_run_here() -> None:
    import llvmlite.binding as llvm

    if not all(llvm.get_host_cpu_features().get(name) for name in ("avx2", "fma", "f16c")):
        pytest.skip("this CPU cannot run x86-64-v3 code")
    names = ("q8_0", "q4_0", "q4_k", "q6_k", "iq4_nl", "int8_64z", "int2_128m", "int1_32")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/ops/test_cpu_blocks.py"]
    run = subprocess.run(
        [*command, "-k", f"any_bytes and ({' or '.join(names)})"],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[2],
        env={**os.environ, "GLLM_CPU_TARGET": "x86-64-v3"},
    )
    assert run.returncode == 0, run.stdout[-3000:]
    assert " passed" in run.stdout


def test_unknown_target_is_named() -> None:
    run = subprocess.run(
        [sys.executable, "-c", "from cpu_backend.target import current; current()"],
        capture_output=True,
        text=True,
        env={**os.environ, "GLLM_CPU_TARGET": "pentium"},
    )
    assert run.returncode != 0
    assert "BackendUnavailableError" in run.stderr
    assert "'pentium' is not one of host, x86-64-v3" in run.stderr
