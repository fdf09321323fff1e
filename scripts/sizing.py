"""Print the sizing table of docs/scaling.md: what a machine can decode at most, from its limits and a model's shape.

python -m scripts.sizing
"""

from __future__ import annotations

import json
import math
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine.bench.roofline import Shape, shape_of
from engine.checkpoints.read_config import read_model_config
from engine.config import ModelSource

CONTEXT = 4096
"""Tokens that each request holds in the pool."""
ANSWER = 256
"""Tokens of an answer, each an event of a stream."""
MOST = 256
"""Requests at once of a replica, however much memory there is."""
FREE = 0.9
"""Share of the memory for weights and pool."""
ROUTER_REQUEST = 600e-6
ROUTER_EVENT = 8e-6
"""Processor seconds of sglang-router 0.3.2, for a request and for each event of its stream; measured."""


@dataclass(frozen=True)
class Machine:
    """bandwidth: bytes a second. memory: bytes. flops: a second in bfloat16. replicas: of it."""

    name: str
    bandwidth: float
    memory: float
    flops: float
    replicas: int = 1


MACHINES = (
    Machine("1 laptop core", 15e9, 16e9, 0.1e12),
    Machine("2 cores (measured limits)", 33e9, 24e9, 0.44e12),
    Machine("16-core desktop", 70e9, 64e9, 2e12),
    Machine("dual-socket server", 690e9, 768e9, 20e12),
    Machine("1 GPU, sm_80 (A100 80 GB)", 2.0e12, 80e9, 312e12),
    Machine("1 GPU, sm_90 (H100)", 3.35e12, 80e9, 989e12),
    Machine("8 GPUs, sm_90, `--tp-size 8`", 8 * 3.35e12, 8 * 80e9, 8 * 989e12),
    *(Machine(f"{n:,} replicas of 8 GPUs", 8 * 3.35e12, 8 * 80e9, 8 * 989e12, n) for n in (10, 100, 1000)),
)

_LLAMA: dict[str, Any] = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "rms_norm_eps": 1e-5}


def _config(base: dict[str, Any], *sizes: int, **more: Any) -> dict[str, Any]:
    names = (
        "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "intermediate_size",
        "vocab_size",
    )  # fmt: skip
    return base | dict(zip(names, sizes, strict=True)) | {"max_position_embeddings": 8192, "hidden_act": "silu"} | more


MODELS: dict[str, dict[str, Any]] = {
    "SmolLM2-135M": _config(_LLAMA, 576, 30, 9, 3, 1536, 49152, tie_word_embeddings=True),
    "Qwen2-0.5B": _config(
        _LLAMA | {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2"},
        896, 24, 14, 2, 4864, 151936, tie_word_embeddings=True,
    ),
    "Llama-3-8B": _config(_LLAMA, 4096, 32, 32, 8, 14336, 128256),
    "Llama-3-70B": _config(_LLAMA, 8192, 80, 64, 8, 28672, 128256),
    "Qwen3-30B-A3B": _config(
        _LLAMA | {"architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe"},
        2048, 48, 32, 4, 6144, 151936, head_dim=128, num_experts=128, num_experts_per_tok=8,
        moe_intermediate_size=768, norm_topk_prob=True, decoder_sparse_step=1, mlp_only_layers=[],
    ),
}  # fmt: skip
"""What decides a size, as the models' own config.json have it."""


def shapes() -> dict[str, Shape]:
    """Every model in bfloat16."""
    found = {}
    for name, config in MODELS.items():
        with tempfile.TemporaryDirectory() as folder:
            (Path(folder) / "config.json").write_text(json.dumps(config))
            model = read_model_config(ModelSource(name=name, kind="folder", path=folder))
        found[name] = shape_of(model, "bfloat16", "bfloat16")
    return found


def whole(shape: Shape) -> int:
    """Bytes of all weights (of an untied embedding only the head, which is what a step reads)."""
    return shape.weight_bytes + shape.expert_bytes * shape.experts


def most_at_once(machine: Machine, shape: Shape) -> int:
    """Requests of CONTEXT tokens for which the pool has room beside the weights; 0: not even the weights fit."""
    room = FREE * machine.memory - whole(shape)
    return max(0, min(MOST, int(room / (shape.kv_bytes * CONTEXT))))


def rate(machine: Machine, shape: Shape, clients: int) -> tuple[float, str]:
    """Tokens a second that one replica decodes at most, and what bounds it: weights, KV or compute."""
    weights, kv = shape.bytes_a_step(clients), clients * CONTEXT * shape.kv_bytes
    by_memory = clients * machine.bandwidth / (weights + kv)
    by_compute = machine.flops / (2 * (shape.layer_parameters + shape.head_parameters))
    if by_compute < by_memory:
        return by_compute, "compute"
    return by_memory, "KV" if kv > weights else "weights"


def router_cores(tokens_a_second: float) -> int:
    """Cores of routers that stream so much, in answers of ANSWER tokens."""
    return math.ceil(tokens_a_second * (ROUTER_REQUEST / ANSWER + ROUTER_EVENT))


def sizing_table() -> str:
    """Two tables in Markdown: the models, and the machines."""
    return "\n".join([*_models(), "", *_machines()])


def _models() -> Iterator[str]:
    yield "| Model (bfloat16) | all weights | read a token, one request | KV a token | KV of 4,096 tokens |"
    yield "|---|---|---|---|---|"
    for name, shape in shapes().items():
        kv = shape.kv_bytes * CONTEXT
        read = shape.bytes_a_step(1)
        yield f"| {name} | {whole(shape) / 1e9:.2f} GB | {read / 1e9:.2f} GB | {shape.kv_bytes / 1024:g} KiB | {kv / 1e6:,.0f} MB |"  # noqa: E501


def _machines() -> Iterator[str]:
    sizes = shapes()
    yield "| Machine | " + " | ".join(sizes) + " | router cores, at most |"
    yield "|---" * (len(sizes) + 2) + "|"
    for machine in MACHINES:
        cells, most = [], 0.0
        for shape in sizes.values():
            clients = most_at_once(machine, shape)
            if not clients:
                cells.append("does not fit")
                continue
            alone = rate(machine, shape, 1)[0]
            together, bound = rate(machine, shape, clients)
            most = max(most, machine.replicas * together)
            cells.append(
                f"{_round(alone)}; {_round(machine.replicas * together)} at {machine.replicas * clients:,} ({bound})"
            )
        yield f"| {machine.name} | " + " | ".join(cells) + f" | {router_cores(most):,} |"


def _round(value: float) -> str:
    """Two digits that count."""
    digits = max(0, math.floor(math.log10(value)) - 1)
    return f"{round(value, -digits):,.0f}" if value >= 10 else f"{value:.1f}"


if __name__ == "__main__":
    print(sizing_table())
