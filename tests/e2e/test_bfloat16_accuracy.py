"""The default model in bfloat16 is at least as close to `transformers` in float32 as `transformers` in bfloat16 is."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from backends import ISAS, backend
from test_default_model_parity import PROMPTS
from transformers import AutoModelForCausalLM, PreTrainedModel

from engine.checkpoints.load_weights import load_weights, open_weights
from engine.checkpoints.locate import locate
from engine.checkpoints.read_config import read_model_config
from engine.checkpoints.tokenizer import encode, load_tokenizer
from engine.kernels.batch import RaggedBatch, offsets
from engine.kernels.kv_cache import allocate_kv_cache
from engine.models.registry import build_model

NEW_TOKENS = 32
BF16 = torch.bfloat16

Texts = list[tuple[list[int], list[int]]]
"""Prompts and what float32 generates after them."""


def load_oracle(dtype: torch.dtype) -> PreTrainedModel:
    path = Path(locate(None).path)
    model = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=dtype).eval()
    linears = [module for module in model.modules() if isinstance(module, torch.nn.Linear)]
    # A quantised matrix may hide behind a Linear's name: these are what they seem.
    assert len(linears) == 7 * model.config.num_hidden_layers + 1
    assert all(type(linear) is torch.nn.Linear and linear.weight.dtype == dtype for linear in linears)
    return model


@pytest.fixture(scope="module")
def oracle() -> PreTrainedModel:
    torch.set_num_threads(2)
    return load_oracle(torch.float32)


@pytest.fixture(scope="module")
def texts(oracle: PreTrainedModel) -> Texts:
    tokenizer = load_tokenizer(locate(None))
    prompts = [list(encode(tokenizer, prompt)) for prompt in PROMPTS]
    longest = max(map(len, prompts))
    padded = torch.tensor([[0] * (longest - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    with torch.inference_mode():
        found = oracle.generate(
            padded, attention_mask=mask, do_sample=False, min_new_tokens=NEW_TOKENS, max_new_tokens=NEW_TOKENS
        )
    return [(prompt, row[longest:].tolist()) for prompt, row in zip(prompts, found, strict=True)]


def scored(logits: torch.Tensor, output: list[int]) -> torch.Tensor:
    """Logprobs of `output` from the logits [len(output), V] before each of its tokens."""
    return torch.log_softmax(logits.double(), dim=-1).gather(1, torch.tensor(output)[:, None]).squeeze(1)


@torch.inference_mode()
def oracle_logprobs(model: PreTrainedModel, texts: Texts) -> torch.Tensor:
    found = []
    for prompt, output in texts:
        logits = model(torch.tensor([prompt + output])).logits[0, len(prompt) - 1 : -1]
        found.append(scored(logits, output))
    return torch.cat(found)


def our_logprobs(isa: str, dtype: torch.dtype, texts: Texts) -> torch.Tensor:
    """All texts in one step."""
    source = locate(None)
    config = read_model_config(source)
    model = build_model(config, dtype=dtype, backend=backend(isa, 2))
    load_weights(open_weights(source, config), model.places, ignore=model.ignored)
    lengths = tuple(len(prompt) + len(output) for prompt, output in texts)
    starts = offsets(lengths)
    slots = torch.arange(starts[-1])
    batch = RaggedBatch(
        token_ids=torch.tensor([token for prompt, output in texts for token in prompt + output]),
        positions=torch.cat([torch.arange(length) for length in lengths]),
        slots=slots,
        query_starts=starts,
        context_lengths=lengths,
        context_slots=slots,
        context_starts=starts,
    )
    program = model.program(allocate_kv_cache(config, starts[-1], dtype, "cpu"))
    program.run(batch, np.empty(0, np.int64))
    found = []
    for start, (prompt, output) in zip(starts, texts, strict=False):
        first = start + len(prompt) - 1
        found.append(scored(program.logits(np.arange(first, first + len(output))), output))
    return torch.cat(found)


def test_bfloat16_is_no_worse_than_that_of_transformers(oracle: PreTrainedModel, texts: Texts) -> None:
    exact = oracle_logprobs(oracle, texts)
    assert len(exact) == len(PROMPTS) * NEW_TOKENS
    assert (our_logprobs(ISAS[0], torch.float32, texts) - exact).abs().max() < 1e-3

    def errors(name: str, logprobs: torch.Tensor) -> tuple[float, float]:
        off = (logprobs - exact).abs()
        mean, most = float(off.mean()), float(off.max())
        print(f"\n{name}: logprobs off by {mean:.5f} on average, {most:.5f} at most", end="")
        return mean, most

    mean, most = errors("transformers in bfloat16", oracle_logprobs(load_oracle(BF16), texts))
    for isa in ISAS:
        ours = errors(f"tokenmill in bfloat16 ({isa})", our_logprobs(isa, BF16, texts))
        assert ours[0] <= mean and ours[1] <= most, isa
