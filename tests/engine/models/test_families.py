"""Every family against `transformers` in float32, at every position, however its tokens are cut into steps."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from backends import FOR_MODELS, backend
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tiny_models import (
    load_oracle,
    tiny_gemma3,
    tiny_llama,
    tiny_mistral,
    tiny_mixtral,
    tiny_qwen2,
    tiny_qwen2_moe,
    tiny_qwen3,
    tiny_qwen3_moe,
)

from engine.checkpoints.expert_layout import StackedPlace, as_stored
from engine.checkpoints.model_config import ModelConfig
from engine.checkpoints.read_config import read_model_config
from engine.checkpoints.weights import OffsetPlace, Place, TensorPlace
from engine.config import ModelSource
from engine.kernels.batch import RaggedBatch, offsets
from engine.kernels.kv_cache import allocate_kv_cache
from engine.kernels.packed import PackedBias, PackedRows
from engine.kernels.table import Backend, Program
from engine.models.model import Model
from engine.models.registry import build_model

SLIDING, FULL = "sliding_attention", "full_attention"
LINEAR = {"rope_type": "linear", "rope_theta": 500.0, "factor": 2.5}
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 500.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}  # fmt: skip
YARN = {"rope_type": "yarn", "rope_theta": 500.0, "factor": 4.0, "original_max_position_embeddings": 32}

CASES: dict[str, tuple[Callable[..., Path], dict[str, Any]]] = {
    "llama": (tiny_llama, {}),
    "llama tied, wide heads": (tiny_llama, {"tie_word_embeddings": True, "head_dim": 14}),
    "llama biases": (tiny_llama, {"attention_bias": True, "mlp_bias": True}),
    "llama linear": (tiny_llama, {"rope_parameters": LINEAR}),
    "llama llama3": (tiny_llama, {"rope_parameters": LLAMA3, "head_dim": 16}),
    "llama yarn": (tiny_llama, {"rope_parameters": YARN, "head_dim": 16}),
    "mistral": (tiny_mistral, {}),
    "mistral without window": (tiny_mistral, {"sliding_window": None}),
    "qwen2": (tiny_qwen2, {}),
    "qwen2 mixed windows": (
        tiny_qwen2,
        {"use_sliding_window": True, "sliding_window": 5, "layer_types": [SLIDING, FULL, SLIDING]},
    ),
    "qwen3": (tiny_qwen3, {}),
    "qwen3 biases, windows, tied": (
        tiny_qwen3,
        {"attention_bias": True, "tie_word_embeddings": True, "use_sliding_window": True, "sliding_window": 9,
         "max_window_layers": 1},
    ),
    "gemma3": (tiny_gemma3, {}),
    "gemma3 biases, scaled, untied": (
        tiny_gemma3,
        {"attention_bias": True, "tie_word_embeddings": False, "layer_types": [FULL, SLIDING, SLIDING],
         "rope_parameters": {FULL: LINEAR, SLIDING: {"rope_type": "default", "rope_theta": 90.0}}},
    ),
    "qwen2 experts": (tiny_qwen2_moe, {}),
    "qwen2 experts, every second layer, windows, shares normalised": (
        tiny_qwen2_moe,
        {"decoder_sparse_step": 2, "mlp_only_layers": [], "norm_topk_prob": True, "qkv_bias": False,
         "use_sliding_window": True, "sliding_window": 6, "max_window_layers": 2},
    ),
    "qwen3 experts": (tiny_qwen3_moe, {}),
    "qwen3 experts, biases, window": (
        tiny_qwen3_moe,
        {"attention_bias": True, "use_sliding_window": True, "sliding_window": 9, "norm_topk_prob": False},
    ),
    "mixtral": (tiny_mixtral, {}),
}  # fmt: skip
POOL = 256


@dataclass
class Sequence:
    """A sequence on its way through the model. The first `shared` slots are those of `donor`."""

    tokens: torch.Tensor
    slots: torch.Tensor
    donor: Sequence | None = None
    shared: int = 0
    done: int = 0
    logits: list[torch.Tensor] = field(default_factory=list)


@dataclass
class Case:
    model: Model
    oracle: Any
    backend: str

    def expected(self, sequence: Sequence) -> torch.Tensor:
        with torch.no_grad():
            return self.oracle(sequence.tokens[None]).logits[0]


@pytest.fixture(scope="module", params=CASES)
def oracle(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[ModelConfig, Any]:
    write, overrides = CASES[request.param]
    path = write(tmp_path_factory.mktemp("model"), **overrides)
    return config_of(path), load_oracle(path)


@pytest.fixture(scope="module", params=FOR_MODELS)
def case(request: pytest.FixtureRequest, oracle: tuple[ModelConfig, Any]) -> Case:
    config, model = oracle
    return Case(filled_model(config, model, torch.float32, backend(request.param)), model, request.param)


def config_of(path: Path) -> ModelConfig:
    return read_model_config(ModelSource(name="tiny", kind="folder", path=str(path)))


def filled_model(config: ModelConfig, oracle: Any, dtype: torch.dtype, on: Backend) -> Model:
    """Our model with the oracle's weights; every name and shape must match."""
    model = build_model(config, dtype=dtype, backend=on)
    ignored = re.compile("|".join(model.ignored))
    weights = {name: tensor for name, tensor in oracle.state_dict().items() if not ignored.search(name)}
    places = as_stored(model.places, weights)
    assert {name: tensor.shape for name, tensor in weights.items()} == {
        name: place.shape for name, place in places.items()
    }
    for place in places.values():
        place.write(0, torch.full(place.shape, torch.nan))
    for name, tensor in weights.items():
        places[name].write(0, tensor)
    for name, tensor in weights.items():
        found = read(places[name])
        torch.testing.assert_close(found, tensor, rtol=2.0**-7, atol=1e-5, msg=f"{name} shares its place")
    return model


def read(place: Place) -> torch.Tensor:
    """What was written, as float32."""
    if isinstance(place, OffsetPlace):
        return read(place.inner) - place.offset
    if isinstance(place, StackedPlace):
        return torch.stack([torch.cat([read(part) for part in parts]) for parts in place.parts])
    assert isinstance(place, TensorPlace | PackedRows | PackedBias)
    return (place.tensor if isinstance(place, TensorPlace) else place.read()).float()


def run_step(program: Program, plan: list[tuple[Sequence, int]]) -> None:
    """Compute the next `count` tokens of each sequence in one step."""
    stops = [sequence.done + count for sequence, count in plan]
    news = [slice(sequence.done, stop) for (sequence, _), stop in zip(plan, stops, strict=True)]
    pieces = list(zip((sequence for sequence, _ in plan), news, strict=True))
    lengths = tuple(stops)
    batch = RaggedBatch(
        token_ids=torch.cat([sequence.tokens[new] for sequence, new in pieces]),
        positions=torch.cat([torch.arange(new.start, new.stop) for _, new in pieces]),
        slots=torch.cat([sequence.slots[new] for sequence, new in pieces]),
        query_starts=offsets(tuple(count for _, count in plan)),
        context_lengths=lengths,
        context_slots=torch.cat([sequence.slots[: new.stop] for sequence, new in pieces]),
        context_starts=offsets(lengths),
    )
    logits = program.run(batch, np.arange(batch.num_tokens)).clone()
    some = np.array([batch.num_tokens - 1, 0])
    torch.testing.assert_close(program.logits(some), logits[torch.from_numpy(some)], atol=1e-4, rtol=1e-4)
    for (sequence, new), start in zip(pieces, batch.query_starts, strict=False):
        sequence.logits.append(logits[start : start + new.stop - new.start])
        sequence.done = new.stop


def empty_program(model: Model, dtype: torch.dtype = torch.float32) -> Program:
    """The model's step over a pool of NaN: whatever is read before it was written shows."""
    cache = allocate_kv_cache(model.config, POOL, dtype, "cpu")
    cache.keys.fill_(torch.nan)
    cache.values.fill_(torch.nan)
    return model.program(cache)


def random_sequences(model: Model, lengths: list[int], shares: list[int], seed: int) -> list[Sequence]:
    """Sequences in scattered slots; each after the first begins with as much of the first as `shares` says."""
    generator = torch.Generator().manual_seed(seed)
    free = torch.randperm(POOL, generator=generator)
    sequences: list[Sequence] = []
    for length, share in zip(lengths, shares, strict=True):
        tokens = torch.randint(model.config.vocab_size, (length,), generator=generator)
        slots, free = free[:length], free[length:]
        donor = sequences[0] if sequences else None
        shared = min(share, length - 1, len(donor.tokens)) if donor else 0
        if donor:
            tokens[:shared], slots = donor.tokens[:shared], torch.cat((donor.slots[:shared], slots[shared:]))
        sequences.append(Sequence(tokens, slots, donor, shared, done=shared))
    return sequences


def check(case: Case, sequences: list[Sequence], tolerance: float = 1e-4) -> None:
    for sequence in sequences:
        logits = torch.cat(sequence.logits)
        assert logits.dtype == torch.float32
        torch.testing.assert_close(logits, case.expected(sequence)[sequence.shared :], atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("chunk", [1, 40, 7], ids=["token by token", "at once", "in chunks"])
def test_one_sequence(case: Case, chunk: int) -> None:
    sequences = random_sequences(case.model, [40], [0], seed=chunk)
    program = empty_program(case.model)
    while sequences[0].done < 40:
        run_step(program, [(sequences[0], min(chunk, 40 - sequences[0].done))])
    check(case, sequences)


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_ragged_batches(case: Case, data: st.DataObject) -> None:
    """Any company, any cut into steps, prefixes shared also with what the same step computes."""
    count = data.draw(st.integers(1, 6), "sequences")
    lengths = data.draw(st.lists(st.integers(1, 40), min_size=count, max_size=count), "lengths")
    shares = data.draw(st.lists(st.sampled_from([0, 0, 3, 12]), min_size=count, max_size=count), "shares")
    sequences = random_sequences(case.model, lengths, shares, seed=data.draw(st.integers(0, 99), "seed"))
    program = empty_program(case.model)
    while any(sequence.done < len(sequence.tokens) for sequence in sequences):
        plan: list[tuple[Sequence, int]] = []
        ahead = {id(sequence): sequence.done for sequence in sequences}
        for sequence in sequences:
            left = len(sequence.tokens) - sequence.done
            if left == 0 or (sequence.donor and ahead[id(sequence.donor)] < sequence.shared):
                continue
            wanted = data.draw(st.sampled_from([40, 11, 2, 1, 1, 0]), "new tokens")
            if wanted:
                plan.append((sequence, min(wanted, left)))
                ahead[id(sequence)] += plan[-1][1]
        if plan:
            run_step(program, data.draw(st.permutations(plan), "order"))
    check(case, sequences)


def without_choice(case: Case) -> Case:
    """The same with tokens that take all experts: a rounding that tips a choice between two is no loss of precision."""
    config = case.model.config
    if config.moe is None:
        return case
    every = msgspec.structs.replace(config.moe, top_k=config.moe.num_experts)
    theirs = copy.deepcopy(case.oracle.config)
    theirs.num_experts_per_tok = every.top_k
    oracle = type(case.oracle)(theirs).eval()
    oracle.load_state_dict(case.oracle.state_dict())
    config = msgspec.structs.replace(config, moe=every)
    return Case(filled_model(config, oracle, torch.float32, backend(case.backend)), oracle, case.backend)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(case: Case, dtype: torch.dtype) -> None:
    """No further from the float32 result than `transformers` itself comes in that dtype."""
    case = without_choice(case)
    model = filled_model(case.model.config, case.oracle, dtype, backend(case.backend))
    sequences = random_sequences(model, [40, 25, 31], [0, 6, 0], seed=5)
    program = empty_program(model, dtype)
    run_step(program, [(sequences[0], 33), (sequences[1], 19), (sequences[2], 24)])
    for _ in range(7):
        run_step(program, [(s, 1) for s in sequences if s.done < len(s.tokens)])
    half_oracle = type(case.oracle)(case.oracle.config).to(dtype).eval()
    half_oracle.load_state_dict(case.oracle.state_dict())
    for sequence in sequences:
        logits, exact = torch.cat(sequence.logits), case.expected(sequence)[sequence.shared :]
        with torch.no_grad():
            theirs = half_oracle(sequence.tokens[None]).logits[0, sequence.shared :].float()
        assert (logits - exact).square().mean() <= 1.5 * (theirs - exact).square().mean()


def test_weight_bytes_are_the_weights(case: Case) -> None:
    """Nothing is held twice; packing pads what is no multiple of its panels."""
    values = sum(place.nbytes for place in case.model.places.values())
    if case.backend == "reference":
        assert case.model.weight_bytes == values
    else:
        assert values <= case.model.weight_bytes < 3 * values
