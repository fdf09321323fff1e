"""A live server of a model with experts: its answers, and the record of the experts that it chose."""

from __future__ import annotations

import csv
from collections import Counter
from pathlib import Path

import torch
from live_client import Api
from tiny_models import load_oracle, tiny_qwen3_moe

from engine.bench.live_server import running_server

LAYERS, EXPERTS, TOP_K = 3, 8, 3
TEXTS = {
    "start": "Start recording the expert distribution.\n",
    "stop": "Stop recording the expert distribution.\n",
    "dump": "Dump expert distribution record.\n",
}


def record(api: Api, action: str, method: str = "POST") -> None:
    answer = api.http.request(method, f"/{action}_expert_distribution_record?x=1", content=b"not json")
    assert (answer.status_code, answer.text) == (200, TEXTS[action])
    assert answer.headers["content-type"].startswith("text/plain")


def only_file(folder: Path) -> dict[tuple[int, int], int]:
    """The counts of the one file there is, which is then removed."""
    (path,) = folder.glob("expert_distribution_rank0_timestamp*.csv")
    assert path.read_text().startswith("layer_id,expert_id,count\n0,0,")
    with path.open(newline="") as file:
        found = {(int(row["layer_id"]), int(row["expert_id"])): int(row["count"]) for row in csv.DictReader(file)}
    path.unlink()
    assert list(found) == [(layer, expert) for layer in range(LAYERS) for expert in range(EXPERTS)]
    return found


def test_experts_are_recorded(tmp_path: Path) -> None:
    model, out = tiny_qwen3_moe(tmp_path / "model"), tmp_path / "records"
    flags = ("--dtype", "float32", "--expert-distribution-recorder-mode", "stat")
    env = {"TOKENMILL_STRICT": "1", "SGLANG_EXPERT_DISTRIBUTION_RECORDER_DIR": str(out)}
    with running_server(*flags, model=model, env=env) as server:
        api = Api(server.url)
        record(api, "dump", "GET")
        assert set(only_file(out).values()) == {0}
        prompts = [list(range(20, 60)), list(range(90, 95))]
        record(api, "start")
        answers = api.generate(input_ids=prompts, sampling_params={"temperature": 0, "max_new_tokens": 6})
        assert sum(answer["meta_info"]["cached_tokens"] for answer in answers) == 0
        record(api, "stop", "GET")
        api.generate(input_ids=[7, 8, 9], sampling_params={"max_new_tokens": 2})
        record(api, "dump")
        found = only_file(out)
        info = api.http.get("/server_info").json()
        assert info["expert_distribution_recorder_mode"] == "stat"
    oracle, expected = load_oracle(model), Counter[tuple[int, int]]()
    for layer in range(LAYERS):
        oracle.model.layers[layer].mlp.gate.register_forward_hook(
            lambda _module, _inputs, output, layer=layer: expected.update(
                (layer, expert) for expert in output[2].flatten().tolist()
            )
        )
    for prompt, answer in zip(prompts, answers, strict=True):
        tokens = prompt + answer["output_ids"][:-1]
        with torch.no_grad():
            best = oracle(torch.tensor([tokens])).logits[0].argmax(-1).tolist()
        assert best[len(prompt) - 1 :] == answer["output_ids"]
    assert found == {at: expected[at] for at in found}
