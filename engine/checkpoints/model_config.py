"""The hyperparameters of a model, in one form whatever file they came from."""

from __future__ import annotations

from typing import Any, Literal

import msgspec


class RopeConfig(msgspec.Struct, frozen=True, kw_only=True):
    """Rotary position embedding and its scaling, with the names that Hugging Face configs use.

    original_context: context length before scaling (llama3, yarn).
    frequency_factors: what each inverse frequency is divided by, after the scaling of `kind`, rotary_dim / 2 of them
        (llama3's scaling, as GGUF files carry it); None: all 1.
    attention_factor: yarn's factor on cos and sin; None: 0.1 ln(factor) + 1 (and mscale, mscale_all_dim if set).
    """

    kind: Literal["default", "linear", "llama3", "yarn"] = "default"
    theta: float = 10000.0
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_context: int | None = None
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True
    frequency_factors: tuple[float, ...] | None = None


class EncoderConfig(msgspec.Struct, frozen=True, kw_only=True):
    """What an encoder (BERT, RoBERTa) has that decoders have not.

    positions: rows of its table of positions; the first token of a text has row `first_position`.
    type_vocab_size: kinds of segments; 0: it tells none apart.
    """

    layer_norm_eps: float
    positions: int
    first_position: int
    type_vocab_size: int


class MoeConfig(msgspec.Struct, frozen=True, kw_only=True):
    """A mixture of experts in place of some layers' MLPs.

    top_k: experts of a token. intermediate_size: an expert's width; shared_intermediate_size: that of the expert that
    every token passes, None where there is none. normalise: the shares of a token's experts sum to 1.
    sparse_layers: which layers have it.
    """

    num_experts: int
    top_k: int
    intermediate_size: int
    shared_intermediate_size: int | None
    normalise: bool
    sparse_layers: tuple[bool, ...]


class ModelConfig(msgspec.Struct, frozen=True, kw_only=True):
    """Hyperparameters of a model; of an encoder, `rope` and `rotary_dim` mean nothing.

    intermediate_size: width of the MLP. rotary_dim: leading part of a head that is rotated.
    attention_bias: q, k and v projections have a bias; output_bias: so has o; mlp_bias: so have the MLP's.
    sliding_window: a token sees itself and this many tokens less one before it, in the layers where
    `layer_is_sliding` is true; None: no layer has a window.
    local_rope: the rotary embedding of layers with a window, where it is another than `rope`.
    attention_scale: of the scores before the softmax; None: head_dim ** -0.5.
    causal: a token sees those before it only; a decoder that was made to embed may see all.
    dtype: the checkpoint's own ("float32", "float16", "bfloat16"), None where it has none (GGUF).
    eos_ids: from config.json and generation_config.json (or the GGUF metadata), ascending.
    moe: None where all layers are dense.
    raw: the config as read, overrides applied, for what is not named here.
    """

    architecture: str
    model_type: str | None
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rotary_dim: int
    intermediate_size: int
    vocab_size: int
    context_length: int
    rms_norm_eps: float
    hidden_act: str
    rope: RopeConfig
    tie_embeddings: bool
    attention_bias: bool
    output_bias: bool
    mlp_bias: bool
    sliding_window: int | None
    layer_is_sliding: tuple[bool, ...]
    dtype: str | None
    bos_id: int | None
    eos_ids: tuple[int, ...]
    raw: dict[str, Any]
    local_rope: RopeConfig | None = None
    attention_scale: float | None = None
    causal: bool = True
    encoder: EncoderConfig | None = None
    moe: MoeConfig | None = None
