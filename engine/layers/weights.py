"""The weights of a decoder: which tensors there are, how they are fused, and where each checkpoint tensor goes."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from engine.checkpoints.model_config import ModelConfig
from engine.checkpoints.weights import Place, TensorPlace


@dataclass(frozen=True)
class DecoderTraits:
    """What a family has that others have not.

    qkv_bias, output_bias: biases in attention; mlp_bias: in all three projections of the MLP.
    head_norms: an RMS norm of each query and key head before the rotation.
    windows: sliding window of each layer, None where a layer has none.
    """

    qkv_bias: bool
    output_bias: bool
    mlp_bias: bool
    head_norms: bool
    windows: tuple[int | None, ...]


@dataclass(frozen=True, eq=False)
class Linear:
    """weight: [out, in]. bias: [out] or None."""

    weight: torch.Tensor
    bias: torch.Tensor | None


@dataclass(frozen=True, eq=False)
class AttentionWeights:
    """qkv: query, key and value projections, one below the other. q_norm, k_norm: [head_dim] or None."""

    qkv: Linear
    output: Linear
    q_norm: torch.Tensor | None
    k_norm: torch.Tensor | None


@dataclass(frozen=True, eq=False)
class MlpWeights:
    """gate_up: the gate's projection above that of `up`."""

    gate_up: Linear
    down: Linear


@dataclass(frozen=True, eq=False)
class LayerWeights:
    """One layer; the norms are [hidden]."""

    attention_norm: torch.Tensor
    attention: AttentionWeights
    mlp_norm: torch.Tensor
    mlp: MlpWeights


@dataclass(frozen=True, eq=False)
class DecoderWeights:
    """embedding, head: [vocabulary, hidden], one and the same tensor where they are tied. final_norm: [hidden]."""

    embedding: torch.Tensor
    layers: tuple[LayerWeights, ...]
    final_norm: torch.Tensor
    head: torch.Tensor


class _Allocator:
    """Allocates tensors of one dtype on one device, and notes under which checkpoint name each is filled."""

    def __init__(self, dtype: torch.dtype, device: torch.device | str) -> None:
        self.places: dict[str, Place] = {}
        self._dtype = dtype
        self._device = device

    def tensor(self, name: str, *shape: int) -> torch.Tensor:
        tensor = torch.empty(shape, dtype=self._dtype, device=self._device)
        self.places[name] = TensorPlace(tensor)
        return tensor

    def linear(self, pieces: dict[str, int], inputs: int, bias: bool) -> Linear:
        """One projection whose rows are several checkpoint projections: name → number of rows, in order."""
        outputs = sum(pieces.values())
        weight = torch.empty((outputs, inputs), dtype=self._dtype, device=self._device)
        bias_vector = torch.empty(outputs, dtype=self._dtype, device=self._device) if bias else None
        start = 0
        for name, rows in pieces.items():
            self.places[f"{name}.weight"] = TensorPlace(weight[start : start + rows])
            if bias_vector is not None:
                self.places[f"{name}.bias"] = TensorPlace(bias_vector[start : start + rows])
            start += rows
        return Linear(weight, bias_vector)


def allocate_decoder(
    config: ModelConfig, traits: DecoderTraits, dtype: torch.dtype, device: torch.device | str
) -> tuple[DecoderWeights, dict[str, Place]]:
    """Unfilled weights of a decoder, and name → place for each tensor of a Hugging Face checkpoint of it."""
    allocator = _Allocator(dtype, device)
    embedding = allocator.tensor("model.embed_tokens.weight", config.vocab_size, config.hidden_size)
    layers = tuple(_layer(allocator, config, traits, f"model.layers.{index}") for index in range(config.num_layers))
    final_norm = allocator.tensor("model.norm.weight", config.hidden_size)
    head = embedding
    if not config.tie_embeddings:
        head = allocator.tensor("lm_head.weight", config.vocab_size, config.hidden_size)
    return DecoderWeights(embedding, layers, final_norm, head), allocator.places


def ignored_names(config: ModelConfig) -> tuple[str, ...]:
    """Patterns of names that checkpoints hold and a decoder computes itself (or has tied to another tensor)."""
    computed = r"\.rotary_emb\.inv_freq$"
    return (computed, r"^lm_head\.weight$") if config.tie_embeddings else (computed,)


def _layer(allocator: _Allocator, config: ModelConfig, traits: DecoderTraits, prefix: str) -> LayerWeights:
    hidden, width = config.hidden_size, config.intermediate_size
    attention_norm = allocator.tensor(f"{prefix}.input_layernorm.weight", hidden)
    attention = _attention(allocator, config, traits, f"{prefix}.self_attn")
    mlp_norm = allocator.tensor(f"{prefix}.post_attention_layernorm.weight", hidden)
    gate_up = {f"{prefix}.mlp.gate_proj": width, f"{prefix}.mlp.up_proj": width}
    mlp = MlpWeights(
        gate_up=allocator.linear(gate_up, hidden, traits.mlp_bias),
        down=allocator.linear({f"{prefix}.mlp.down_proj": hidden}, width, traits.mlp_bias),
    )
    return LayerWeights(attention_norm, attention, mlp_norm, mlp)


def _attention(allocator: _Allocator, config: ModelConfig, traits: DecoderTraits, prefix: str) -> AttentionWeights:
    query_rows, kv_rows = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    qkv = {f"{prefix}.q_proj": query_rows, f"{prefix}.k_proj": kv_rows, f"{prefix}.v_proj": kv_rows}
    norms: list[torch.Tensor | None] = [None, None]
    if traits.head_norms:
        norms = [allocator.tensor(f"{prefix}.{name}.weight", config.head_dim) for name in ("q_norm", "k_norm")]
    return AttentionWeights(
        qkv=allocator.linear(qkv, config.hidden_size, traits.qkv_bias),
        output=allocator.linear({f"{prefix}.o_proj": config.hidden_size}, query_rows, traits.output_bias),
        q_norm=norms[0],
        k_norm=norms[1],
    )
