"""The weights of a decoder: which tensors there are, how they are fused, and where each checkpoint tensor goes."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from engine.checkpoints.architectures import about
from engine.checkpoints.model_config import ModelConfig, MoeConfig
from engine.checkpoints.task import Task
from engine.checkpoints.weights import OffsetPlace, Place, TensorPlace
from engine.kernels.table import Activation, Backend, Matrix, MoeWeights, SharedExpert
from engine.layers.heads import DenseLayer, allocate_dense
from engine.parallel.division import Division, Part, whole
from engine.parallel.places import NotHere, columns_of, rows_of


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
    activation: of the MLP's gate. post_norms: an RMS norm behind attention and one behind the MLP, too.
    norm_offset: what is added to the norms' weights as they are in the checkpoint.
    scaled_embedding: embeddings are multiplied by the square root of the hidden size.
    moe_names: of the experts in the layers that the config's `moe` names.
    """

    qkv_bias: bool
    output_bias: bool
    mlp_bias: bool
    head_norms: bool
    windows: tuple[int | None, ...]
    activation: Activation = "silu"
    post_norms: bool = False
    norm_offset: float = 0.0
    scaled_embedding: bool = False
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
    """One layer; the norms are [hidden], those behind attention and the MLP None where there are none."""

    attention_norm: torch.Tensor
    attention: AttentionWeights
    mlp_norm: torch.Tensor
    mlp: MlpWeights | MoeWeights
    attention_post_norm: torch.Tensor | None = None
    mlp_post_norm: torch.Tensor | None = None


@dataclass(frozen=True, eq=False)
class DecoderWeights:
    """embedding: [vocabulary, hidden]. final_norm: [hidden].

    head: [vocabulary, hidden], the embedding itself where they are tied; [labels, hidden] of a classifier; None where
    hidden states are what is asked for. dense: layers that these go through.
    """

    embedding: Matrix
    layers: tuple[LayerWeights, ...]
    final_norm: torch.Tensor
    head: Matrix | None
    dense: tuple[DenseLayer, ...] = ()


class Allocator:
    """Allocates weights of one dtype, and notes under which checkpoint name each is filled."""

    def __init__(self, backend: Backend, dtype: torch.dtype) -> None:
        self.places: dict[str, Place] = {}
        self._backend = backend
        self._dtype = dtype

    def vector(self, name: str, size: int, offset: float = 0.0) -> torch.Tensor:
        """offset: added to what is written; the sum is kept in float32, as it has more digits than the part."""
        made = self._backend.vector(size, torch.float32 if offset else self._dtype)
        place = TensorPlace(made[:size])
        self.places[name] = OffsetPlace(place, offset) if offset else place
        return made

    def table(self, name: str, rows: Part, columns: int) -> Matrix:
        """A matrix with `rows` of a checkpoint's [rows, columns]."""
        made = self._backend.matrix(rows.size, columns, self._dtype)
        self.places[name] = rows_of(made.rows(0, rows.size), rows)
        return made

    def linear(self, pieces: dict[str, Part], inputs: int, bias: bool, gated: bool = False) -> Matrix:
        """One projection whose rows are of several checkpoint projections: name → which rows, in order."""
        outputs = sum(part.size for part in pieces.values())
        made = self._backend.matrix(outputs, inputs, self._dtype, bias=bias, gated=gated)
        start = 0
        for name, part in pieces.items():
            self.places[f"{name}.weight"] = rows_of(made.rows(start, start + part.size), part)
            if bias:
                self.places[f"{name}.bias"] = rows_of(made.bias(start, start + part.size), part)
            start += part.size
        return made

    def summed(self, name: str, outputs: int, inputs: Part, bias: bool, leads: bool) -> Matrix:
        """A projection of a part of its inputs, which gives the whole only when added up over the ranks.

        leads: this rank has the bias, which is to be added once."""
        made = self._backend.matrix(outputs, inputs.size, self._dtype, bias=bias and leads)
        self.places[f"{name}.weight"] = columns_of(made.rows(0, outputs), inputs)
        if bias:
            self.places[f"{name}.bias"] = made.bias(0, outputs) if leads else NotHere((outputs,))
        return made


def allocate_decoder(
    config: ModelConfig, traits: DecoderTraits, task: Task, division: Division, dtype: torch.dtype, backend: Backend
) -> tuple[DecoderWeights, dict[str, Place]]:
    """Unfilled weights of a rank's part of a decoder for a task, and name → place for each tensor of a Hugging Face
    checkpoint of it."""
    allocator = Allocator(backend, dtype)
    embedding = allocator.table("model.embed_tokens.weight", division.vocabulary, config.hidden_size)
    layers = tuple(_layer(allocator, config, traits, division, index) for index in range(config.num_layers))
    final_norm = allocator.vector("model.norm.weight", config.hidden_size, traits.norm_offset)
    head, dense = _head(allocator, config, task, division, embedding)
    return DecoderWeights(embedding, layers, final_norm, head, dense), allocator.places


def _head(
    allocator: Allocator, config: ModelConfig, task: Task, division: Division, embedding: Matrix
) -> tuple[Matrix | None, tuple[DenseLayer, ...]]:
    hidden = config.hidden_size
    if task.kind == "embedding":
        return None, allocate_dense(allocator.linear, task)
    if task.kind == "generation":
        tied = config.tie_embeddings
        return embedding if tied else allocator.table("lm_head.weight", division.vocabulary, hidden), ()
    if about(config.architecture).head == "reward":
        before = DenseLayer(allocator.linear({"score.0": whole(hidden)}, hidden, bias=True), "relu")
        return allocator.linear({"score.2": whole(task.width)}, hidden, bias=True), (before,)
    return allocator.table("score.weight", whole(task.width), hidden), ()


def weight_bytes(weights: DecoderWeights) -> int:
    """Memory that the weights take, as they are laid out."""
    ends = (weights.embedding, weights.head, *(layer.matrix for layer in weights.dense))
    matrices = {id(matrix): matrix for matrix in ends if matrix is not None}
    vectors = [weights.final_norm]
    for layer in weights.layers:
        attention, mlp = layer.attention, layer.mlp
        matrices |= {id(m): m for m in (attention.qkv, attention.output, *_mlp_matrices(mlp))}
        vectors += [layer.attention_norm, layer.mlp_norm]
        optional = (attention.q_norm, attention.k_norm, layer.attention_post_norm, layer.mlp_post_norm)
        vectors += [norm for norm in optional if norm is not None]
    return sum(matrix.nbytes for matrix in matrices.values()) + sum(vector.nbytes for vector in vectors)


def _mlp_matrices(mlp: MlpWeights | MoeWeights) -> tuple[Matrix, ...]:
    if isinstance(mlp, MlpWeights):
        return (mlp.gate_up, mlp.down)
    shared = (mlp.shared.gate_up, mlp.shared.down, mlp.shared.gate) if mlp.shared is not None else ()
    return (mlp.router, *mlp.gate_ups, *mlp.downs, *shared)


def ignored_names(config: ModelConfig, task: Task) -> tuple[str, ...]:
    """Patterns of names that checkpoints hold and a decoder computes itself, has tied to another tensor, or has no use
    for in its task."""
    computed = r"\.rotary_emb\.inv_freq$"
    headless = config.tie_embeddings or task.kind != "generation"
    return (computed, r"^lm_head\.weight$") if headless else (computed,)


def _layer(
    allocator: Allocator, config: ModelConfig, traits: DecoderTraits, division: Division, index: int
) -> LayerWeights:
    prefix, hidden = f"model.layers.{index}", config.hidden_size

    def norm(name: str) -> torch.Tensor:
        return allocator.vector(f"{prefix}.{name}_layernorm.weight", hidden, traits.norm_offset)

    attention_norm = norm("input")
    attention = _attention(allocator, config, traits, division, f"{prefix}.self_attn")
    # Gemma gives the name of other families' norm before the MLP to one behind attention.
    attention_post_norm = norm("post_attention") if traits.post_norms else None
    mlp_norm = norm("pre_feedforward" if traits.post_norms else "post_attention")
    mlp: MlpWeights | MoeWeights
    if config.moe is not None and config.moe.sparse_layers[index]:
        mlp = _moe(allocator, config.moe, hidden, traits.moe_names, division, prefix)
    else:
        mlp = _mlp(allocator, hidden, division.mlp, traits.mlp_bias, division.leads, f"{prefix}.mlp")
    mlp_post_norm = norm("post_feedforward") if traits.post_norms else None
    return LayerWeights(attention_norm, attention, mlp_norm, mlp, attention_post_norm, mlp_post_norm)


def _mlp(
    allocator: Allocator,
    hidden: int,
    width: Part,
    bias: bool,
    leads: bool,
    prefix: str,
    names: MoeNames = MoeNames(),
) -> MlpWeights:
    gate_up = {f"{prefix}.{names.gate}": width, f"{prefix}.{names.up}": width}
    return MlpWeights(
        gate_up=allocator.linear(gate_up, hidden, bias, gated=True),
        down=allocator.summed(f"{prefix}.{names.down}", hidden, width, bias, leads),
    )


def _moe(
    allocator: Allocator, moe: MoeConfig, hidden: int, names: MoeNames, division: Division, prefix: str
) -> MoeWeights:
    """Each rank has the router, and its part of the width of every expert."""
    block, leads = f"{prefix}.{names.block}", division.leads
    assert division.expert is not None
    router = allocator.linear({f"{block}.gate": whole(moe.num_experts)}, hidden, False)
    experts = [
        _mlp(allocator, hidden, division.expert, False, leads, f"{block}.experts.{number}", names)
        for number in range(moe.num_experts)
    ]
    shared = None
    if division.shared is not None:
        mlp = _mlp(allocator, hidden, division.shared, False, leads, f"{block}.shared_expert")
        shared = SharedExpert(
            mlp.gate_up, mlp.down, allocator.linear({f"{block}.shared_expert_gate": whole(1)}, hidden, False)
        )
    return MoeWeights(
        router=router,
        gate_ups=tuple(expert.gate_up for expert in experts),
        downs=tuple(expert.down for expert in experts),
        top_k=moe.top_k,
        normalise=moe.normalise,
        shared=shared,
    )


def _attention(
    allocator: Allocator, config: ModelConfig, traits: DecoderTraits, division: Division, prefix: str
) -> AttentionWeights:
    query_rows, kv_rows = division.queries.times(config.head_dim), division.kv.times(config.head_dim)
    qkv = {f"{prefix}.q_proj": query_rows, f"{prefix}.k_proj": kv_rows, f"{prefix}.v_proj": kv_rows}
    norms: list[torch.Tensor | None] = [None, None]
    if traits.head_norms:
        norms = [
            allocator.vector(f"{prefix}.{name}.weight", config.head_dim, traits.norm_offset)
            for name in ("q_norm", "k_norm")
        ]
    return AttentionWeights(
        qkv=allocator.linear(qkv, config.hidden_size, traits.qkv_bias),
        output=allocator.summed(f"{prefix}.o_proj", config.hidden_size, query_rows, traits.output_bias, division.leads),
        q_norm=norms[0],
        k_norm=norms[1],
    )
