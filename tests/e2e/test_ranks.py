"""A model divided among processes (--tp-size) answers as the undivided one, and survives the death of any rank."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from kills import Json, Running, decodes, undisturbed, whole
from live_client import Api
from oracle import check_greedy
from test_default_model_parity import PROMPTS, generate
from tiny_models import tiny_llama, tiny_qwen3, tiny_qwen3_moe, upside_down
from transformers import AutoModel, AutoModelForSequenceClassification

from engine.bench.live_server import LiveServer, running_server

ENVIRONMENT = {"TOKENMILL_STRICT": "1", "HF_HUB_OFFLINE": "1"}
FLAGS = ("--dtype", "float32", "--max-total-tokens", "20000")
TOKENS = 200
PATIENCE = 60.0


def pid_of_rank(server: LiveServer, rank: int) -> int | None:
    """The pid of the process that is `rank` now."""
    for child in psutil.Process(server.launcher.pid).children():
        try:
            words, running = child.cmdline(), child.status() != psutil.STATUS_ZOMBIE
        except psutil.NoSuchProcess:
            continue
        if running and words and words[0].startswith(f"tokenmill: scheduler tp{rank}"):
            return child.pid
    return None


def answers(url: str) -> list[Any]:
    """Greedy and sampled, long and short, with logprobs and penalties, one by one and together."""
    api = Api(url)
    found = []
    for body in decodes(40)[:12]:
        answer = api.generate(**body)
        found.append([answer["output_ids"], answer["meta_info"].get("input_token_logprobs")])
    few = {"temperature": 1.0, "top_k": 5, "sampling_seed": 3, "max_new_tokens": 40, "ignore_eos": True}
    found.append(api.generate(input_ids=[list(range(9, 49)), [7]], sampling_params=few))
    found[-1] = [answer["output_ids"] for answer in found[-1]]
    return found


def close(found: Any, wanted: Any) -> None:
    """The same, but for the last bits of numbers."""
    if isinstance(wanted, float):
        assert found == pytest.approx(wanted, abs=1e-4)
    elif isinstance(wanted, list):
        assert len(found) == len(wanted)
        for one, other in zip(found, wanted, strict=True):
            close(one, other)
    else:
        assert found == wanted


def vectors(url: str) -> list[Any]:
    answer = Api(url).post({"input_ids": [[5, 6, 7, 8], [9], list(range(10, 40))]}, "/encode")
    assert answer.status_code == 200, answer.text
    return [one["embedding"] for one in answer.json()]


MODELS: dict[str, tuple[Callable[[Path], Path], tuple[str, ...], Callable[[str], list[Any]]]] = {
    "dense": (tiny_llama, (), answers),
    "experts": (tiny_qwen3_moe, (), answers),
    "embedding": (lambda path: tiny_qwen3(path, AutoModel), ("--is-embedding",), vectors),
    "reward": (
        lambda path: tiny_llama(path, AutoModelForSequenceClassification, num_labels=1, pad_token_id=3),
        ("--is-embedding",),
        vectors,
    ),
}


@pytest.mark.parametrize("case", ["dense", *(pytest.param(name, marks=pytest.mark.slow) for name in list(MODELS)[1:])])
def test_answers_are_those_of_one_rank(case: str, tmp_path: Path) -> None:
    write, flags, ask = MODELS[case]
    model = write(tmp_path / "model")
    found = []
    for ranks in (1, 2, 3):
        with running_server("--tp-size", str(ranks), *FLAGS, *flags, model=model, env=ENVIRONMENT) as server:
            found.append(ask(server.url))
            info = Api(server.url).http.get("/server_info").json()
            assert (info["tp_size"], info["internal_states"][0]["world_size"]) == (ranks, ranks)
    close(found[1], found[0])
    close(found[2], found[0])


@pytest.mark.slow
def test_the_default_model_on_two_ranks(oracle: Any) -> None:
    """Nine heads in three groups: ranks hold two groups and one."""
    with running_server("--tp-size", "2", "--dtype", "float32", env=ENVIRONMENT) as server:
        answers = generate(server, PROMPTS[:6], 6)
    for answer in answers:
        logprobs = [entry[0] for entry in answer["meta_info"]["output_token_logprobs"]]
        check_greedy(oracle, answer["prompt_token_ids"], answer["output_ids"], logprobs)


def test_too_many_ranks_are_refused_at_once(tmp_path: Path) -> None:
    from subprocess import run
    from sys import executable

    model = tiny_llama(tmp_path / "model")
    words = [executable, "-m", "engine", "serve", "--model-path", str(model), "--tp-size", "10", "--port", "0"]
    ended = run(words, capture_output=True, text=True, timeout=60, check=False)
    assert ended.returncode == 2
    assert "--tp-size is 10; allowed for this model, with 9 attention heads, are 1 to 9" in ended.stderr


def drive(server: LiveServer, work: Callable[[httpx.AsyncClient], Awaitable[Any]]) -> Any:
    async def run() -> Any:
        limits = httpx.Limits(max_connections=100)
        async with httpx.AsyncClient(base_url=server.url, timeout=60, limits=limits, trust_env=False) as http:
            await whole(http)
            return await work(http)

    return asyncio.run(run())


@pytest.fixture(scope="module")
def pair(tiny_model: Path) -> Any:
    """Two ranks, which may die as often as they like."""
    flags = ("--tp-size", "2", "--incremental-streaming-output", "--watchdog-timeout", "2", "--max-restarts", "1000")
    with running_server(
        *flags, "--dtype", "float32", "--max-total-tokens", "60000", model=tiny_model, env=ENVIRONMENT
    ) as server:
        yield server


@pytest.fixture(scope="module")
def expected(pair: LiveServer) -> list[Json]:
    found: list[Json] = drive(pair, lambda http: undisturbed(http, decodes(TOKENS)))
    return found


def test_company_changes_no_bit(pair: LiveServer) -> None:
    """Promise 2: logprobs are the same by their bits, alone and together."""
    api = Api(pair.url)
    bodies = [
        body | {"return_logprob": True, "logprob_start_len": 0, "top_logprobs_num": 2} for body in decodes(30)[:10]
    ]

    def ask(body: Json) -> list[Any]:
        answer = api.generate(**body)
        meta = answer["meta_info"]
        return [answer["output_ids"], *(meta[name] for name in sorted(meta) if name.endswith("_logprobs"))]

    alone = [ask(body) for body in bodies]
    with ThreadPoolExecutor(len(bodies)) as pool:
        assert list(pool.map(ask, bodies)) == alone


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize(
    "number", [signal.SIGKILL, *(pytest.param(one, marks=pytest.mark.slow) for one in (signal.SIGSTOP, signal.SIGSEGV))]
)
def test_a_rank_that_dies_takes_its_group_and_no_request(
    pair: LiveServer, expected: list[Json], rank: int, number: signal.Signals
) -> None:
    async def work(http: httpx.AsyncClient) -> None:
        running = Running(http, decodes(TOKENS))
        await running.decoding(5)
        before = [pid_of_rank(pair, one) for one in (0, 1)]
        pid = before[rank]
        assert pid is not None
        os.kill(pid, number)
        found = await running.answers()
        for index, (one, wanted) in enumerate(zip(found, expected, strict=True)):
            assert one == wanted, index
        after = [pid_of_rank(pair, one) for one in (0, 1)]
        assert None not in after and not set(before) & set(after), pair.log()

    drive(pair, work)


def test_the_launcher_takes_all_with_it(tiny_model: Path) -> None:
    with running_server("--tp-size", "2", *FLAGS, model=tiny_model, env=ENVIRONMENT) as server:
        family = psutil.Process(server.launcher.pid).children()
        assert len(family) == 5
        server.launcher.kill()
        server.launcher.wait()
        assert not psutil.wait_procs(family, timeout=10)[1]
    assert not [path for path in Path("/dev/shm").iterdir() if path.name.startswith("tokenmill")]


def test_weights_are_updated_on_all_ranks(tmp_path: Path) -> None:
    old = tiny_llama(tmp_path / "old")
    new = upside_down(old, tmp_path / "new")
    body = {"input_ids": [5, 6, 7], "sampling_params": {"temperature": 0, "max_new_tokens": 20, "ignore_eos": True}}
    names = {
        "model.layers.0.self_attn.q_proj.weight": 3, "model.layers.0.self_attn.o_proj.weight": 2,
        "model.layers.1.mlp.down_proj.weight": 2, "model.embed_tokens.weight": 400, "model.norm.weight": 5,
    }  # fmt: skip

    def look(api: Api) -> list[Any]:
        rows = [
            api.post({"name": name, "truncate_size": size}, "/get_weights_by_name").json()
            for name, size in names.items()
        ]
        return [api.generate(**body)["output_ids"], rows]

    found = []
    for flags, steps in (((), (old,)), ((), (new,)), (("--tp-size", "2"), (old, new))):
        with running_server(*FLAGS, *flags, model=steps[0], env=ENVIRONMENT) as server:
            api = Api(server.url)
            found.append(look(api))
            for step in steps[1:]:
                told = api.post({"model_path": str(step)}, "/update_weights_from_disk").json()
                assert told["success"], told
                found.append(look(api))
                pid = pid_of_rank(server, 1)
                assert pid is not None
                os.kill(pid, signal.SIGKILL)  # who takes its place begins with the new ones
                deadline = time.monotonic() + PATIENCE
                while pid_of_rank(server, 1) in (pid, None):
                    assert time.monotonic() < deadline
                    time.sleep(0.01)
                found.append(look(api))
    one_old, one_new, two_old, two_new, two_again = found
    assert one_old != one_new
    assert two_old == one_old
    assert two_new == two_again == one_new


def test_each_rank_writes_its_record_of_experts(tmp_path: Path) -> None:
    model, out = tiny_qwen3_moe(tmp_path / "model"), tmp_path / "records"
    flags = ("--expert-distribution-recorder-mode", "stat", "--expert-distribution-recorder-dir", str(out))
    with running_server("--tp-size", "2", *FLAGS, *flags, model=model, env=ENVIRONMENT) as server:
        api = Api(server.url)
        api.http.post("/start_expert_distribution_record").raise_for_status()
        api.generate(input_ids=list(range(20, 60)), sampling_params={"temperature": 0, "max_new_tokens": 6})
        api.http.post("/stop_expert_distribution_record").raise_for_status()
        api.http.post("/dump_expert_distribution_record").raise_for_status()
    contents = []
    for rank in (0, 1):
        (path,) = out.glob(f"expert_distribution_rank{rank}_timestamp*.csv")
        contents.append(path.read_text())
    assert contents[0] == contents[1]
    assert sum(int(line.rsplit(",", 1)[1]) for line in contents[0].splitlines()[1:]) > 0


def test_each_rank_holds_its_share(tmp_path: Path) -> None:
    """Of a model whose weights are much more than what a process takes anyway."""
    sizes = {"hidden_size": 1024, "intermediate_size": 8192, "num_hidden_layers": 4, "num_attention_heads": 16,
             "num_key_value_heads": 8, "head_dim": 64}  # fmt: skip
    model = tiny_llama(tmp_path / "model", **sizes)
    used = {}
    for ranks in (1, 2):
        with running_server("--tp-size", str(ranks), *FLAGS, model=model, env=ENVIRONMENT) as server:
            Api(server.url).generate(input_ids=[5, 6], sampling_params={"max_new_tokens": 2})
            pids = [pid_of_rank(server, rank) for rank in range(ranks)]
            used[ranks] = [psutil.Process(pid).memory_full_info().uss for pid in pids]
    weights = 4 * (4 * (3 * 1024 * 8192 + 2 * 1024 * 1024 + 2 * 1024 * 512))
    (alone,) = used[1]
    for share in used[2]:
        assert alone - share > 0.4 * weights, (used, weights)
