"""Tokenmill over HTTP against `transformers` generate, the same prompts in one run, 1, 8 and 32 at once.

python -m scripts.bench_transformers [--tokens 64] [--prompt-tokens 128] [--dtype bfloat16]
"""

from __future__ import annotations

import argparse
import statistics
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from engine.checkpoints.locate import locate
from scripts.client import generate
from scripts.live_server import LiveServer, running_server


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--prompt-tokens", type=int, default=128)
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float32"))
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    path = Path(locate(None).path)
    model: Any = AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, dtype=getattr(torch, options.dtype)
    )
    model.eval()
    print(f"{options.prompt_tokens} tokens in, {options.tokens} out, {options.dtype}; output tok/s, median of rounds")
    print("| at once | transformers | tokenmill over HTTP | ratio |\n|---|---|---|---|")
    for count in (1, 8, 32):
        theirs, ours = [], []
        for round_number in range(options.rounds):
            prompts = _prompts(count, options.prompt_tokens, round_number)
            theirs.append(_transformers(model, prompts, options.tokens))
        with running_server("--log-level", "warning", "--dtype", options.dtype) as server:
            _tokenmill(server, _prompts(count, options.prompt_tokens, 99), 8)
            for round_number in range(options.rounds):
                ours.append(_tokenmill(server, _prompts(count, options.prompt_tokens, round_number), options.tokens))
        left, right = statistics.median(theirs), statistics.median(ours)
        print(f"| {count} | {left:.0f} | {right:.0f} | {right / left:.2f} |", flush=True)


def _prompts(count: int, length: int, seed: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(100, 40_000, (count, length), generator=generator).tolist()


def _transformers(model: Any, prompts: list[list[int]], tokens: int) -> float:
    ids = torch.tensor(prompts)
    started = time.monotonic()
    with torch.inference_mode():
        model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=tokens,
            min_new_tokens=tokens,
            do_sample=False,
            pad_token_id=0,
        )
    return len(prompts) * tokens / (time.monotonic() - started)


def _tokenmill(server: LiveServer, prompts: list[list[int]], tokens: int) -> float:
    parameters = {"max_new_tokens": tokens, "ignore_eos": True, "temperature": 0}
    started = time.monotonic()
    with ThreadPoolExecutor(len(prompts)) as pool:
        answers = list(
            pool.map(lambda ids: generate(server.url, {"input_ids": ids, "sampling_params": parameters}), prompts)
        )
    assert all(answer["meta_info"]["completion_tokens"] == tokens for answer in answers)
    return len(prompts) * tokens / (time.monotonic() - started)


if __name__ == "__main__":
    main()
