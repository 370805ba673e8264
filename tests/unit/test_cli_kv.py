"""`gllm kv` on stores that hold something, nothing, damage, or are not there."""

from __future__ import annotations

import json
import socket
from pathlib import Path

import pytest
from test_kv_stores import OTHER, entry, keys

from gllm_driver.cli.app import run
from gllm_driver.kv.store.disk import DiskStore

SIZES = {"entries": 3, "tokens": 96}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    store = DiskStore(tmp_path / "kv", 1 << 24)
    store.put([entry(key) for key in keys()])
    store.put([entry(keys(1, root=OTHER)[0])])
    return tmp_path / "kv"


def said(capfd: pytest.CaptureFixture[str], *arguments: object, code: int = 0) -> str:
    assert run(["kv", *map(str, arguments)]) == code
    out, err = capfd.readouterr()
    assert "Traceback" not in err
    return out if code != 2 else err


def test_ls(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    lines = said(capfd, "ls", f"disk:{folder}").splitlines()
    assert len(lines) == 5
    assert lines[0].split() == ["model", "kv", "tokens", "from", "bytes", "age"]
    assert [line.split()[3] for line in lines[1:]] == ["0", "0", "32", "64"]
    entries = json.loads(said(capfd, "ls", f"disk:{folder}", "--json"))["entries"]
    assert {e["model"] for e in entries} == {(b"w" * 32).hex(), (b"v" * 32).hex()}


def test_stats(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    first, second = json.loads(said(capfd, "stats", f"disk:{folder}", "--json"))["models"]
    assert (first["entries"], first["tokens"]) == (1, 32)
    assert SIZES.items() <= second.items()
    assert second["stored_bytes"] > second["kv_bytes"] > 0
    assert (b"w" * 8).hex() in said(capfd, "stats", f"disk:{folder}")


def test_purge(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    spec = f"disk:{folder}"
    assert said(capfd, "purge", spec, "--older-than", "1h") == "0 entries removed\n"
    assert said(capfd, "purge", spec, "--model", (b"v" * 4).hex()) == "1 entries removed\n"
    assert json.loads(said(capfd, "purge", spec, "--json")) == {"removed": 3}
    assert json.loads(said(capfd, "ls", spec, "--json")) == {"entries": []}


def test_verify(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    spec = f"disk:{folder}"
    assert said(capfd, "verify", spec) == "4 entries checked, 0 bad, 0 removed\n"
    path = next(p for p in folder.rglob("*") if p.is_file())
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    assert "1 bad, 0 removed" in said(capfd, "verify", spec, code=1)
    report = json.loads(said(capfd, "verify", spec, "--repair", "--json"))
    assert (report["checked"], report["removed"], report["bad"][0]["reason"]) == (4, 1, "checksum")
    assert said(capfd, "verify", spec) == "3 entries checked, 0 bad, 0 removed\n"


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["ls", "memory:1GiB"], "ends with the process"),
        (["ls", "tape:/dev/st0"], "tape:"),
        (["purge", "disk:/x", "--older-than", "soon"], "soon"),
        (["purge", "disk:/x", "--model", "llama"], "hexadecimal"),
        (["list", "disk:/x"], "list"),
        (["ls", "disk:/no/such/folder"], "/no/such/folder is no directory"),
    ],
)
def test_mistakes(capfd: pytest.CaptureFixture[str], arguments: list[str], problem: str) -> None:
    assert problem in said(capfd, *arguments, code=2)


def test_a_server_that_is_not_there(capfd: pytest.CaptureFixture[str]) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    error = said(capfd, "ls", f"redis://127.0.0.1:{port}/0", code=2)
    assert "cannot be used" in error
