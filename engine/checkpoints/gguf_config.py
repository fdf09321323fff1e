"""A GGUF file's metadata, said as the config.json that means the same.

The keys: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md; their defaults are those of llama.cpp.
"""

from __future__ import annotations

import ctypes
import math
import struct
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from engine.checkpoints.config_fields import MOST_LAYERS, Fields
from engine.checkpoints.errors import CheckpointError
from engine.checkpoints.gguf_file import KINDS, GgufHeader

_ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "gemma3": "Gemma3ForCausalLM",
    "qwen2moe": "Qwen2MoeForCausalLM",
    "qwen3moe": "Qwen3MoeForCausalLM",
}
_MODEL_TYPES = {
    "MistralForCausalLM": "mistral",
    "MixtralForCausalLM": "mixtral",
    "Qwen2MoeForCausalLM": "qwen2_moe",
    "Qwen3MoeForCausalLM": "qwen3_moe",
}
# The one Gemma 3 (27B) whose scores are scaled by another size than the head's is told by its layers.
_GEMMA3_27B_LAYERS = 62
ROPE_FACTORS = "rope_freqs.weight"


@dataclass(frozen=True)
class GgufConfig:
    """raw: keys and values of a config.json.

    biases: fields of ModelConfig that no config.json of the architecture can say, because only GGUF has q, k, v biases
    without one of o.
    """

    raw: dict[str, Any]
    biases: dict[str, bool]


def config_of_gguf(files: list[tuple[Path, GgufHeader]]) -> GgufConfig:
    """Translate the metadata of a GGUF model, given the headers of all its files (most have one).

    Raises CheckpointError for keys that are missing or make no sense.
    """
    path, first = files[0]
    # Only the first file has the metadata; the tensors lie in all of them.
    header = replace(first, tensors={name: tensor for _, part in files for name, tensor in part.tensors.items()})
    general = Fields(str(path), "unknown", header.metadata, {})
    arch = general.text("general.architecture")
    prefix = f"{arch}."
    own = {key.removeprefix(prefix): value for key, value in header.metadata.items() if key.startswith(prefix)}
    fields = Fields(f"{path}: {arch}", arch, own, {})
    hidden_size = fields.positive("embedding_length")
    num_heads = fields.positive("attention.head_count")
    head_dim = fields.positive("attention.key_length", hidden_size // num_heads)
    if fields.positive("attention.value_length", head_dim) != head_dim:
        raise fields.error("attention.value_length", f"equal to attention.key_length ({head_dim})")
    window = fields.count("attention.sliding_window") if "attention.sliding_window" in own else 0
    architecture = _architecture(arch, fields, window)
    raw: dict[str, Any] = {
        "architectures": [architecture],
        "model_type": _MODEL_TYPES.get(architecture, arch),
        "hidden_size": hidden_size,
        "num_hidden_layers": fields.positive("block_count", most=MOST_LAYERS),
        "num_attention_heads": num_heads,
        "num_key_value_heads": fields.positive("attention.head_count_kv", num_heads),
        "head_dim": head_dim,
        "intermediate_size": fields.positive("feed_forward_length"),
        "max_position_embeddings": fields.positive("context_length"),
        "rms_norm_eps": _as_written(fields.positive_number("attention.layer_norm_rms_epsilon")),
        "hidden_act": "silu",
        "vocab_size": _vocab_size(header, fields),
        "tie_word_embeddings": "output.weight" not in header.tensors,
        "attention_bias": "blk.0.attn_q.bias" in header.tensors,
        "mlp_bias": "blk.0.ffn_gate.bias" in header.tensors,
        "bos_token_id": header.metadata.get("tokenizer.ggml.bos_token_id"),
        "eos_token_id": _end_ids(general),
        "sliding_window": window or None,
        "dtype": _dtype(header),
        **_rope(files, fields, head_dim),
        **_experts(fields, header),
    }
    if arch == "gemma3":
        raw |= _gemma3(fields, raw)
    biases = {"output_bias": "blk.0.attn_output.bias" in header.tensors}
    if architecture == "MistralForCausalLM":
        biases |= {"attention_bias": raw["attention_bias"], "mlp_bias": raw["mlp_bias"]}
    return GgufConfig(raw=raw, biases=biases)


_PLAIN_KINDS = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}


def _architecture(arch: str, fields: Fields, window: int) -> str:
    """llama stands for Llama, Mistral and Mixtral: they differ in the window and the experts."""
    if arch == "llama" and fields.raw.get("expert_count"):
        return "MixtralForCausalLM"
    if arch == "llama" and window:
        return "MistralForCausalLM"
    return _ARCHITECTURES.get(arch, arch)


def _gemma3(fields: Fields, raw: dict[str, Any]) -> dict[str, Any]:
    """What a config.json of Gemma 3 says beside other families', and what its metadata leaves to llama.cpp."""
    layers = raw["num_hidden_layers"]
    pattern = fields.raw.get("attention.sliding_window_pattern", 6)
    if isinstance(pattern, list):
        sliding = [bool(entry) for entry in pattern]
    else:
        period = fields.positive("attention.sliding_window_pattern", 6)
        sliding = [raw["sliding_window"] is not None and number % period < period - 1 for number in range(layers)]
    size = raw["hidden_size"] // raw["num_attention_heads"] if layers == _GEMMA3_27B_LAYERS else raw["head_dim"]
    return {
        "model_type": "gemma3_text",
        "hidden_activation": "gelu_pytorch_tanh",
        "query_pre_attn_scalar": size,
        "layer_types": ["sliding_attention" if windowed else "full_attention" for windowed in sliding],
        "rope_local_base_freq": _as_written(fields.positive_number("rope.freq_base_swa", 10000.0)),
        "final_logit_softcapping": fields.number_or_none("final_logit_softcapping") or None,
    }


def _experts(fields: Fields, header: GgufHeader) -> dict[str, Any]:
    """The keys of a mixture of experts, which every layer then has. Whether the shares of a token's experts sum to 1 is
    not in the file: they do in llama.cpp's Qwen3 and Mixtral, not in its Qwen2."""
    arch = fields.architecture
    if not fields.raw.get("expert_count"):
        return {}
    used, width = fields.positive("expert_used_count"), fields.positive("feed_forward_length")
    experts = {"num_experts_per_tok": used}
    if arch == "llama":
        return {"num_local_experts": fields.positive("expert_count"), **experts}
    return {
        "num_experts": fields.positive("expert_count"),
        **experts,
        "moe_intermediate_size": fields.positive("expert_feed_forward_length", max(1, width // used)),
        "shared_expert_intermediate_size": fields.positive("expert_shared_feed_forward_length", width),
        "norm_topk_prob": arch == "qwen3moe",
        "qkv_bias": "blk.0.attn_q.bias" in header.tensors,
    }


def _vocab_size(header: GgufHeader, fields: Fields) -> int:
    """Rows of the embedding, which may be more than the tokenizer has tokens (padding)."""
    embedding = header.tensors.get("token_embd.weight")
    if embedding is not None and len(embedding.shape) == 2:
        return embedding.shape[0]
    tokens = header.metadata.get("tokenizer.ggml.tokens")
    return len(tokens) if isinstance(tokens, list) else fields.positive("vocab_size")


def _dtype(header: GgufHeader) -> str | None:
    """The dtype that holds the file's matrices as they are; None: they are quantised."""
    projection = header.tensors.get("blk.0.attn_q.weight")
    return None if projection is None else _PLAIN_KINDS.get(KINDS[projection.kind][0])


def _end_ids(general: Fields) -> list[int]:
    """The ends of a generation: of the text, of a turn, of a message."""
    keys = ("eos_token_id", "eot_token_id", "eom_token_id")
    return sorted({token for key in keys for token in general.token_ids(f"tokenizer.ggml.{key}")})


def _rope(files: list[tuple[Path, GgufHeader]], fields: Fields, head_dim: int) -> dict[str, Any]:
    rotary_dim = fields.positive("rope.dimension_count", head_dim)
    if rotary_dim > head_dim:
        raise fields.error("rope.dimension_count", f"at most the head's size ({head_dim})")
    if fields.architecture == "llama" and rotary_dim != head_dim:
        raise fields.error("rope.dimension_count", f"the head's size ({head_dim}), as the rows of q and k are permuted")
    scaling = _scaling(fields)
    for path, header in files:
        if ROPE_FACTORS in header.tensors:
            scaling["frequency_factors"] = _frequency_factors(path, header)
    return {
        "rope_theta": _as_written(fields.positive_number("rope.freq_base", 10000.0)),
        "partial_rotary_factor": rotary_dim / head_dim,
        "rope_scaling": scaling,
    }


def _scaling(fields: Fields) -> dict[str, Any]:
    kind = fields.text_or_none("rope.scaling.type") or "linear"
    factor = fields.number_or_none("rope.scaling.factor") or fields.number_or_none("rope.scale_linear") or 1.0
    if kind == "none" or (kind == "linear" and factor == 1.0):
        return {"rope_type": "default"}
    scaling: dict[str, Any] = {"rope_type": kind, "factor": _as_written(factor)}
    if "rope.scaling.original_context_length" in fields.raw:
        scaling["original_max_position_embeddings"] = fields.positive("rope.scaling.original_context_length")
    if kind != "yarn":
        return scaling
    for key in ("beta_fast", "beta_slow"):
        scaling[key] = fields.number_or_none(f"rope.scaling.yarn_{key}")
    # llama.cpp multiplies these factors with yarn's usual one; in a config.json attention_factor stands in its place.
    own = fields.positive_number("rope.scaling.attn_factor", 1.0)
    own *= fields.positive_number("rope.scaling.yarn_attn_factor", 1.0)
    if own != 1.0:
        scaling["attention_factor"] = own * (0.1 * math.log(max(factor, 1.0)) + 1.0)
    return scaling


def _frequency_factors(path: Path, header: GgufHeader) -> tuple[float, ...]:
    tensor = header.tensors[ROPE_FACTORS]
    if KINDS[tensor.kind][0] != "F32" or len(tensor.shape) != 1:
        raise CheckpointError(f"{path}: {ROPE_FACTORS} is {KINDS[tensor.kind][0]} {tensor.shape}, not a vector of F32")
    with path.open("rb") as file:
        file.seek(tensor.offset)
        factors: tuple[float, ...] = struct.unpack(f"<{tensor.shape[0]}f", file.read(tensor.size))
    if not all(math.isfinite(factor) and factor > 0 for factor in factors):
        raise CheckpointError(f"{path}: {ROPE_FACTORS} holds values that are not greater than 0")
    return factors


def _as_written(value: float) -> float:
    """The shortest decimal that is this float32: 1e-5 for the 9.999999747378752e-06 that the file holds."""
    for digits in range(1, 9):
        short = float(f"{value:.{digits}g}")
        if _float32(short) == _float32(value):
            return short
    return value


def _float32(value: float) -> float:
    result: float = ctypes.c_float(value).value
    return result
