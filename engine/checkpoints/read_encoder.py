"""Read the hyperparameters of an encoder: BERT, RoBERTa and XLM-RoBERTa."""

from __future__ import annotations

from typing import Any

from engine.checkpoints.config_fields import MOST_LAYERS, Fields
from engine.checkpoints.errors import CheckpointError
from engine.checkpoints.model_config import EncoderConfig, ModelConfig, RopeConfig

_BERT_DEFAULTS: dict[str, Any] = {
    "vocab_size": 30522,
    "hidden_size": 768,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "intermediate_size": 3072,
    "hidden_act": "gelu",
    "max_position_embeddings": 512,
    "type_vocab_size": 2,
    "layer_norm_eps": 1e-12,
    "pad_token_id": 0,
}
_ROBERTA_DEFAULTS = {**_BERT_DEFAULTS, "pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2}
ENCODER_DEFAULTS = {
    "BertModel": _BERT_DEFAULTS,
    "RobertaModel": {**_ROBERTA_DEFAULTS, "vocab_size": 50265},
    "XLMRobertaModel": _ROBERTA_DEFAULTS,
}


def read_encoder(fields: Fields, family: str, dtype: str | None, eos_ids: tuple[int, ...]) -> ModelConfig:
    """The hyperparameters of an encoder of `family`. Raises CheckpointError."""
    hidden_size, num_heads = fields.positive("hidden_size"), fields.positive("num_attention_heads")
    if hidden_size % num_heads:
        raise fields.error("num_attention_heads", f"a divisor of hidden_size ({hidden_size})")
    if fields.raw.get("position_embedding_type", "absolute") not in ("absolute", None):
        raise fields.error("position_embedding_type", "'absolute'")
    if fields.flag("is_decoder", False):
        raise fields.error("is_decoder", "false: encoders only embed and classify")
    positions = fields.positive("max_position_embeddings")
    first_position = _first_position(fields, family)
    if first_position >= positions:
        raise CheckpointError(
            f"{fields.where}: max_position_embeddings is {positions}; pad_token_id {first_position - 1} leaves none"
        )
    layers = fields.positive("num_hidden_layers", most=MOST_LAYERS)
    eps = fields.positive_number("layer_norm_eps")
    return ModelConfig(
        architecture=fields.architecture,
        model_type=fields.text_or_none("model_type"),
        hidden_size=hidden_size,
        num_layers=layers,
        num_heads=num_heads,
        num_kv_heads=num_heads,
        head_dim=hidden_size // num_heads,
        rotary_dim=0,
        intermediate_size=fields.positive("intermediate_size"),
        vocab_size=fields.positive("vocab_size"),
        context_length=positions - first_position,
        rms_norm_eps=eps,
        hidden_act=fields.text("hidden_act"),
        rope=RopeConfig(),
        tie_embeddings=False,
        attention_bias=True,
        output_bias=True,
        mlp_bias=True,
        sliding_window=None,
        layer_is_sliding=(False,) * layers,
        dtype=dtype,
        bos_id=next(iter(fields.token_ids("bos_token_id")), None),
        eos_ids=eos_ids,
        raw=fields.raw,
        causal=False,
        encoder=EncoderConfig(
            layer_norm_eps=eps,
            positions=positions,
            first_position=first_position,
            type_vocab_size=fields.count("type_vocab_size"),
        ),
    )


def _first_position(fields: Fields, family: str) -> int:
    """BERT counts positions from 0, RoBERTa from behind the id of its padding."""
    if family == "BertModel":
        return 0
    pad = fields.token_ids("pad_token_id")
    if len(pad) != 1:
        raise fields.error("pad_token_id", "a token id, as positions are counted from behind it")
    return pad[0] + 1
