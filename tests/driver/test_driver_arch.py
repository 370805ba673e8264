"""Which binaries run where: the rule, and files that are no binaries."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hostsim.fake_cubin import FakeKernel, fake_cubin

from gllm_driver.driver.arch import choose_archs
from gllm_driver.driver.manifest import check_cubin, read_manifest
from gllm_driver.errors import CubinError

SHIPPED = ["75", "80", "86", "89", "90", "90a", "100", "120"]


@pytest.mark.parametrize(
    ("archs", "cc", "best_first"),
    [
        (SHIPPED, (8, 0), ["80"]),
        (SHIPPED, (8, 6), ["86", "80"]),
        (SHIPPED, (8, 9), ["89", "86", "80"]),
        (["80"], (8, 9), ["80"]),
        (["86", "89"], (8, 0), []),  # a later minor revision does not run on an earlier one
        (SHIPPED, (9, 0), ["90a", "90"]),
        (["90a"], (9, 0), ["90a"]),
        (["100a"], (10, 3), []),  # made for one device exactly
        (SHIPPED, (10, 3), ["100"]),
        (SHIPPED, (12, 1), ["120"]),
        (SHIPPED, (11, 0), []),
        (SHIPPED, (7, 0), []),
        (SHIPPED, (6, 1), []),
        (SHIPPED, (8, 7), []),  # a system on a chip: binaries of others do not run there
        (["80", "87"], (8, 7), ["87"]),
        (["87"], (8, 9), []),
        (["75"], (7, 2), []),
        ([], (8, 0), []),
    ],
)
def test_choice(archs: list[str], cc: tuple[int, int], best_first: list[str]) -> None:
    assert choose_archs(archs, cc) == best_first


@pytest.mark.parametrize("name", ["", "sm_80", "8.0", "80b", "8", "compute_80", "1000"])
def test_unknown_architecture_names(name: str) -> None:
    with pytest.raises(CubinError, match="no architecture"):
        choose_archs([name], (8, 0))


KERNELS = {"a__x": FakeKernel([40], 128), "a__y": FakeKernel([40, 8], 256, 64, 1024)}


@pytest.mark.parametrize(("sm", "abi"), [(80, 8), (90, 8), (121, 8), (80, 7)])
def test_a_cubin_passes(sm: int, abi: int) -> None:
    check_cubin(fake_cubin(KERNELS, sm, abi), str(sm), "x")
    if sm == 90:
        check_cubin(fake_cubin(KERNELS, sm, abi), "90a", "x")


CUBIN = fake_cubin(KERNELS)


@pytest.mark.parametrize(
    ("data", "problem"),
    [
        (b"", "no ELF file"),
        (b"\n.version 8.0\n.target sm_80\n.address_size 64\n", "PTX"),
        (b"\x50\xed\x55\xba" + bytes(100), "a fatbin"),
        (b"\xb1\x43\x62\x46" + bytes(100), "a fatbin"),
        (CUBIN[:50], "cut off after 50 bytes"),
        (CUBIN[:-1], "cut off"),
        (CUBIN[: len(CUBIN) // 2], "cut off"),
        (CUBIN[:18] + b"\x3e\x00" + CUBIN[20:], "machine 62, not for an NVIDIA GPU"),
        (CUBIN[:4] + b"\x01" + CUBIN[5:], "not for an NVIDIA GPU"),
        (fake_cubin(KERNELS, 86), "built for sm_86, expected sm_80"),
    ],
)
def test_what_is_no_cubin(data: bytes, problem: str) -> None:
    with pytest.raises(CubinError, match=problem):
        check_cubin(data, "80", "x.cubin")


def test_every_cut_is_seen() -> None:
    for nbytes in range(len(CUBIN)):
        with pytest.raises(CubinError):
            check_cubin(CUBIN[:nbytes], "80", "x")


def write_manifest(folder: Path, **changes: object) -> Path:
    data = fake_cubin(KERNELS)
    (folder / "sm_80").mkdir()
    (folder / "sm_80" / "a.cubin").write_bytes(data)
    import hashlib

    entry = {
        "op": "a",
        "arch": "80",
        "abi_hash": "0",
        "sha256": hashlib.sha256(data).hexdigest(),
        "kernels": {name: {} for name in KERNELS},
    }
    manifest = {"format": 1, "files": {"sm_80/a.cubin": entry | changes}}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return folder


def test_manifest(tmp_path: Path) -> None:
    manifest = read_manifest(write_manifest(tmp_path))
    assert manifest.archs == ("80",)
    entry = manifest.entries["a", "80"]
    assert entry.kernels == tuple(KERNELS)
    assert manifest.read(entry) == CUBIN


def test_architectures_are_those_with_every_op(tmp_path: Path) -> None:
    files = {}
    for arch, ops in (("80", "ab"), ("86", "a"), ("120", "ab"), ("90a", "ab"), ("90", "ab")):
        for op in ops:
            entry = {"op": op, "arch": arch, "abi_hash": "", "sha256": "", "kernels": {}}
            files[f"sm_{arch}/{op}.cubin"] = entry
    (tmp_path / "manifest.json").write_text(json.dumps({"format": 1, "files": files}))
    assert read_manifest(tmp_path).archs == ("80", "90", "90a", "120")


def test_a_binary_shared_with_an_earlier_architecture(tmp_path: Path) -> None:
    folder = write_manifest(tmp_path)
    whole = json.loads((folder / "manifest.json").read_text())
    entry = whole["files"]["sm_80/a.cubin"]
    whole["files"]["sm_86/a.cubin"] = entry | {"arch": "86", "same_as": "sm_80/a.cubin"}
    (folder / "manifest.json").write_text(json.dumps(whole))
    manifest = read_manifest(folder)
    assert manifest.archs == ("80", "86")
    shared = manifest.entries["a", "86"]
    assert (shared.arch, shared.file, shared.built_for) == ("86", "sm_80/a.cubin", "80")
    assert manifest.read(shared) == CUBIN


def test_a_binary_that_is_not_the_manifests(tmp_path: Path) -> None:
    manifest = read_manifest(write_manifest(tmp_path, sha256="0" * 64))
    with pytest.raises(CubinError, match="not the file the manifest describes"):
        manifest.read(manifest.entries["a", "80"])
    (tmp_path / "sm_80" / "a.cubin").unlink()
    with pytest.raises(CubinError, match=r"No such file.*reinstall"):
        manifest.read(manifest.entries["a", "80"])


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        (None, "does not exist: this installation has no CUDA kernels"),
        ("{", "cannot be read"),
        ("[]", "format"),
        ('{"format": 2, "files": {}}', "format 2, expected 1"),
        ('{"format": 1}', "damaged.*files"),
        ('{"format": 1, "files": {"x": {"op": "a"}}}', "damaged.*arch"),
    ],
)
def test_a_broken_manifest(tmp_path: Path, text: str | None, problem: str) -> None:
    if text is not None:
        (tmp_path / "manifest.json").write_text(text)
    with pytest.raises(CubinError, match=problem):
        read_manifest(tmp_path)
