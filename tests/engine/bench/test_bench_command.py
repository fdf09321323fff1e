"""The command itself, on servers that it starts."""

from __future__ import annotations

import json
import time
from pathlib import Path

import psutil
import pytest
from tiny_models import tiny_qwen2

from engine.bench.live_server import running_server
from engine.bench.rounds import Runner
from engine.cli import main

RUN_ROW = Runner.run_row


def others() -> set[int]:
    """This process's descendants that have not ended."""
    found = psutil.Process().children(recursive=True)
    return {process.pid for process in found if process.status() != psutil.STATUS_ZOMBIE}


def test_the_default_model_under_one_and_three_clients(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = others()
    file = tmp_path / "figures.json"
    words = "--concurrency 1,3 --prompt-tokens 12 --output-tokens 8 --rounds 2 --dtype bfloat16 --json"
    assert main(["bench", *words.split(), str(file)]) == 0
    said = capsys.readouterr()
    assert "SmolLM2-135M-Instruct, bfloat16" in said.out and "1 client " in said.out and "3 clients" in said.out
    assert not said.err, "nobody watches"
    report = json.loads(file.read_bytes())
    assert [row["label"] for row in report["rows"]] == ["1 client", "3 clients"]
    for row, clients in zip(report["rows"], (1, 3), strict=True):
        assert row["output_tok_s"] > 0 and row["total_tok_s"] > row["output_tok_s"]
        assert 0 < row["ttft_ms"]["p50"] <= row["ttft_ms"]["p99"] <= row["latency_ms"]["p99"]
        assert 0 < row["itl_ms"]["p50"] <= row["itl_ms"]["p99"]
        assert row["decode_tok_s"] > 0
        for each in row["rounds"]:
            assert each["output_tokens"] == 8 * clients and each["prompt_tokens"] == 12 * clients
            assert each["cached_tokens"] == 0, "every round has new prompts"
    assert report["options"]["server_flags"] == ["--dtype", "bfloat16"]
    assert report["transformers"] is None and report["roofline"] is None
    assert others() == before


def test_everything_at_once_on_a_tiny_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = tiny_qwen2(tmp_path / "model")
    words = (
        "--prefill 40 --concurrency 2 --request-rate 50 --num-requests 3 --prompt-tokens 10 --output-tokens 4 "
        "--shared-prefix 16 --rounds 1 --against-transformers --roofline "
        f"--json {tmp_path}/f.json --png {tmp_path}/c.png"
    )
    assert main(["bench", *words.split(), "--", "--model-path", str(model), "--dtype", "float32"]) == 0
    said = capsys.readouterr()
    assert "Against transformers" in said.out and "of bound" in said.out and "came from the prefix cache" in said.out
    report = json.loads((tmp_path / "f.json").read_bytes())
    assert [row["kind"] for row in report["rows"]] == ["prefill", "closed", "poisson"]
    assert [row["label"] for row in report["transformers"]] == ["prefill 40", "2 clients"]
    assert [row["label"] for row in report["roofline"]["rows"]] == ["prefill 40", "2 clients"]
    assert report["rows"][1]["rounds"][0]["cached_tokens"] >= 32, "the shared prefix is served from the cache"
    assert (tmp_path / "c.png").read_bytes().startswith(b"\x89PNG")


def test_a_running_server_is_measured_and_left_running(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = tiny_qwen2(tmp_path / "model")
    file = tmp_path / "prompts.txt"
    file.write_text("Once upon a time\nA fox\n")
    with running_server("--dtype", "float32", "--api-key", "secret", model=model) as server:
        words = ["bench", "--url", server.url, "--output-tokens", "4", "--rounds", "1"]
        assert main(words) == 1
        assert "the server answered 401" in capsys.readouterr().err
        key = ["--api-key", "secret"]
        assert main([*words, *key, "--no-stream", "--prompts", str(file), "--concurrency", "2"]) == 0
        said = capsys.readouterr()
        assert "not streamed" in said.out and "prompts of " in said.out
        assert main([*words, *key, "--prompt-tokens", "2000"]) == 1
        assert "are more than the server's context of 1024; lower --prompt-tokens" in capsys.readouterr().err
        server.launcher.kill()
        server.launcher.wait()
        wait_until_gone(set(server.pids.values()))
        assert main([*words, *key]) == 1
        assert f"no connection to {server.url}" in capsys.readouterr().err


def test_a_server_that_does_not_start_is_an_error_with_its_words(capsys: pytest.CaptureFixture[str]) -> None:
    before = others()
    assert main(["bench", "--model-path", "/nope"]) == 1
    assert "/nope is neither a folder nor a .gguf file" in capsys.readouterr().err
    assert others() == before


def test_a_server_that_dies_meanwhile_has_the_last_word(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    before = others()
    # Servers of other tests may be running: they live as long as the session.
    not_ours = {process.pid for process in psutil.Process().children()}

    def kill_launcher() -> None:
        for process in psutil.Process().children():
            if process.pid not in not_ours and "launcher" in " ".join(process.cmdline()):
                process.kill()

    monkeypatch.setattr(Runner, "run_row", lambda *arguments: (kill_launcher(), RUN_ROW(*arguments)))
    model = tiny_qwen2(tmp_path / "model")
    assert main(["bench", "--model-path", str(model), "--rounds", "1", "--prompt-tokens", "8"]) == 1
    said = capsys.readouterr().err
    assert "the server ended with exit code -9" in said
    assert others() == before


def wait_until_gone(pids: set[int]) -> None:
    deadline = time.monotonic() + 20
    while any(psutil.pid_exists(pid) for pid in pids):
        assert time.monotonic() < deadline
        time.sleep(0.05)
