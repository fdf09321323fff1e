"""What part of this machine's limits a row has reached.

A decode step reads every weight that it multiplies once, whatever the number of clients, and the keys and values of
each client's context; it multiplies each of those weights once a client. Of experts it reads those that some client's
token takes: as many as tokens would take that choose evenly and on their own. A prefill multiplies the layers' weights
once a token and the head's once a prompt; attention itself, which is small beside that, is left out of both.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import msgspec

from engine.bench.errors import BenchError
from engine.bench.figures import RowFigures
from engine.bench.server import Facts
from engine.checkpoints.model_config import ModelConfig

if TYPE_CHECKING:
    from engine.kernels.roofline import Roofline

_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}


@dataclass(frozen=True)
class Shape:
    """layer_parameters: that one token is multiplied with, of all layers' projections. head_parameters: of the head.
    kv_bytes: of one token. weight_bytes: of all weights but experts'. expert_bytes: of one expert of each layer that
    has them, of which a token takes top_k out of `experts`."""

    layer_parameters: int
    head_parameters: int
    weight_bytes: int
    kv_bytes: int
    expert_bytes: int = 0
    experts: int = 1
    top_k: int = 0

    def bytes_a_step(self, clients: int) -> float:
        """Weights that a decode step reads."""
        missed = (1 - self.top_k / self.experts) ** clients
        return self.weight_bytes + self.expert_bytes * self.experts * (1 - missed)


class Reached(msgspec.Struct, frozen=True, kw_only=True):
    """Of one row, in tokens a second.

    bound_by: the lower of the two limits. bound_tok_s: what it allows. decode_tok_s: all clients' at the median gap
    between tokens (None for a prefill). end_to_end_tok_s: over the wall time of a round; of a prefill, its prompts'.
    """

    label: str
    bound_by: Literal["read bandwidth", "matrix throughput"]
    bound_tok_s: float
    decode_tok_s: float | None
    decode_fraction: float | None
    end_to_end_tok_s: float
    end_to_end_fraction: float


class RooflineFigures(msgspec.Struct, frozen=True, kw_only=True):
    """What the machine can do, what the model needs, and what each row has reached."""

    threads: int
    isa: str
    read_bytes_s: float
    matmul_flop_s: dict[str, float]
    dtype: str
    weight_bytes_a_step: int
    kv_bytes_a_token: int
    parameters_a_token: int
    rows: list[Reached]


def measure(facts: Facts) -> Roofline:
    """Measure this machine with as many threads as the server has, and with its instruction set.

    Raises BenchError where the server does not say what is needed for that.
    """
    if facts.threads is None:
        raise BenchError("--roofline: the server does not say how many threads it has (cpu_threads in /server_info)")
    if facts.model is None:
        raise BenchError(f"--roofline: the files of {facts.name} are not on this machine, so its size is not known")
    for what, known in (("dtype", facts.dtype), ("kv_cache_dtype", facts.kv_dtype)):
        if known not in _BYTES:
            raise BenchError(f"--roofline: the server's {what} is {known!r}; known are {', '.join(_BYTES)}")
    from engine.kernels.roofline import measure_roofline  # it imports torch, which no other benchmark needs

    return measure_roofline(facts.threads, None if facts.isa in ("auto", "reference") else facts.isa)


def shape_of(model: ModelConfig, dtype: str, kv_dtype: str) -> Shape:
    """What a decoder multiplies a token, from its hyperparameters."""
    queries, keys = model.num_heads * model.head_dim, model.num_kv_heads * model.head_dim
    attention = model.hidden_size * (2 * queries + 2 * keys)
    moe = model.moe
    sparse = sum(moe.sparse_layers) if moe is not None else 0
    dense = model.num_layers * attention + (model.num_layers - sparse) * 3 * model.hidden_size * model.intermediate_size
    head = model.vocab_size * model.hidden_size
    size, kv_bytes = _BYTES[dtype], 2 * model.num_layers * keys * _BYTES[kv_dtype]
    if moe is None:
        return Shape(dense, head, (dense + head) * size, kv_bytes)
    shared = 3 * moe.shared_intermediate_size + 1 if moe.shared_intermediate_size is not None else 0
    dense += sparse * model.hidden_size * (moe.num_experts + shared)
    expert = sparse * 3 * model.hidden_size * moe.intermediate_size
    layers = dense + moe.top_k * expert
    return Shape(layers, head, (dense + head) * size, kv_bytes, expert * size, moe.num_experts, moe.top_k)


def reached(roofline: Roofline, facts: Facts, rows: Sequence[RowFigures]) -> RooflineFigures:
    """The rows but those with Poisson arrivals, which do not keep the server busy."""
    assert facts.model is not None
    shape = shape_of(facts.model, facts.dtype, facts.kv_dtype)
    dtype = facts.dtype if facts.dtype in roofline.matmul else "float32"
    flops = roofline.matmul[dtype]
    return RooflineFigures(
        threads=roofline.threads,
        isa=roofline.isa,
        read_bytes_s=roofline.read_bandwidth,
        matmul_flop_s=roofline.matmul,
        dtype=dtype,
        weight_bytes_a_step=round(shape.bytes_a_step(1)),
        kv_bytes_a_token=shape.kv_bytes,
        parameters_a_token=shape.layer_parameters + shape.head_parameters,
        rows=[
            _prefill(row, shape, flops)
            if row.kind == "prefill"
            else _decode(row, shape, flops, roofline.read_bandwidth)
            for row in rows
            if row.kind != "poisson"
        ],
    )


def _prefill(row: RowFigures, shape: Shape, flops: float) -> Reached:
    tokens = _prompt_tokens(row)
    bound = tokens * flops / (2 * (tokens * shape.layer_parameters + shape.head_parameters))
    return Reached(
        label=row.label,
        bound_by="matrix throughput",
        bound_tok_s=bound,
        decode_tok_s=None,
        decode_fraction=None,
        end_to_end_tok_s=row.prompt_tok_s,
        end_to_end_fraction=row.prompt_tok_s / bound,
    )


def _decode(row: RowFigures, shape: Shape, flops: float, bandwidth: float) -> Reached:
    """The mean context is the prompt and half the output."""
    context = _prompt_tokens(row) + row.output_tokens_each / 2
    reading = row.clients * bandwidth / (shape.bytes_a_step(row.clients) + row.clients * context * shape.kv_bytes)
    multiplying = flops / (2 * (shape.layer_parameters + shape.head_parameters))
    bound = min(reading, multiplying)
    return Reached(
        label=row.label,
        bound_by="read bandwidth" if reading <= multiplying else "matrix throughput",
        bound_tok_s=bound,
        decode_tok_s=row.decode_tok_s,
        decode_fraction=None if row.decode_tok_s is None else row.decode_tok_s / bound,
        end_to_end_tok_s=row.output_tok_s,
        end_to_end_fraction=row.output_tok_s / bound,
    )


def _prompt_tokens(row: RowFigures) -> float:
    """Of a request, on average."""
    return sum(one.prompt_tokens for one in row.rounds) / (row.requests * len(row.rounds))
