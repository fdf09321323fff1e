"""What clients send stays out of the log at its most talkative, whatever becomes of the request."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import httpx

from engine.bench.live_server import running_server

MARK = "xylophoneparadox"


def bodies() -> list[tuple[str, Any]]:
    prompt = f"tell me of {MARK} now"
    few: dict[str, Any] = {"max_new_tokens": 3}
    return [
        ("/generate", {"text": prompt, "sampling_params": few}),
        ("/generate", {"text": [prompt, prompt], "sampling_params": few, "stream": True}),
        ("/generate", {"text": prompt, "sampling_params": few | {"stop": [MARK], "stop_regex": MARK}}),
        ("/generate", {"text": prompt, "sampling_params": few | {"n": 2}, "return_logprob": True}),
        ("/generate", {"text": prompt, "sampling_params": {"temperature": -1}}),
        ("/generate", {"text": prompt, "sampling_params": {"stop_regex": f"({MARK}"}}),
        ("/generate", {"text": prompt, "sampling_params": {"json_schema": f'{{"title": "{MARK}"}}'}}),
        ("/generate", {"text": prompt, "sampling_params": {"json_schema": f'{{"enum": ["{MARK}"]}}'}}),
        ("/generate", {"text": prompt, "sampling_params": {"regex": f"({MARK}"}}),
        ("/generate", {"text": prompt, "sampling_params": {"ebnf": f'root ::= "{MARK}" rest\nrest ::= rest'}}),
        ("/generate", {"text": prompt, "sampling_params": {MARK: 1}}),
        ("/generate", {"text": {"a": prompt}}),
        ("/generate", {"text": prompt, "stream": prompt}),
        ("/generate", {"input_ids": prompt}),
        ("/generate", {"text": prompt * 5000, "sampling_params": few}),
        ("/generate", {"text": prompt, "timeout": 0.001}),
        ("/generate", {"text": prompt, "extra_key": MARK, "custom_labels": {"a": MARK}, "sampling_params": few}),
        ("/encode", {"text": prompt}),
        ("/v1/rerank", {"query": prompt, "documents": [prompt]}),
        ("/v1/score", {"query": prompt, "items": [prompt], "label_token_ids": [5]}),
        ("/v1/embeddings", {"input": prompt}),
        ("/tokenize", {"prompt": prompt}),
        ("/tokenize", {"messages": [{"role": "user", "content": prompt}]}),
        ("/tokenize", {"messages": [{"role": prompt}]}),
        ("/tokenize", {"messages": [{"role": "user", "content": {"a": prompt}}], "chat_template_kwargs": {"x": MARK}}),
        ("/detokenize", {"tokens": [prompt]}),
    ]


# Fails with an error whose message quotes the text.
QUOTING = "{{ ''.encode(messages[0].content) }}"


def test_prompts_are_not_in_the_log(tmp_path: Path) -> None:
    (tmp_path / "template").write_text(QUOTING)
    flags = ("--log-level", "debug", "--chat-template", str(tmp_path / "template"))
    with running_server(*flags, env={"TMPDIR": str(tmp_path)}) as server:
        with httpx.Client(base_url=server.url, timeout=60) as client:
            statuses = [client.post(path, json=body).status_code for path, body in bodies()]
            assert {200, 400} <= set(statuses)
            raw = json.dumps(bodies()[0][1]).encode()
            for broken in (raw[:-5], raw + b"}", raw.replace(b"tell", b"\xff\xfe")):
                answer = client.post("/generate", content=broken, headers={"content-type": "application/json"})
                assert answer.status_code == 400
            assert client.post("/generate", content=raw, headers={"content-type": MARK}).status_code == 400
            quoted = client.post("/tokenize", json={"messages": [{"role": "user", "content": MARK}]})
            assert quoted.status_code == 500 and MARK in quoted.text
        log = server.log()
    assert "DEBUG" in log and "LookupError: (its message may quote a request)" in log
    assert MARK not in log
    assert not [path for path in tmp_path.rglob("*") if path.is_file() and MARK.encode() in path.read_bytes()]
