"""Checkpoints small enough to make in a test: random models of each family, in Hugging Face folders with a tokenizer.

The weights are drawn wide (`transformers` would draw them so narrow that attention hardly matters), so that a wrong
mask, rotation or bias shows in the logits.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from tokenizer_models import byte_level, write_folder
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    BertConfig,
    Gemma3TextConfig,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen2MoeConfig,
    Qwen3Config,
    Qwen3MoeConfig,
    RobertaConfig,
    XLMRobertaConfig,
)

Tensors = dict[str, torch.Tensor]

SHAPE = {"num_hidden_layers": 3, "max_position_embeddings": 1024, "bos_token_id": 1, "eos_token_id": 2}
ENCODER_SHAPE = {
    "hidden_size": 48, "intermediate_size": 72, "num_attention_heads": 4, "max_position_embeddings": 64,
}  # fmt: skip


def tiny_llama(path: Path, auto: Any = AutoModelForCausalLM, **overrides: Any) -> Path:
    """LlamaForCausalLM, 9 heads over 3, untied; `overrides` are fields of its config. Returns `path`."""
    shape = {"hidden_size": 72, "intermediate_size": 100, "num_attention_heads": 9, "num_key_value_heads": 3}
    return _write(path, LlamaConfig, {**shape, **overrides}, auto)


def tiny_mistral(path: Path, auto: Any = AutoModelForCausalLM, **overrides: Any) -> Path:
    """MistralForCausalLM, 4 heads over 1 that are wider than hidden / heads, a window of 7 tokens in all layers."""
    shape = {"hidden_size": 40, "intermediate_size": 72, "num_attention_heads": 4, "num_key_value_heads": 1}
    return _write(path, MistralConfig, {**shape, "head_dim": 18, "sliding_window": 7, **overrides}, auto)


def tiny_qwen2(path: Path, auto: Any = AutoModelForCausalLM, **overrides: Any) -> Path:
    """Qwen2ForCausalLM, 7 heads over 7, no window, tied."""
    shape = {"hidden_size": 56, "intermediate_size": 90, "num_attention_heads": 7, "num_key_value_heads": 7}
    return _write(path, Qwen2Config, {**shape, "tie_word_embeddings": True, **overrides}, auto)


def tiny_qwen3(path: Path, auto: Any = AutoModelForCausalLM, **overrides: Any) -> Path:
    """Qwen3ForCausalLM, 6 heads over 2 that are wider than hidden / heads, no window, untied."""
    shape = {"hidden_size": 48, "intermediate_size": 80, "num_attention_heads": 6, "num_key_value_heads": 2}
    return _write(path, Qwen3Config, {**shape, "head_dim": 12, **overrides}, auto)


def tiny_gemma3(path: Path, auto: Any = AutoModelForCausalLM, **overrides: Any) -> Path:
    """Gemma3ForCausalLM, 4 heads over 2, tied; a window of 6 tokens in all layers but the second, and two bases."""
    shape = {"hidden_size": 44, "intermediate_size": 76, "num_attention_heads": 4, "num_key_value_heads": 2}
    own = {"head_dim": 12, "query_pre_attn_scalar": 7, "sliding_window": 6, "sliding_window_pattern": 2}
    return _write(path, Gemma3TextConfig, {**shape, **own, **overrides}, auto)


def tiny_bert(path: Path, auto: Any = AutoModel, **overrides: Any) -> Path:
    """BertModel, or what `auto` (a class of transformers) makes of the config; 4 heads, 64 positions."""
    return _write(path, BertConfig, {**ENCODER_SHAPE, **overrides}, auto)


def tiny_roberta(path: Path, auto: Any = AutoModel, **overrides: Any) -> Path:
    """The same of RobertaModel: no kinds of segments, and the padding's id is 3."""
    return _write(path, RobertaConfig, {**ENCODER_SHAPE, "type_vocab_size": 1, "pad_token_id": 3, **overrides}, auto)


def tiny_xlm_roberta(path: Path, auto: Any = AutoModel, **overrides: Any) -> Path:
    """The same of XLMRobertaModel."""
    return _write(path, XLMRobertaConfig, {**ENCODER_SHAPE, "type_vocab_size": 1, **overrides}, auto)


def upside_down(path: Path, target: Path) -> Path:
    """A checkpoint of the same shapes and other numbers: each tensor's rows in reverse order."""
    return rewritten(path, target, lambda tensors: {name: tensor.flip(0) for name, tensor in tensors.items()})


def rewritten(path: Path, target: Path, change: Callable[[Tensors], Tensors]) -> Path:
    """A copy of a checkpoint whose tensors are what `change` makes of the dictionary of them."""
    shutil.copytree(path, target)
    tensors = {name: tensor.contiguous() for name, tensor in change(load_file(path / "model.safetensors")).items()}
    save_file(tensors, target / "model.safetensors", {"format": "pt"})
    return target


def load_oracle(path: Path, dtype: torch.dtype = torch.float32, auto: Any = AutoModelForCausalLM) -> PreTrainedModel:
    """The checkpoint as `transformers` has it, with its plainest attention."""
    plain = {"attn_implementation": "eager"}
    if '"num_experts_per_tok"' in (path / "config.json").read_text():
        plain["experts_implementation"] = "eager"
    model: PreTrainedModel = auto.from_pretrained(path, dtype=dtype, **plain)
    return model.eval()


def tiny_qwen2_moe(path: Path, **overrides: Any) -> Path:
    """Qwen2MoeForCausalLM, 2 of 8 experts and a shared one, whose second layer is dense."""
    shape = {"hidden_size": 48, "intermediate_size": 80, "num_attention_heads": 6, "num_key_value_heads": 3}
    experts = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 36, "mlp_only_layers": [1]}
    return _write(path, Qwen2MoeConfig, {**shape, **experts, "shared_expert_intermediate_size": 70, **overrides})


def tiny_qwen3_moe(path: Path, **overrides: Any) -> Path:
    """Qwen3MoeForCausalLM, 3 of 8 experts whose shares sum to 1."""
    shape = {"hidden_size": 40, "intermediate_size": 80, "num_attention_heads": 4, "num_key_value_heads": 2}
    experts = {"num_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 34, "norm_topk_prob": True}
    return _write(path, Qwen3MoeConfig, {**shape, **experts, "head_dim": 12, **overrides})


def tiny_mixtral(path: Path, **overrides: Any) -> Path:
    """MixtralForCausalLM, 2 of 8 experts, a window of 7 tokens in all layers."""
    shape = {"hidden_size": 40, "intermediate_size": 52, "num_attention_heads": 4, "num_key_value_heads": 1}
    return _write(path, MixtralConfig, {**shape, "num_local_experts": 8, "sliding_window": 7, **overrides})


def _write(
    path: Path,
    config_class: Callable[..., PreTrainedConfig],
    fields: dict[str, Any],
    auto: Any = AutoModelForCausalLM,
) -> Path:
    backend = byte_level()
    config = config_class(vocab_size=backend.get_vocab_size(), **{**SHAPE, **fields})
    model = auto.from_config(config)
    generator = torch.Generator().manual_seed(20)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.lower().endswith("norm.weight"):
                parameter.uniform_(0.6, 1.4, generator=generator).sub_(int(config_class is Gemma3TextConfig))
            elif parameter.dim() == 1:
                parameter.normal_(0, 0.3, generator=generator)
            else:
                parameter.normal_(0, 1.3 * parameter.shape[-1] ** -0.5, generator=generator)
    model.save_pretrained(path)
    return write_folder(path, backend)
