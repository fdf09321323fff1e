"""32 streams of which one fails in the forward pass: it gets its 500, the others never notice."""

from __future__ import annotations

import json
import random
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from live_client import Api, Json

from engine.bench.live_server import running_server

POISON = 417
STREAMS = 32
CULPRIT = 13
FLAGS = (
    "--dtype", "float32", "--max-total-tokens", "8000", "--max-running-requests", str(STREAMS), "--skip-server-warmup",
)  # fmt: skip
"""Without a warm-up: its text may hold the poison, whose tokens are those of a random tokenizer."""


def bodies() -> list[Json]:
    """Greedy and drawn, with shared beginnings, of different lengths; none holds the poison but the culprit."""
    source = random.Random(3)
    shared = [[source.randrange(3, 250) for _ in range(40)] for _ in range(3)]
    found = []
    for i in range(STREAMS):
        prompt = shared[i % 3][: 10 + i] + [source.randrange(3, 250) for _ in range(i % 5)]
        sampling: Json = {"max_new_tokens": 30 + i, "ignore_eos": True, "logit_bias": {str(POISON): -1e9}}
        sampling |= {"temperature": 0} if i % 2 else {"temperature": 0.8, "sampling_seed": i}
        found.append({"rid": f"stream-{i}", "input_ids": prompt, "sampling_params": sampling})
    found[CULPRIT]["input_ids"].insert(25, POISON)
    return found


def outcomes(api: Api) -> list[Json]:
    with ThreadPoolExecutor(STREAMS) as pool:
        return list(pool.map(lambda body: api.stream(**body)[-1], bodies()))


@pytest.fixture(scope="module")
def calm(tiny_api: Api) -> list[Json]:
    return outcomes(tiny_api)


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        ({"where": "forward", "what": "raise"}, "Internal error while computing request stream-13"),
        ({"where": "allocate", "what": "memory"}, "Out of memory"),
    ],
)
def test_the_culprit_alone(tiny_model: Path, calm: list[Json], fault: Json, words: str) -> None:
    env = {"TOKENMILL_STRICT": "1", "TOKENMILL_FAULTS": json.dumps([{"token": POISON, **fault}])}
    with running_server(*FLAGS, model=tiny_model, env=env) as server:
        api = Api(server.url)
        found = outcomes(api)
        for i, (mine, undisturbed) in enumerate(zip(found, calm, strict=True)):
            end: Any = mine["meta_info"]["finish_reason"]
            if i == CULPRIT:
                assert end["type"] == "abort" and end["status_code"] == 500 and words in end["message"]
            else:
                assert end["type"] == "length" and mine["output_ids"] == undisturbed["output_ids"]
                assert mine["text"] == undisturbed["text"]
        plain = api.post(bodies()[CULPRIT])
        assert plain.status_code == 500 and words in plain.json()["message"]
        api.wait_idle()
        log = server.log()
        assert "Request stream-13" in log
        assert "Traceback" in log or fault["what"] == "memory"


@pytest.mark.parametrize("process", ["tokenizer", "detokenizer"])
def test_a_text_that_kills_its_reader(tiny_model: Path, calm: list[Json], process: str) -> None:
    """It takes the process down twice, and then has its 500; streams go on, and so do questions."""
    fault = {"token": POISON, "where": process.removesuffix("r"), "what": "segv"}
    with running_server(*FLAGS, model=tiny_model, env={"TOKENMILL_FAULTS": json.dumps([fault])}) as server:
        api = Api(server.url)
        found = outcomes(api)
        for i, (mine, undisturbed) in enumerate(zip(found, calm, strict=True)):
            if i == CULPRIT:
                end: Any = mine["meta_info"]["finish_reason"]
                assert end["type"] == "abort" and end["status_code"] == 500
                assert f"Request stream-13 was in the hands of the {process} at 2 of its deaths" in end["message"]
            else:
                assert mine["output_ids"] == undisturbed["output_ids"] and mine["text"] == undisturbed["text"]
        assert server.log().count("was killed by SIGSEGV") == 2
        api.wait_idle()


def test_malformed_faults_are_refused(tiny_model: Path) -> None:
    with (
        pytest.raises(Exception, match="TOKENMILL_FAULTS"),
        running_server(*FLAGS, model=tiny_model, env={"TOKENMILL_FAULTS": "[7]"}),
    ):
        pass
