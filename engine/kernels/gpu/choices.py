"""Every launch that models make, as values: the ops run on torch's device "meta", and note their launches."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from engine.kernels.batch import RaggedBatch, offsets
from engine.kernels.gpu import sampling
from engine.kernels.gpu.launch import Call
from engine.kernels.gpu.ops import GpuOps
from engine.kernels.gpu.products import gpu_matrix
from engine.kernels.gpu.rows import add_up_call
from engine.kernels.table import Activation, MoeWeights, RotaryFrequencies

META = torch.device("meta")
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
# That a sum over the ranks of a model is noted for.
RANKS = (2, 8)
# Of the step that is noted: a chunk of new tokens, then decodes, in contexts of so many tokens.
CHUNK, DECODES, CONTEXT = 256, 4, 2048


@dataclass(frozen=True)
class Shape:
    """A model's shape, as far as kernels are chosen by it.

    pool: the dtype of the KV pool; None: that of the activations.
    """

    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    inner: int
    rotary_dim: int
    normed: bool = False
    experts: int = 0
    causal: bool = True
    activation: Activation = "silu"
    window: int | None = None
    pool: torch.dtype | None = None


SHAPES = {
    "heads of 64 (SmolLM2-135M)": Shape(576, 9, 3, 64, 1536, 64),
    "heads of 64 (Qwen2-0.5B)": Shape(896, 14, 2, 64, 4864, 64),
    "heads of 80": Shape(2560, 32, 32, 80, 10240, 32, activation="gelu_tanh"),
    "heads of 96 (Phi-3-mini)": Shape(3072, 32, 32, 96, 8192, 96, window=2047),
    "heads of 128 (Llama-3.1-8B)": Shape(4096, 32, 8, 128, 14336, 128),
    "heads of 128 (Qwen3-30B-A3B)": Shape(2048, 32, 4, 128, 768, 128, normed=True, experts=128),
    "heads of 128, pool in float32": Shape(4096, 32, 8, 128, 14336, 128, pool=torch.float32),
    "heads of 128, pool in bfloat16": Shape(4096, 32, 8, 128, 14336, 128, pool=torch.bfloat16),
    "heads of 256, pool in float32": Shape(2560, 8, 4, 256, 10240, 256, pool=torch.float32),
    "heads of 256 (Gemma-3-4B)": Shape(2560, 8, 4, 256, 10240, 256, normed=True, activation="gelu_tanh", window=1024),
    "both directions (MiniLM)": Shape(384, 12, 12, 32, 1536, 0, causal=False, activation="gelu"),
}


SAMPLING = "sampling"


def launches(name: str, dtype: torch.dtype) -> list[Call]:
    """Those of a model of SHAPES, or of sampling, which knows one dtype."""
    return sampling_launches() if name == SAMPLING else model_launches(SHAPES[name], dtype)


def context_of(name: str) -> int:
    """Tokens that a sequence has in what `launches` notes."""
    return CONTEXT if name == SAMPLING or SHAPES[name].causal else CHUNK


def model_launches(shape: Shape, dtype: torch.dtype) -> list[Call]:
    """What a step of one layer launches, with its embedding and head: decodes and a chunk of new tokens together."""
    noted: list[Call] = []
    ops = GpuOps(META, noted.append)
    batch = _batch(shape.causal)
    hidden, dim = shape.hidden, shape.head_dim
    width = (shape.heads + 2 * shape.kv_heads) * dim
    norm, head_norm = torch.empty(hidden, dtype=dtype, device=META), torch.empty(dim, dtype=dtype, device=META)
    rotary = RotaryFrequencies(torch.empty(shape.rotary_dim // 2), 1.0)
    step = ops.begin_step(batch, (rotary,), shape.kv_heads, (shape.window,), causal=shape.causal)
    pool = torch.empty((2, shape.kv_heads, 4 * CONTEXT, dim), dtype=shape.pool or dtype, device=META)
    table = gpu_matrix(1024, hidden, dtype, META)
    if shape.causal:
        x = ops.embedding(batch.token_ids, table)
        normed, x = ops.rms_norm(x, None, norm, 1e-5)
        normed, x = ops.rms_norm(normed, x, norm, 1e-5)
    else:
        x = normed = ops.embedding_sum(batch, table, table, table, 0)
        x = normed = ops.layer_norm(x, x, norm, norm, 1e-5)
    qkv = ops.linear(normed, gpu_matrix(width, hidden, dtype, META, bias=True))
    scale, base = head_norm if shape.normed else None, 0 if shape.rotary_dim else None
    queries = ops.rotary_store(qkv, scale, scale, 1e-5, pool[0], pool[1], base, step)
    attended = ops.attention(queries, pool[0], pool[1], 1.0, shape.window, step)
    x = ops.linear(attended, gpu_matrix(hidden, shape.heads * dim, dtype, META))
    noted += [add_up_call(torch.empty((ranks, *x.shape), dtype=dtype, device=META), x) for ranks in RANKS]
    if shape.experts:
        ops.moe(x, _experts(shape, dtype))
    elif shape.causal:
        ops.gated_linear(x, gpu_matrix(2 * shape.inner, hidden, dtype, META), shape.activation)
    else:
        ops.linear(x, gpu_matrix(shape.inner, hidden, dtype, META, bias=True), shape.activation)
        ends = np.array([stop - 1 for stop in batch.query_starts[1:]])
        ops.pool(x, batch, ends, "mean")
        ops.pool(x, batch, ends, "max")
    return noted


def _batch(causal: bool) -> RaggedBatch:
    counts = (CHUNK, *(1,) * DECODES)
    lengths = (CONTEXT,) * len(counts) if causal else counts
    ids = torch.empty(sum(counts), dtype=torch.int64, device=META)
    slots = torch.empty(sum(lengths), dtype=torch.int64, device=META)
    return RaggedBatch(ids, ids, ids, offsets(counts), lengths, slots, offsets(lengths))


def _experts(shape: Shape, dtype: torch.dtype) -> MoeWeights:
    gate_up = gpu_matrix(2 * shape.inner, shape.hidden, dtype, META)
    down = gpu_matrix(shape.hidden, shape.inner, dtype, META)
    router = gpu_matrix(shape.experts, shape.hidden, dtype, META)
    return MoeWeights(router, (gate_up,) * shape.experts, (down,) * shape.experts, 8, True, None)


def sampling_launches(rows: int = DECODES, vocabulary: int = 151_936) -> list[Call]:
    """What the reductions of sampling launch, for rows of a large vocabulary."""
    logits = torch.empty((rows, vocabulary), dtype=torch.float32, device=META)
    of = {
        dtype: torch.empty(rows, dtype=dtype, device=META)
        for dtype in (torch.float32, torch.float64, torch.int32, torch.int64)
    }
    columns = tuple(np.ones(rows) for _ in range(6))
    return [
        *sampling.best_calls(logits, of[torch.int64], of[torch.float32]),
        sampling.locate_call(logits, of[torch.int32], columns, of[torch.int64]),
        sampling.log_sums_call(logits, of[torch.int32], of[torch.float32], of[torch.float64], of[torch.float64]),
    ]


def build_key(call: Call) -> tuple[object, ...]:
    """Launches with one key run one build."""
    kinds = tuple(
        (name, value.dtype if isinstance(value, torch.Tensor) else type(value))
        for name, value in call.arguments.items()
    )
    return (call.name, kinds, tuple(call.constants.items()), call.warps, call.stages)


def distinct(calls: list[Call]) -> list[Call]:
    """The launches that need another build than those before them."""
    return list({build_key(call): call for call in reversed(calls)}.values())[::-1]
