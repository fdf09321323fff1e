"""The weights of a decoder: which tensors there are, how they are fused, and where each checkpoint tensor goes."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from engine.checkpoints.model_config import ModelConfig, MoeConfig
from engine.checkpoints.weights import Place, TensorPlace
from engine.kernels.table import Backend, Matrix, MoeWeights, SharedExpert


@dataclass(frozen=True)
class MoeNames:
    """What checkpoints call the parts of a mixture of experts: the block, and an expert's projections."""

    block: str = "mlp"
    gate: str = "gate_proj"
    up: str = "up_proj"
    down: str = "down_proj"


@dataclass(frozen=True)
class DecoderTraits:
    """What a family has that others have not.

    qkv_bias, output_bias: biases in attention; mlp_bias: in all three projections of the MLP.
    head_norms: an RMS norm of each query and key head before the rotation.
    windows: sliding window of each layer, None where a layer has none.
    moe_names: of the experts in the layers that the config's `moe` names.
    """

    qkv_bias: bool
    output_bias: bool
    mlp_bias: bool
    head_norms: bool
    windows: tuple[int | None, ...]
    moe_names: MoeNames = MoeNames()


@dataclass(frozen=True, eq=False)
class AttentionWeights:
    """qkv: query, key and value projections, one below the other. q_norm, k_norm: [head_dim] or None."""

    qkv: Matrix
    output: Matrix
    q_norm: torch.Tensor | None
    k_norm: torch.Tensor | None


@dataclass(frozen=True, eq=False)
class MlpWeights:
    """gate_up: the gate's projection above that of `up`."""

    gate_up: Matrix
    down: Matrix


@dataclass(frozen=True, eq=False)
class LayerWeights:
    """One layer; the norms are [hidden]."""

    attention_norm: torch.Tensor
    attention: AttentionWeights
    mlp_norm: torch.Tensor
    mlp: MlpWeights | MoeWeights


@dataclass(frozen=True, eq=False)
class DecoderWeights:
    """embedding, head: [vocabulary, hidden], one and the same matrix where they are tied. final_norm: [hidden]."""

    embedding: Matrix
    layers: tuple[LayerWeights, ...]
    final_norm: torch.Tensor
    head: Matrix


class _Allocator:
    """Allocates weights of one dtype, and notes under which checkpoint name each is filled."""

    def __init__(self, backend: Backend, dtype: torch.dtype) -> None:
        self.places: dict[str, Place] = {}
        self._backend = backend
        self._dtype = dtype

    def vector(self, name: str, size: int) -> torch.Tensor:
        made = self._backend.vector(size, self._dtype)
        self.places[name] = TensorPlace(made[:size])
        return made

    def table(self, name: str, rows: int, columns: int) -> Matrix:
        made = self._backend.matrix(rows, columns, self._dtype)
        self.places[name] = made.rows(0, rows)
        return made

    def linear(self, pieces: dict[str, int], inputs: int, bias: bool, gated: bool = False) -> Matrix:
        """One projection whose rows are several checkpoint projections: name → number of rows, in order."""
        made = self._backend.matrix(sum(pieces.values()), inputs, self._dtype, bias=bias, gated=gated)
        start = 0
        for name, rows in pieces.items():
            self.places[f"{name}.weight"] = made.rows(start, start + rows)
            if bias:
                self.places[f"{name}.bias"] = made.bias(start, start + rows)
            start += rows
        return made


def allocate_decoder(
    config: ModelConfig, traits: DecoderTraits, dtype: torch.dtype, backend: Backend
) -> tuple[DecoderWeights, dict[str, Place]]:
    """Unfilled weights of a decoder, and name → place for each tensor of a Hugging Face checkpoint of it."""
    allocator = _Allocator(backend, dtype)
    embedding = allocator.table("model.embed_tokens.weight", config.vocab_size, config.hidden_size)
    layers = tuple(_layer(allocator, config, traits, index) for index in range(config.num_layers))
    final_norm = allocator.vector("model.norm.weight", config.hidden_size)
    head = embedding
    if not config.tie_embeddings:
        head = allocator.table("lm_head.weight", config.vocab_size, config.hidden_size)
    return DecoderWeights(embedding, layers, final_norm, head), allocator.places


def weight_bytes(weights: DecoderWeights) -> int:
    """Memory that the weights take, as they are laid out."""
    matrices = {id(matrix): matrix for matrix in (weights.embedding, weights.head)}
    vectors = [weights.final_norm]
    for layer in weights.layers:
        attention, mlp = layer.attention, layer.mlp
        matrices |= {id(m): m for m in (attention.qkv, attention.output, *_mlp_matrices(mlp))}
        vectors += [layer.attention_norm, layer.mlp_norm]
        vectors += [norm for norm in (attention.q_norm, attention.k_norm) if norm is not None]
    return sum(matrix.nbytes for matrix in matrices.values()) + sum(vector.nbytes for vector in vectors)


def _mlp_matrices(mlp: MlpWeights | MoeWeights) -> tuple[Matrix, ...]:
    if isinstance(mlp, MlpWeights):
        return (mlp.gate_up, mlp.down)
    shared = (mlp.shared.gate_up, mlp.shared.down, mlp.shared.gate) if mlp.shared is not None else ()
    return (mlp.router, *mlp.gate_ups, *mlp.downs, *shared)


def ignored_names(config: ModelConfig) -> tuple[str, ...]:
    """Patterns of names that checkpoints hold and a decoder computes itself (or has tied to another tensor)."""
    computed = r"\.rotary_emb\.inv_freq$"
    return (computed, r"^lm_head\.weight$") if config.tie_embeddings else (computed,)


def _layer(allocator: _Allocator, config: ModelConfig, traits: DecoderTraits, index: int) -> LayerWeights:
    prefix, hidden = f"model.layers.{index}", config.hidden_size
    attention_norm = allocator.vector(f"{prefix}.input_layernorm.weight", hidden)
    attention = _attention(allocator, config, traits, f"{prefix}.self_attn")
    mlp_norm = allocator.vector(f"{prefix}.post_attention_layernorm.weight", hidden)
    mlp: MlpWeights | MoeWeights
    if config.moe is not None and config.moe.sparse_layers[index]:
        mlp = _moe(allocator, config.moe, hidden, traits.moe_names, prefix)
    else:
        mlp = _mlp(allocator, hidden, config.intermediate_size, traits.mlp_bias, f"{prefix}.mlp")
    return LayerWeights(attention_norm, attention, mlp_norm, mlp)


def _mlp(
    allocator: _Allocator, hidden: int, width: int, bias: bool, prefix: str, names: MoeNames = MoeNames()
) -> MlpWeights:
    gate_up = {f"{prefix}.{names.gate}": width, f"{prefix}.{names.up}": width}
    return MlpWeights(
        gate_up=allocator.linear(gate_up, hidden, bias, gated=True),
        down=allocator.linear({f"{prefix}.{names.down}": hidden}, width, bias),
    )


def _moe(allocator: _Allocator, moe: MoeConfig, hidden: int, names: MoeNames, prefix: str) -> MoeWeights:
    block, width, shared_width = f"{prefix}.{names.block}", moe.intermediate_size, moe.shared_intermediate_size
    router = allocator.linear({f"{block}.gate": moe.num_experts}, hidden, False)
    experts = [
        _mlp(allocator, hidden, width, False, f"{block}.experts.{number}", names) for number in range(moe.num_experts)
    ]
    shared = None
    if shared_width is not None:
        mlp = _mlp(allocator, hidden, shared_width, False, f"{block}.shared_expert")
        shared = SharedExpert(
            mlp.gate_up, mlp.down, allocator.linear({f"{block}.shared_expert_gate": 1}, hidden, False)
        )
    return MoeWeights(
        router=router,
        gate_ups=tuple(expert.gate_up for expert in experts),
        downs=tuple(expert.down for expert in experts),
        top_k=moe.top_k,
        normalise=moe.normalise,
        shared=shared,
    )


def _attention(allocator: _Allocator, config: ModelConfig, traits: DecoderTraits, prefix: str) -> AttentionWeights:
    query_rows, kv_rows = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    qkv = {f"{prefix}.q_proj": query_rows, f"{prefix}.k_proj": kv_rows, f"{prefix}.v_proj": kv_rows}
    norms: list[torch.Tensor | None] = [None, None]
    if traits.head_norms:
        norms = [allocator.vector(f"{prefix}.{name}.weight", config.head_dim) for name in ("q_norm", "k_norm")]
    return AttentionWeights(
        qkv=allocator.linear(qkv, config.hidden_size, traits.qkv_bias),
        output=allocator.linear({f"{prefix}.o_proj": config.hidden_size}, query_rows, traits.output_bias),
        q_norm=norms[0],
        k_norm=norms[1],
    )
