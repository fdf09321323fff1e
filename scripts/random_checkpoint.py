"""Write a random bfloat16 checkpoint of a well-known model's shape, to measure where the model itself is not at hand.

python -m scripts.random_checkpoint --shape qwen2-0.5b OUTDIR

The tokenizer is a small byte-level one: ids beyond it decode to nothing, which costs a benchmark of random ids nothing.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from engine.checkpoints.load_weights import random_weights
from engine.checkpoints.weights import TensorPlace

SHAPES: dict[str, dict[str, Any]] = {
    "qwen2-0.5b": {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "hidden_size": 896,
        "num_hidden_layers": 24,
        "num_attention_heads": 14,
        "num_key_value_heads": 2,
        "intermediate_size": 4864,
        "vocab_size": 151936,
        "max_position_embeddings": 32768,
        "rope_theta": 1000000.0,
        "rms_norm_eps": 1e-6,
        "use_sliding_window": False,
    },
    "smollm2-135m": {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": 576,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "intermediate_size": 1536,
        "vocab_size": 49152,
        "max_position_embeddings": 8192,
        "rope_theta": 100000.0,
        "rms_norm_eps": 1e-5,
    },
}
SHAPES["moe-1.7b"] = {
    "architectures": ["Qwen3MoeForCausalLM"],
    "model_type": "qwen3_moe",
    "hidden_size": 1024,
    "num_hidden_layers": 16,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "intermediate_size": 4096,
    "num_experts": 64,
    "num_experts_per_tok": 8,
    "moe_intermediate_size": 512,
    "norm_topk_prob": True,
    "vocab_size": 49152,
    "max_position_embeddings": 32768,
    "rope_theta": 1000000.0,
    "rms_norm_eps": 1e-6,
}
"""No model's, but the proportions of many: 8 of 64 experts, 0.3 of 1.7 billion parameters a token."""
_COMMON = {"hidden_act": "silu", "tie_word_embeddings": True, "torch_dtype": "bfloat16", "eos_token_id": 0}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=sorted(SHAPES), required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("folder", type=Path)
    options = parser.parse_args()
    write_checkpoint(options.folder, SHAPES[options.shape], options.seed)


def write_checkpoint(folder: Path, shape: dict[str, Any], seed: int) -> None:
    """A folder in Hugging Face layout, whose weights are those of `--load-format dummy` with this seed."""
    import torch
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    config = {**shape, **_COMMON}
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    tensors = {name: torch.empty(size, dtype=torch.bfloat16) for name, size in tensors_of(config).items()}
    random_weights({name: TensorPlace(tensor) for name, tensor in tensors.items()}, seed)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    _write_tokenizer(folder)


def tensors_of(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Name → shape of every tensor of a Llama, a Qwen2 or a Qwen3 with experts, with tied embeddings.

    Qwen2 has biases on q, k and v; Qwen3 norms of queries and keys.
    """
    hidden, experts = config["hidden_size"], config.get("num_experts")
    head = hidden // config["num_attention_heads"]
    keys = head * config["num_key_value_heads"]
    tensors: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (config["vocab_size"], hidden)}
    for layer in range(config["num_hidden_layers"]):
        at = f"model.layers.{layer}"
        rows = {"q": hidden, "k": keys, "v": keys}
        tensors |= {f"{at}.self_attn.{name}_proj.weight": (count, hidden) for name, count in rows.items()}
        if config["model_type"] == "qwen2":
            tensors |= {f"{at}.self_attn.{name}_proj.bias": (count,) for name, count in rows.items()}
        tensors[f"{at}.self_attn.o_proj.weight"] = (hidden, hidden)
        if config["model_type"] == "qwen3_moe":
            tensors |= {f"{at}.self_attn.{name}_norm.weight": (head,) for name in ("q", "k")}
        if experts is None:
            tensors |= _mlp(f"{at}.mlp", config["intermediate_size"], hidden)
        else:
            tensors[f"{at}.mlp.gate.weight"] = (experts, hidden)
            for number in range(experts):
                tensors |= _mlp(f"{at}.mlp.experts.{number}", config["moe_intermediate_size"], hidden)
        tensors |= {f"{at}.{name}_layernorm.weight": (hidden,) for name in ("input", "post_attention")}
    tensors["model.norm.weight"] = (hidden,)
    return tensors


def _mlp(at: str, width: int, hidden: int) -> dict[str, tuple[int, ...]]:
    shapes = {"gate": (width, hidden), "up": (width, hidden), "down": (hidden, width)}
    return {f"{at}.{name}_proj.weight": shape for name, shape in shapes.items()}


def _write_tokenizer(folder: Path) -> None:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {"<|endoftext|>": 0, **{letter: 1 + i for i, letter in enumerate(alphabet)}}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken("<|endoftext|>", normalized=False)])
    backend.save(str(folder / "tokenizer.json"))
    roles = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|endoftext|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(roles, indent=2) + "\n")


if __name__ == "__main__":
    main()
