"""The default model in bfloat16 is at least as close to `transformers` in float32 as `transformers` in bfloat16 is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from backends import ISAS, backend
from oracle import NEAR_TIE
from test_default_model_parity import PROMPTS
from transformers import AutoModelForCausalLM

from engine.checkpoints.load_weights import load_weights, open_weights
from engine.checkpoints.locate import locate
from engine.checkpoints.read_config import read_model_config
from engine.checkpoints.tokenizer import encode, load_tokenizer
from engine.kernels.batch import RaggedBatch, offsets
from engine.kernels.kv_cache import allocate_kv_cache
from engine.models.model import Model
from engine.models.registry import build_model

pytestmark = pytest.mark.slow
NEW_TOKENS = 32
ROOM = 256
"""Slots of each sequence."""
BF16 = torch.bfloat16

Texts = list[tuple[list[int], list[int]]]
"""Prompts and what float32 generates after them."""


def check_linears(model: Any, dtype: torch.dtype) -> None:
    """A quantised matrix may hide behind a linear layer's name: these are what they seem."""
    linears = [module for module in model.modules() if isinstance(module, torch.nn.Linear)]
    assert len(linears) == 7 * model.config.num_hidden_layers + 1
    assert all(type(linear) is torch.nn.Linear and linear.weight.dtype == dtype for linear in linears)


def load_ours(isa: str, dtype: torch.dtype) -> Model:
    source = locate(None)
    config = read_model_config(source)
    model = build_model(config, dtype=dtype, backend=backend(isa, 2))
    load_weights(open_weights(source, config), model.places, ignore=model.ignored)
    return model


def batch_of(tokens: list[list[int]], *, decoding: bool) -> RaggedBatch:
    """decoding: only the last token of each sequence is new. Sequence s has the slots from s * ROOM on."""
    contexts = [torch.arange(len(row)) + number * ROOM for number, row in enumerate(tokens)]
    lengths = tuple(map(len, tokens))
    firsts = [len(row) - 1 if decoding else 0 for row in tokens]
    return RaggedBatch(
        token_ids=torch.tensor([token for row, first in zip(tokens, firsts, strict=True) for token in row[first:]]),
        positions=torch.cat([torch.arange(first, len(row)) for row, first in zip(tokens, firsts, strict=True)]),
        slots=torch.cat([slots[first:] for slots, first in zip(contexts, firsts, strict=True)]),
        query_starts=offsets(tuple(length - first for length, first in zip(lengths, firsts, strict=True))),
        context_lengths=lengths,
        context_slots=torch.cat(contexts),
        context_starts=offsets(lengths),
    )


@pytest.fixture(scope="module")
def texts() -> Texts:
    """Continued greedily by Tokenmill in float32; that `transformers` would is checked below, token for token."""
    tokenizer = load_tokenizer(locate(None))
    prompts = [list(encode(tokenizer, prompt)) for prompt in PROMPTS]
    model = load_ours(ISAS[0], torch.float32)
    program = model.program(allocate_kv_cache(model.config, ROOM * len(prompts), torch.float32, "cpu"))
    tokens = [list(prompt) for prompt in prompts]
    for turn in range(NEW_TOKENS):
        batch = batch_of(tokens, decoding=turn > 0)
        best = program.run(batch, np.array(batch.query_starts[1:]) - 1).argmax(dim=-1).tolist()
        tokens = [[*row, token] for row, token in zip(tokens, best, strict=True)]
    return [(prompt, row[len(prompt) :]) for prompt, row in zip(prompts, tokens, strict=True)]


@torch.inference_mode()
def oracle_logits(model: Any, texts: Texts) -> list[torch.Tensor]:
    return [model(torch.tensor([prompt + output])).logits[0, len(prompt) - 1 : -1] for prompt, output in texts]


def our_logits(isa: str, dtype: torch.dtype, texts: Texts) -> list[torch.Tensor]:
    """All texts in one step."""
    model = load_ours(isa, dtype)
    program = model.program(allocate_kv_cache(model.config, ROOM * len(texts), dtype, "cpu"))
    batch = batch_of([prompt + output for prompt, output in texts], decoding=False)
    program.run(batch, np.empty(0, np.int64))
    found = []
    for start, (prompt, output) in zip(batch.query_starts, texts, strict=False):
        first = start + len(prompt) - 1
        found.append(program.logits(np.arange(first, first + len(output))).clone())
    return found


def logprobs(logits: list[torch.Tensor], texts: Texts) -> torch.Tensor:
    """Of the continuations, from the logits [tokens, V] before each of their tokens."""
    return torch.cat(
        [
            torch.log_softmax(rows.double(), dim=-1).gather(1, torch.tensor(output)[:, None]).squeeze(1)
            for rows, (_, output) in zip(logits, texts, strict=True)
        ]
    )


def test_bfloat16_is_no_worse_than_that_of_transformers(oracle: Any, texts: Texts) -> None:
    check_linears(oracle, torch.float32)
    exact_logits = oracle_logits(oracle, texts)
    for rows, (_, output) in zip(exact_logits, texts, strict=True):
        chosen = rows.gather(1, torch.tensor(output)[:, None]).squeeze(1)
        assert (rows.amax(dim=1) - chosen).max() < NEAR_TIE, "not the greedy continuation"
    exact = logprobs(exact_logits, texts)
    assert len(exact) == len(PROMPTS) * NEW_TOKENS

    def errors(name: str, logits: list[torch.Tensor]) -> tuple[float, float]:
        off = (logprobs(logits, texts) - exact).abs()
        mean, most = float(off.mean()), float(off.max())
        print(f"\n{name}: logprobs off by {mean:.5f} on average, {most:.5f} at most", end="")
        return mean, most

    path = Path(locate(None).path)
    theirs = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=BF16).eval()
    check_linears(theirs, BF16)
    mean, most = errors("transformers in bfloat16", oracle_logits(theirs, texts))
    for isa in ISAS:
        ours = errors(f"tokenmill in bfloat16 ({isa})", our_logits(isa, BF16, texts))
        assert ours[0] <= mean and ours[1] <= most, isa
