"""Whether the compiled kernels are there and compute what the reference does."""

from __future__ import annotations

import numpy as np
import torch

from engine.checkpoints.load_weights import random_weights
from engine.checkpoints.model_config import ModelConfig, RopeConfig
from engine.config import ConfigError, ServerConfig
from engine.doctor.finding import Finding
from engine.kernels.batch import RaggedBatch, offsets
from engine.kernels.choice import open_backend
from engine.kernels.eager import EagerBackend
from engine.kernels.kv_cache import allocate_kv_cache
from engine.kernels.table import Backend
from engine.models.registry import build_model

_TINY = ModelConfig(
    architecture="LlamaForCausalLM", model_type="llama", hidden_size=64, num_layers=2, num_heads=4, num_kv_heads=2,
    head_dim=16, rotary_dim=16, intermediate_size=96, vocab_size=128, context_length=64, rms_norm_eps=1e-5,
    hidden_act="silu", rope=RopeConfig(), tie_embeddings=False, attention_bias=False, output_bias=False, mlp_bias=False,
    sliding_window=None, layer_is_sliding=(False, False), dtype=None, bos_id=None, eos_ids=(), raw={},
)  # fmt: skip
_TOKENS = 48
_CLOSE = 1e-4
"""In float32 the kernels and the reference differ by the order of their sums."""


def kernels(config: ServerConfig) -> Finding:
    """Choose kernels as the server does, and let them and the reference run a tiny random model."""
    try:
        backend = open_backend(config.cpu_isa, config.cpu_threads)
    except ConfigError as error:
        return Finding("kernels", "error", str(error), "leave --cpu-isa and TOKENMILL_CPU_ISA out")
    if isinstance(backend, EagerBackend):
        advice = "install again with a C++ compiler at hand (apt install g++), on a processor with AVX2"
        return Finding("kernels", "warning", "the slow reference kernels serve", advice)
    furthest = float((_logits(backend) - _logits(EagerBackend())).abs().max())
    return judge(backend.name, furthest)


def judge(name: str, furthest: float) -> Finding:
    """furthest: how far the two results lie apart."""
    if not furthest <= _CLOSE:  # so that NaN is far, too
        advice = "serve with --cpu-isa of a lesser instruction set, and suspect the processor or its memory"
        return Finding("kernels", "error", f"{name}: a tiny model's logits are off by {furthest:.2g}", advice)
    return Finding("kernels", "ok", f"{name}: a tiny model's logits are right to {furthest:.1g}")


def _logits(backend: Backend) -> torch.Tensor:
    model = build_model(_TINY, dtype=torch.float32, backend=backend)
    random_weights(model.places, seed=1)
    program = model.program(allocate_kv_cache(_TINY, _TOKENS, torch.float32, "cpu"))
    each = torch.arange(_TOKENS)
    lengths = (_TOKENS,)
    batch = RaggedBatch(
        token_ids=each * 7 % _TINY.vocab_size, positions=each, slots=each, query_starts=offsets(lengths),
        context_lengths=lengths, context_slots=each, context_starts=offsets(lengths),
    )  # fmt: skip
    return program.run(batch, np.arange(_TOKENS)).to(torch.float32).clone()
