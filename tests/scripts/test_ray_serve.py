"""A replica under a local Ray: what it answers is what the server answers, streams too."""

from __future__ import annotations

import contextlib
import re
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from live_client import Api, parse_events
from tiny_models import tiny_llama

from engine.bench.live_server import running_server

ray = pytest.importorskip("ray", reason="ray is not installed: pip install 'tokenmill[ray]' (330 MB)")
serve = pytest.importorskip("ray.serve", reason="ray is installed without Serve: pip install 'tokenmill[ray]'")

pytestmark = pytest.mark.slow

FLAGS = ("--dtype", "float32", "--max-total-tokens", "20000", "--cpu-threads", "1")
BODY = {"text": "hello there", "sampling_params": {"max_new_tokens": 8, "temperature": 0}}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llama(tmp_path_factory.mktemp("ray") / "model", max_position_embeddings=4096)


@pytest.fixture(scope="module")
def served(model: Path) -> Iterator[Api]:
    """A client of the proxy of a Ray that this test ends. The replica's processes end with it."""
    from scripts.ray.serve_tokenmill import app

    monkeypatch = pytest.MonkeyPatch()
    monkeypatch.setenv(MARK, str(model))
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    try:
        with socket.socket() as taken:
            taken.bind(("127.0.0.1", 0))
            port = taken.getsockname()[1]
        serve.start(http_options={"host": "127.0.0.1", "port": port})
        serve.run(app({"flags": " ".join([*FLAGS, "--model-path", str(model)]), "cpus": "1"}))
        yield Api(f"http://127.0.0.1:{port}")
        assert len(_servers(model)) == 5  # the processes of one server
        serve.shutdown()
        deadline = time.monotonic() + 30
        while _servers(model):
            assert time.monotonic() < deadline, "the replica's server has outlived it"
            time.sleep(0.1)
    finally:
        ray.shutdown()
        monkeypatch.undo()
        for process in _servers(model):
            process.kill()


MARK = "TOKENMILL_TEST_OF_RAY"
"""Handed down from this process to Ray's, and from those to the server's."""


def _servers(model: Path) -> list[psutil.Process]:
    """Processes of the server that this test's Ray runs."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if process.environ().get(MARK) == str(model) and process.cmdline()[0].startswith("tokenmill: "):
                found.append(process)
    return found


def test_answers_are_those_of_the_server(served: Api, model: Path) -> None:
    with running_server(*FLAGS, model=model) as direct:
        wanted = Api(direct.url)
        for body in (BODY, {**BODY, "text": ["a", "b c"]}, {**BODY, "return_logprob": True}):
            assert _texts(served.generate(**body)) == _texts(wanted.generate(**body))
        found = served.http.post("/generate", json={**BODY, "stream": True})
        assert found.headers["content-type"].startswith("text/event-stream")
        assert _texts(parse_events(found.text)[-1]) == _texts(wanted.stream(**BODY)[-1])
        wrong = {"text": "x", "sampling_params": {"temperature": -1}}
        refused = served.post(wrong)
        assert (refused.status_code, refused.json()) == (400, wanted.post(wrong).json())
    assert served.http.get("/model_info").json()["model_path"] == str(model)
    assert served.http.get("/v1/loads?include=core").json()["loads"][0]["dp_rank"] == 0
    assert served.http.get("/nowhere").status_code == 404


def _texts(answer: object) -> object:
    if isinstance(answer, list):
        return [_texts(item) for item in answer]
    assert isinstance(answer, dict)
    meta = answer["meta_info"]
    return answer["text"], answer["output_ids"], meta["finish_reason"], meta.get("output_token_logprobs")


def test_a_stream_comes_as_it_is_made_and_ends_when_its_client_leaves(served: Api) -> None:
    body = {"text": "x", "sampling_params": {"max_new_tokens": 3000, "ignore_eos": True}}
    with served.open_stream(**body) as chunks:
        assert next(chunks)["meta_info"]["finish_reason"] is None
    served.wait_idle()


def test_arguments_are_checked() -> None:
    from scripts.ray.serve_tokenmill import app

    with pytest.raises(ValueError, match=re.escape("argument 'flag' is not known; known are flags, replicas, cpus")):
        app({"flag": "--port 1"})
