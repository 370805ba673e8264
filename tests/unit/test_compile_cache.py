"""Compiled kernels on disk: kept, checked, rebuilt, done without."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest

from cpu_backend.compile import Library, ObjectCache
from cpu_backend.kernels import op_entry


def test_second_load_compiles_nothing(tmp_path: Path) -> None:
    compiled: list[tuple[str, int, int]] = []
    Library(ObjectCache(tmp_path)).load([op_entry("rms_norm")], lambda *step: compiled.append(step))
    assert compiled == [("rms_norm", 0, 1), ("", 1, 1)]
    Library(ObjectCache(tmp_path)).load([op_entry("rms_norm")], lambda *step: compiled.append(step))
    assert len(compiled) == 2
    assert [p.name for p in tmp_path.iterdir()] == ["rms_norm.o"]


@pytest.mark.parametrize("damage", [lambda d: d[:-1], lambda d: d[:40] + bytes([d[40] ^ 1]) + d[41:], lambda d: b""])
def test_damaged_objects_are_rebuilt(tmp_path: Path, damage, caplog: pytest.LogCaptureFixture) -> None:  # type: ignore[no-untyped-def]
    Library(ObjectCache(tmp_path)).load([op_entry("rms_norm")])
    file = tmp_path / "rms_norm.o"
    whole = file.read_bytes()
    file.write_bytes(damage(whole))
    with caplog.at_level(logging.WARNING, "gllm_driver.cpu"):
        Library(ObjectCache(tmp_path)).load([op_entry("rms_norm")])
    assert "is damaged and will be rebuilt" in caplog.text
    assert len(file.read_bytes()) == len(whole)


def test_without_a_writable_directory_kernels_stay_in_memory(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "file").write_text("in the way")
    with caplog.at_level(logging.WARNING, "gllm_driver.cpu"):
        addresses = Library(ObjectCache(tmp_path / "file" / "cache")).load([op_entry("rms_norm"), op_entry("linear")])
    assert all(addresses.values())
    assert caplog.text.count("cannot be kept in") == 1


def test_a_warm_start_imports_no_numba(tmp_path: Path) -> None:
    code = (
        "import sys; from cpu_backend.compile import Library; from cpu_backend.kernels import op_entry;"
        "Library().load([op_entry('rms_norm')]); print('numba' in sys.modules)"
    )
    outputs = [
        subprocess.run(
            [sys.executable, "-c", code],
            capture_output=True,
            text=True,
            check=True,
            env={**os.environ, "GLLM_CACHE_DIR": str(tmp_path)},
        ).stdout.strip()
        for _ in range(2)
    ]
    assert outputs == ["True", "False"]
