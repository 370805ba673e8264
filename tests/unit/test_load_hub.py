"""Fetching from a hub that this test serves on 127.0.0.1; the real network is never asked."""

from __future__ import annotations

import http.server
import json
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import huggingface_hub
import huggingface_hub.constants
import pytest
from tiny_files import write_gguf, write_hf

from gllm_driver.errors import HubError
from gllm_driver.loaders.open import open_checkpoint

COMMIT = "c0ffee" * 6 + "c0ff"


class FakeHub:
    """Serves `repos` (id → file name → bytes) as the hub does: model info, then HEAD and GET of resolved files."""

    def __init__(self) -> None:
        self.repos: dict[str, dict[str, bytes]] = {}
        self.status: dict[str, tuple[int, str]] = {}  # id → HTTP status and X-Error-Code that every request gets
        self.requests: list[str] = []
        hub = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                hub.answer(self)

            def do_HEAD(self) -> None:
                hub.answer(self)

            def log_message(self, format: str, *args: Any) -> None:
                pass

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.thread = threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True)
        self.thread.start()
        self.url = f"http://127.0.0.1:{self.server.server_port}"

    def close(self) -> None:
        self.server.shutdown()
        self.thread.join()
        self.server.server_close()

    def answer(self, request: http.server.BaseHTTPRequestHandler) -> None:
        path = request.path.split("?")[0]
        self.requests.append(f"{request.command} {path}")
        repo = "/".join((path.removeprefix("/api/models") if path.startswith("/api/models/") else path).split("/")[1:3])
        files = self.repos.get(repo, {})
        headers: dict[str, str] = {}
        if repo in self.status:
            status, code = self.status[repo]
            body, headers["X-Error-Code"] = b"{}", code
        elif repo not in self.repos:
            status, body, headers["X-Error-Code"] = 404, b"{}", "RepoNotFound"
        elif path.startswith("/api/models/"):
            revision = path.partition("/revision/")[2]
            status, siblings = 200, [{"rfilename": name} for name in files]
            body = json.dumps({"id": repo, "sha": COMMIT, "siblings": siblings}).encode()
            if revision not in ("", "main", COMMIT):
                status, body, headers["X-Error-Code"] = 404, b"{}", "RevisionNotFound"
        else:
            name = path.split("/", 5)[5]
            status, body = (200, files[name]) if name in files else (404, b"")
            headers = (
                {"ETag": f'"{name}"', "X-Repo-Commit": COMMIT} if name in files else {"X-Error-Code": "EntryNotFound"}
            )
        request.send_response(status)
        for key, value in headers.items():
            request.send_header(key, value)
        request.send_header("Content-Length", str(len(body)))
        request.end_headers()
        if request.command == "GET":
            request.wfile.write(body)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    fake = FakeHub()
    monkeypatch.setenv("HF_ENDPOINT", fake.url)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    look_up = socket.getaddrinfo

    def only_here(host: Any, *args: Any, **kwargs: Any) -> Any:
        assert host == "127.0.0.1", f"a test asked for {host}"
        return look_up(host, *args, **kwargs)

    monkeypatch.setattr(socket, "getaddrinfo", only_here)
    # Newer versions of huggingface_hub also ask the endpoint they read when imported, and keep the answer.
    template = fake.url + huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE.removeprefix(
        huggingface_hub.constants.ENDPOINT
    )
    monkeypatch.setattr(huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", fake.url)
    monkeypatch.setattr(huggingface_hub.constants, "AGENT_HARNESSES_PATH", str(tmp_path / "harnesses"), raising=False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_IMPLICIT_TOKEN", True)
    monkeypatch.chdir(tmp_path)
    yield fake
    fake.close()


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def serve_hf(hub: FakeHub, tmp_path: Path, num_shards: int = 1) -> None:
    write_hf(tmp_path / "source", num_shards=num_shards)
    extra = {
        **dict.fromkeys(("tokenizer.json", "1_Pooling/config.json", "chat_template.json"), b"{}"),
        **{"README.md": b"", "pytorch_model.bin": b"large", "onnx/model.onnx": b"large"},
    }
    hub.repos["org/tiny"] = {**files_of(tmp_path / "source"), **extra}


@pytest.mark.parametrize("num_shards", [1, 2])
def test_safetensors_repository(hub: FakeHub, tmp_path: Path, num_shards: int) -> None:
    serve_hf(hub, tmp_path, num_shards)
    checkpoint = open_checkpoint("org/tiny", progress=False)
    expected = open_checkpoint(tmp_path / "source")
    assert checkpoint.arch == expected.arch
    assert checkpoint.metadata["tokenizer_file"].read_bytes() == b"{}"
    for slot, tensor in checkpoint.tensors.items():
        assert tensor.owner.tobytes() == expected.tensors[slot].owner.tobytes()
    fetched = {request.split("/", 5)[5] for request in hub.requests if request.startswith("GET /org/tiny/resolve/")}
    weights = {name for name in files_of(tmp_path / "source") if name != "config.json"}
    assert fetched == {"config.json", "tokenizer.json", "1_Pooling/config.json", "chat_template.json", *weights}
    assert (checkpoint.path.parent / "1_Pooling" / "config.json").is_file()


def test_the_cache_serves_the_second_time_and_without_a_connection(
    hub: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    serve_hf(hub, tmp_path, num_shards=2)
    first = open_checkpoint("org/tiny", progress=False)
    hub.requests.clear()
    open_checkpoint("org/tiny", progress=False)
    assert not [request for request in hub.requests if request.startswith("GET /org")]
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert open_checkpoint("org/tiny", progress=False).path == first.path
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    hub.status["org/tiny"] = (503, "")
    assert open_checkpoint("org/tiny", progress=False).path == first.path


def test_an_incomplete_cache_does_not_serve(hub: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    serve_hf(hub, tmp_path, num_shards=2)
    checkpoint = open_checkpoint("org/tiny", progress=False)
    (checkpoint.path.parent / "model-00002-of-00002.safetensors").unlink()
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(HubError, match="HF_HUB_OFFLINE is set"):
        open_checkpoint("org/tiny", progress=False)


def test_gguf_repository(hub: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_gguf(tmp_path / "source" / "m-Q8_0.gguf", quantize="Q8_0")
    hub.repos["org/one"] = files_of(tmp_path / "source")
    write_gguf(tmp_path / "source" / "m-F32.gguf")
    hub.repos["org/two"] = files_of(tmp_path / "source")
    assert open_checkpoint("org/one", progress=False).tensors["layers.0.q"].dtype.name == "q8_0"
    assert open_checkpoint("org/two:m-F32.gguf", progress=False).tensors["layers.0.q"].dtype.name == "f32"
    with pytest.raises(HubError, match=r"several GGUF files; name one as org/two:FILE of m-F32.gguf, m-Q8_0.gguf"):
        open_checkpoint("org/two", progress=False)
    with pytest.raises(HubError, match=r"has no file 'x.gguf'; its GGUF files: m-F32.gguf, m-Q8_0.gguf"):
        open_checkpoint("org/two:x.gguf", progress=False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert open_checkpoint("org/two:m-F32.gguf", progress=False).path.name == "m-F32.gguf"
    with pytest.raises(HubError, match="HF_HUB_OFFLINE is set"):
        open_checkpoint("org/two:m-Q8_0.gguf", progress=False)


def test_split_gguf_repository(hub: FakeHub, tmp_path: Path) -> None:
    from test_load_gguf import write_split

    (tmp_path / "source").mkdir()
    write_split(tmp_path / "source")
    hub.repos["org/split"] = files_of(tmp_path / "source")
    assert len(open_checkpoint("org/split", progress=False).tensors) == len(
        open_checkpoint("org/split:m-00001-of-00003.gguf", progress=False).tensors
    )


def test_revisions(hub: FakeHub, tmp_path: Path) -> None:
    serve_hf(hub, tmp_path)
    open_checkpoint(f"org/tiny@{COMMIT}", progress=False)
    with pytest.raises(HubError, match="'org/tiny' has no such revision"):
        open_checkpoint("org/tiny@v9", progress=False)


@pytest.mark.parametrize(
    ("status", "code", "problem"),
    [
        (404, "RepoNotFound", "there is no path and no model 'org/tiny' on the hub, or it is private"),
        (401, "RepoNotFound", "there is no path and no model 'org/tiny' on the hub, or it is private"),
        (401, "GatedRepo", "'org/tiny' is gated: accept its terms"),
        (403, "GatedRepo", "'org/tiny' is gated: accept its terms"),
        (403, "", r"refuses access to 'org/tiny' \(HTTP 403\): set HF_TOKEN"),
        (500, "", "HTTP 500: try again later, or give a path"),
    ],
)
def test_refusals_say_what_to_do(hub: FakeHub, tmp_path: Path, status: int, code: str, problem: str) -> None:
    serve_hf(hub, tmp_path)
    hub.status["org/tiny"] = (status, code)
    with pytest.raises(HubError, match=problem) as caught:
        open_checkpoint("org/tiny", progress=False)
    assert "\n" not in str(caught.value)


def test_no_connection_says_what_to_do(hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    unused = FakeHub()
    unused.close()  # nobody listens at its port any more
    monkeypatch.setenv("HF_ENDPOINT", unused.url)
    for text in ("org/tiny", "org/tiny:m.gguf"):
        with pytest.raises(HubError, match=r"check the network or HF_ENDPOINT, or give the path"):
            open_checkpoint(text, progress=False)


def test_repositories_that_lack_something(hub: FakeHub, tmp_path: Path) -> None:
    write_hf(tmp_path / "source")
    files = files_of(tmp_path / "source")
    hub.repos["org/noconfig"] = {"model.safetensors": files["model.safetensors"]}
    hub.repos["org/torch"] = {"config.json": files["config.json"], "pytorch_model.bin": b""}
    hub.repos["org/empty"] = {}
    with pytest.raises(HubError, match=r"has no config.json"):
        open_checkpoint("org/noconfig", progress=False)
    with pytest.raises(
        HubError, match=r"neither model.safetensors nor GGUF files; it has config.json, pytorch_model.bin"
    ):
        open_checkpoint("org/torch", progress=False)
    with pytest.raises(HubError, match=r"it has none"):
        open_checkpoint("org/empty", progress=False)


def test_quiet_leaves_the_bars_as_they_were(hub: FakeHub, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    serve_hf(hub, tmp_path)
    disabled = huggingface_hub.utils.are_progress_bars_disabled()
    open_checkpoint("org/tiny", progress=False)
    assert huggingface_hub.utils.are_progress_bars_disabled() == disabled
    assert capfd.readouterr().err == ""
