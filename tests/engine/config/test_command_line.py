"""The command line against the contract's flag tables (sections 1.1 and 1.2), and as the inverse of writing flags."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import msgspec
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.config import ConfigError, ServerConfig
from engine.config.checks import check_config
from engine.config.command_line import parse_serve, shown_command
from engine.config.fields import ConfigField, config_fields
from engine.config.flags import token_count
from engine.config.ignored import IGNORED_FLAGS, NOT_YET_FLAGS

MUST_WORK: dict[str, tuple[Any, str, Any]] = {
    # flag: (default, a word that is served, what that word means)
    "--model-path": (None, "m", "m"),
    "--model": (None, "m", "m"),
    "--tokenizer-path": (None, "t", "t"),
    "--tokenizer-mode": ("auto", "slow", "slow"),
    "--load-format": ("auto", "dummy", "dummy"),
    "--context-length": (None, "32Ki", 32768),
    "--revision": (None, "main", "main"),
    "--json-model-override-args": ({}, '{"a": [1]}', {"a": [1]}),
    "--dtype": ("auto", "half", "half"),
    "--kv-cache-dtype": ("auto", "bfloat16", "bfloat16"),
    "--download-dir": (None, "d", "d"),
    "--served-model-name": (None, "name", "name"),
    "--weight-version": ("default", "v2", "v2"),
    "--chat-template": (None, "f", "f"),
    "--host": ("127.0.0.1", "0.0.0.0", "0.0.0.0"),
    "--port": (30000, "8000", 8000),
    "--fastapi-root-path": ("", "/api", "/api"),
    "--api-key": (None, "k", "k"),
    "--admin-api-key": (None, "k", "k"),
    "--preferred-sampling-params": (None, '{"temperature": 0.5}', {"temperature": 0.5}),
    "--stream-interval": (1, "4", 4),
    "--mem-fraction-static": (None, "0.5", 0.5),
    "--max-running-requests": (None, "8", 8),
    "--max-queued-requests": (None, "8", 8),
    "--max-total-tokens": (None, "25.6k", 25600),
    "--chunked-prefill-size": (None, "-1", -1),
    "--max-prefill-tokens": (16384, "1M", 1_000_000),
    "--prefill-max-requests": (None, "2", 2),
    "--schedule-policy": ("fcfs", "lpm", "lpm"),
    "--page-size": (None, "1", 1),
    "--default-priority-value": (None, "-3", -3),
    "--tp-size": (1, "1", 1),
    "--tensor-parallel-size": (1, "1", 1),
    "--tp": (1, "1", 1),
    "--nnodes": (1, "1", 1),
    "--node-rank": (0, "0", 0),
    "--device": ("auto", "cpu", "cpu"),
    "--base-gpu-id": (0, "2", 2),
    "--pp-size": (1, "1", 1),
    "--dp-size": (1, "1", 1),
    "--ep-size": (1, "1", 1),
    "--disaggregation-mode": ("null", "null", "null"),
    "--attention-backend": (None, "torch_native", "torch_native"),
    "--grammar-backend": ("xgrammar", "llguidance", "llguidance"),
    "--constrained-json-whitespace-pattern": (None, "[ ]?", "[ ]?"),
    "--random-seed": (None, "7", 7),
    "--log-level": ("info", "warning", "warning"),
    "--log-level-http": (None, "error", "error"),
    "--decode-log-interval": (40, "1", 1),
    "--watchdog-timeout": (300.0, "2", 2.0),
    "--soft-watchdog-timeout": (None, "1.5", 1.5),
    "--log-format": ("text", "json", "json"),
    "--log-requests-level": (2, "0", 0),
    "--log-requests-format": ("text", "json", "json"),
}
SWITCHES = [
    "--skip-tokenizer-init", "--skip-server-warmup", "--incremental-streaming-output", "--allow-auto-truncate",
    "--enable-priority-scheduling", "--schedule-low-priority-values-first", "--abort-on-priority-when-disabled",
    "--disable-radix-cache", "--enable-deterministic-inference", "--disable-cuda-graph", "--enable-metrics",
    "--log-requests", "--constrained-json-disable-any-whitespace",
]  # fmt: skip
WARNED = [
    "--schedule-policy random", "--schedule-policy dfs-weight", "--schedule-policy lof", "--schedule-policy priority",
    "--schedule-policy routing-key", "--schedule-policy hrrn", "--schedule-policy shortest-prefill-first",
    "--attention-backend flashinfer", "--attention-backend fa3", "--grammar-backend outlines",
    "--base-gpu-id 1 --device cpu",
]  # fmt: skip
REFUSED = {
    "--page-size 16": "only 1",
    "--pp-size 2": "only 1",
    "--dp-size 2": "only 1",
    "--ep-size 2": "only 1",
    "--tp-size 0": "from 1 to 128",
    "--nnodes 2": "--tp-size is 1, and each machine has as many ranks",
    "--node-rank 1": "of 1 machines, 0 to 0",
    "--base-gpu-id -1": "at least 0",
    "--device tpu": "auto, cpu, cuda",
    "--quantization awq": "GGUF",
    "--kv-cache-dtype fp8_e5m2": "auto, float16, bfloat16, float32",
    "--load-format pt": "auto, safetensors, gguf, dummy",
    "--disaggregation-mode prefill": "only null",
    "--attention-backend nonsense": "triton, torch_native",
    "--grammar-backend nonsense": "xgrammar, llguidance, none",
    "--constrained-json-whitespace-pattern [": "must be a regular expression",
    "--served-model-name a:b": "colon",
    "--dtype int8": "float32",
    "--log-level loud": "critical, error, warning, info, debug",
    "--port 65536": "from 0 to 65535",
    "--port -1": "from 0 to 65535",
    "--port 1.5": "'1.5'",
    "--stream-interval 0": "at least 1",
    "--mem-fraction-static 1": "greater than 0 and less than 1",
    "--mem-fraction-static nan": "greater than 0 and less than 1",
    "--context-length 0": "at least 1",
    "--context-length 1.5Ki": "token count",
    "--context-length 32k5": "token count",
    "--chunked-prefill-size 0": "at least 1, or -1",
    "--chunked-prefill-size -2": "at least -1",
    "--drain-timeout -1": "at least 0",
    "--drain-timeout inf": "finite",
    "--drain-timeout nan": "at least 0",
    "--json-model-override-args [1]": "not a JSON object",
    "--preferred-sampling-params {": "not JSON",
    "--model-loader-extra-config 5": "not a JSON object",
    "--gc-threshold x": "not of type ints",
    "--hicache-ratio x": "not of type float",
    "--disable-radix-cache yes --port 1 more": "unrecognized arguments: more",
    "--fastapi-root-path api": "slash",
    "--api-key=": "empty",
    "--ssl-certfile c": "--ssl-keyfile",
    "--ssl-keyfile k": "--ssl-certfile",
    "--ssl-cert-reqs 2": "--ssl-ca-certs",
    "--ssl-cert-reqs 3": "from 0 to 2",
    "--max 5": "ambiguous",
    "--nonsense": "unrecognized",
    "--speculative-anything x": "speculative decoding",
    "m --model-path n": "named twice",
}


def field_of(flag: str) -> ConfigField:
    return next(field for field in config_fields() if flag in field.names)


def refusal(words: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit) as ended:
        parse_serve(words)
    assert ended.value.code == 2
    return capsys.readouterr().err


def test_every_flag_that_must_work_is_there_with_its_default() -> None:
    for flag, (default, word, meaning) in MUST_WORK.items():
        field = field_of(flag)
        assert getattr(ServerConfig(), field.name) == default, flag
        for words in ([flag, word], [f"{flag}={word}"]):
            command = parse_serve(words)
            assert command.config == msgspec.structs.replace(ServerConfig(), **{field.name: meaning}), words
            assert command.warnings == []
    for switch in SWITCHES:
        assert parse_serve([switch]).config == msgspec.structs.replace(ServerConfig(), **{field_of(switch).name: True})
        assert parse_serve([switch]).warnings == []
    tls = parse_serve(
        ["--ssl-keyfile", "k", "--ssl-certfile", "c", "--ssl-ca-certs", "a", "--ssl-keyfile-password", "p"]
    ).config
    assert (tls.ssl_keyfile, tls.ssl_certfile, tls.ssl_ca_certs, tls.ssl_keyfile_password) == ("k", "c", "a", "p")
    prefixes = parse_serve(["--uvicorn-access-log-exclude-prefixes", "/a", "/b"]).config
    assert prefixes.uvicorn_access_log_exclude_prefixes == ["/a", "/b"]


def test_flags_without_effect_warn_once_and_change_nothing() -> None:
    word = {"switch": [], "int": ["1"], "float": ["1.0"], "str": ["x"], "ints": ["1", "2"], "strs": ["x", "y"]}
    for kind, flag in IGNORED_FLAGS:
        words = [flag, *word.get(kind, ["{}"])]
        command = parse_serve(words * 2)
        assert command.config == ServerConfig()
        (warning,) = command.warnings
        assert warning.startswith(f"{flag} has no effect in Tokenmill")
    for typed in WARNED:
        (warning,) = parse_serve(typed.split()).warnings
        assert " ".join(typed.split()[:2]) in warning


@pytest.mark.parametrize(("typed", "said"), REFUSED.items())
def test_what_cannot_be_served_is_refused_with_a_reason(
    typed: str, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    message = refusal(typed.split(), capsys)
    assert said in message
    assert typed.split()[0].partition("=")[0] in message or said in ("ambiguous", "named twice") or "more" in said


def test_what_is_not_built_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    for kind, flag, feature in NOT_YET_FLAGS:
        message = refusal([flag, *([] if kind == "switch" else ["1"])], capsys)
        assert flag in message
        assert feature in message


def test_prefixes_and_the_model_as_a_word() -> None:
    assert parse_serve(["--served", "x", "--cont=4k"]).config == ServerConfig(
        served_model_name="x", context_length=4000
    )
    for words in (["m", "--port", "1"], ["--port", "1", "m"], ["--disable-radix-cache", "m", "--port", "1"]):
        assert parse_serve(words).config.model_path == "m"


def served_words(field: ConfigField) -> st.SearchStrategy[Any]:
    """Values of a field that pass every check on their own."""
    if field.flag in MUST_WORK:
        _, word, _ = MUST_WORK[field.flag]
        low, high = field.options.minimum, field.options.maximum
        if field.kind == "int" and low is not None and field.name not in ("nnodes", "node_rank"):
            return st.integers(max(low, 1), 2**62 if high is None else high)
        if field.options.choices is not None and field.name != "device":
            return st.sampled_from(field.options.choices)
        return st.just(parse_serve([f"{field.flag}={word}"]).config.__getattribute__(field.name))
    if field.kind == "switch":
        return st.booleans()
    if field.name in ("ssl_keyfile", "ssl_certfile", "quantization", "dist_init_addr"):
        return st.none()
    if field.name == "ssl_cert_reqs":
        return st.just(0)
    values: dict[str, st.SearchStrategy[Any]] = {
        "int": st.integers(1, 64),
        "float": st.floats(0.001, 1e6),
        "strs": st.lists(st.text(st.characters(codec="utf-8", exclude_characters="-"), min_size=1), max_size=3),
    }
    return values.get(field.kind, st.just(field.default))


TEXTS = {
    name: st.text(st.characters(codec="utf-8", exclude_characters=":"), min_size=1)
    for name in ("model_path", "tokenizer_path", "revision", "served_model_name", "weight_version", "api_key", "host")
}
CONFIGS = st.fixed_dictionaries(
    {}, optional={f.name: TEXTS.get(f.name, served_words(f)) for f in config_fields() if "--ssl-ca" not in f.flag}
).filter(lambda given: given.get("ssl_keyfile_password") is None)


def as_words(config: ServerConfig) -> list[str]:
    words: list[str] = []
    for field in config_fields():
        value = getattr(config, field.name)
        if value == field.default:
            continue
        if field.kind == "switch":
            words.append(field.names[-1])
        elif field.kind == "strs":
            words += [field.flag, *value]
        else:
            words.append(f"{field.flag}={json.dumps(value) if field.kind == 'json' else value}")
    return words


@settings(deadline=None)  # a machine may be busy
@given(CONFIGS)
def test_writing_a_config_as_flags_and_parsing_them_gives_it_back(given: dict[str, Any]) -> None:
    config = ServerConfig(**given)
    command = parse_serve(as_words(config))
    assert command.config == config
    assert command.warnings == check_config(config)


@settings(deadline=None)  # a machine may be busy
@given(CONFIGS, st.booleans())
def test_a_settings_file_says_the_same_as_flags(
    tmp_path_factory: pytest.TempPathFactory, given: dict[str, Any], underscores: bool
) -> None:
    file = tmp_path_factory.mktemp("settings") / "settings.yaml"
    keys = {name: name if underscores else name.replace("_", "-") for name in given}
    file.write_text(yaml.safe_dump({keys[name]: value for name, value in given.items()}))
    assert parse_serve(["--config", str(file)]).config == ServerConfig(**given)


def test_the_command_line_wins_over_the_settings_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "settings.yaml"
    file.write_text(
        "port: 1\nmodel: a\ntp: 1\nhost: null\nstream_interval: 3\ncontext-length: 8k\ntrust-remote-code: true\n"
    )
    command = parse_serve(["b", "--config", str(file), "--port", "2"])
    assert command.config == ServerConfig(port=2, model_path="b", stream_interval=3, context_length=8000)
    assert command.warnings == [
        "--trust-remote-code has no effect in Tokenmill: code that comes with a checkpoint is never run"
    ]
    for text, said in {
        "nonsense: 1": "unknown key 'nonsense'",
        "config: other.yaml": "unknown key 'config'",
        "port: true": "needs a value",
        "disable-radix-cache: 1": "true or false",
        "port: [1]": "not a list",
        "- port": "not a map",
        "a: b: c": "not YAML",
        "tp_size: 0": "from 1 to 128",
        "log_requests_level: 4": "from 0 to 3",
    }.items():
        file.write_text(text)
        assert said in refusal(["--config", str(file)], capsys)
    assert "cannot be read" in refusal(["--config", str(tmp_path / "none.yaml")], capsys)


def test_secrets_are_not_shown() -> None:
    typed = [
        "serve",
        "m",
        "--api-key",
        "one",
        "--admin-api-k=two",
        "--ssl-keyfile",
        "k",
        "--ssl-keyfile-p",
        "three",
        "--host",
        "h",
    ]
    shown = " ".join(shown_command(typed))
    assert shown == "serve m --api-key *** --admin-api-k=*** --ssl-keyfile k --ssl-keyfile-p *** --host h"


@given(st.integers(0, 10**6), st.integers(0, 999))
def test_decimal_token_counts_are_exact(whole: int, thousandths: int) -> None:
    assert token_count(f"{whole}.{thousandths:03d}k") == 1000 * whole + thousandths
    assert token_count(f"{whole}Ki") == 1024 * whole


def test_check_config_names_flag_and_value() -> None:
    with pytest.raises(
        ConfigError, match=re.escape("argument --dist-init-addr: None: several machines need HOST:PORT of machine 0")
    ):
        check_config(ServerConfig(nnodes=2, tp_size=4))
