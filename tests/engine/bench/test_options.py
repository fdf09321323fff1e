"""Options that cannot be run: exit code 2, and a message that names the option, the value and what is allowed."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest

from engine.bench.options import parse_bench


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("--concurrency 0", "argument --concurrency: '0': must be a whole number from 1 to 4096"),
        ("--concurrency 1,x", "argument --concurrency: 'x': must be a whole number from 1 to 4096"),
        ("--request-rate -1", "argument --request-rate: '-1': must be a number above 0"),
        ("--request-rate inf", "argument --request-rate: 'inf': must be a number above 0"),
        ("--timeout nan", "argument --timeout: 'nan': must be a number above 0"),
        ("--prompt-tokens 0", "argument --prompt-tokens: '0': must be a whole number from 1 to 1000000"),
        ("--output-tokens 1.5", "argument --output-tokens: '1.5': must be a whole number from 1 to 1000000"),
        ("--shared-prefix -1", "argument --shared-prefix: '-1': must be a whole number from 0 to 1000000"),
        ("--prefill 0", "argument --prefill: '0': must be a whole number from 1 to 1000000"),
        ("--rounds 0", "argument --rounds: '0': must be a whole number from 1 to 1000"),
        ("--vocab-size 1", "argument --vocab-size: '1': must be a whole number from 16 to"),
        ("--url ftp://x", "argument --url: 'ftp://x': must be http://HOST:PORT"),
        ("--url http://x:99999", "argument --url: 'http://x:99999': the port must be from 1 to 65535"),
        ("--url http://x --dtype float32", "argument --url: 'http://x': a running server takes no flags"),
        ("--url http://x -- --dtype float32", "argument --url: 'http://x': a running server takes no flags"),
        ("--roofline --url http://192.0.2.1:3", "argument --roofline: http://192.0.2.1:3 is not on this machine"),
        ("--prompts /nope", "argument --prompts: '/nope': there is no such file"),
        ("--json /nope/x.json", "argument --json: '/nope/x.json': the folder /nope does not exist"),
        ("--against-transformers -- --load-format dummy", "argument --against-transformers: --load-format dummy"),
        ("--nonsense", "unrecognized arguments: --nonsense"),
        ("-- --nonsense", "tokenmill serve: error: unrecognized arguments: --nonsense"),
        ("-- --dtype int4", "argument --dtype: 'int4': allowed are"),
    ],
)
def test_what_cannot_be_run_is_named(words: str, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        parse_bench(words.split())
    assert ended.value.code == 2
    assert said in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "package"), [("--png x.png", "matplotlib"), ("--against-transformers", "transformers")]
)
def test_a_missing_package_is_named(
    words: str, package: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    find: Any = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == package else find(name))
    with pytest.raises(SystemExit) as ended:
        parse_bench(words.split())
    assert ended.value.code == 2
    assert f"{package}" in (said := capsys.readouterr().err) and "not installed: pip install" in said


def test_a_shared_prefix_does_not_go_with_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "prompts"
    file.write_text("a\n")
    with pytest.raises(SystemExit):
        parse_bench(["--prompts", str(file), "--shared-prefix", "4"])
    assert "argument --shared-prefix: 4: " in capsys.readouterr().err


def test_flags_of_the_server_stand_behind_two_dashes() -> None:
    options = parse_bench("--dtype bfloat16 --concurrency 1,8,32 -- --cpu-threads 1".split())
    assert options.server_flags == ("--dtype", "bfloat16", "--cpu-threads", "1")
    assert (options.server.dtype, options.server.cpu_threads) == ("bfloat16", 1)
    assert options.concurrency == (1, 8, 32)
    assert options.stream and not parse_bench(["--no-stream"]).stream
