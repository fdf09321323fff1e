"""Hyperparameters against transformers' own configuration classes, in both styles of config.json."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from transformers import (
    AutoConfig,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    PreTrainedConfig,
    Qwen2Config,
    Qwen2MoeConfig,
    Qwen3Config,
    Qwen3MoeConfig,
)
from transformers.masking_utils import sliding_window_overlay

from engine.checkpoints.errors import CheckpointError
from engine.checkpoints.locate import locate
from engine.checkpoints.model_config import ModelConfig, MoeConfig, RopeConfig
from engine.checkpoints.read_config import read_model_config
from engine.config import ModelSource

FAMILIES = {
    "llama": LlamaConfig,
    "qwen2": Qwen2Config,
    "qwen3": Qwen3Config,
    "mistral": MistralConfig,
    "qwen2_moe": Qwen2MoeConfig,
    "qwen3_moe": Qwen3MoeConfig,
    "mixtral": MixtralConfig,
}
ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2_moe": "Qwen2MoeForCausalLM",
    "qwen3_moe": "Qwen3MoeForCausalLM",
    "mixtral": "MixtralForCausalLM",
}
SMALL = {"hidden_size": 96, "num_hidden_layers": 4, "num_attention_heads": 6, "num_key_value_heads": 2}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 1024,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 8192, "beta_fast": 24}


def read(folder: Path, config: dict[str, Any], overrides: dict[str, Any] | None = None) -> ModelConfig:
    (folder / "config.json").write_text(json.dumps(config))
    return read_model_config(ModelSource(name="x", kind="folder", path=str(folder)), overrides)


def old_style(config: dict[str, Any]) -> dict[str, Any]:
    """The same config as the hub has it: rope_theta and rope_scaling {"type"}, torch_dtype."""
    config = dict(config)
    rope = dict(config.pop("rope_parameters"))
    config["rope_theta"] = rope.pop("rope_theta")
    rope["type"] = rope.pop("rope_type")
    config["rope_scaling"] = None if rope["type"] == "default" else rope
    config["torch_dtype"] = config.pop("dtype", None)
    return config


def expect_as_transformers(ours: ModelConfig, theirs: PreTrainedConfig) -> None:
    family = theirs.model_type
    assert ours.architecture == ARCHITECTURES[family]
    assert ours.model_type == family
    assert ours.hidden_size == theirs.hidden_size
    assert ours.num_layers == theirs.num_hidden_layers
    assert ours.num_heads == theirs.num_attention_heads
    assert ours.num_kv_heads == theirs.num_key_value_heads
    assert ours.head_dim == (getattr(theirs, "head_dim", None) or theirs.hidden_size // theirs.num_attention_heads)
    assert ours.rotary_dim == ours.head_dim
    assert ours.intermediate_size == theirs.intermediate_size
    assert ours.vocab_size == theirs.vocab_size
    assert ours.rms_norm_eps == theirs.rms_norm_eps
    assert ours.hidden_act == theirs.hidden_act
    assert ours.tie_embeddings == theirs.tie_word_embeddings
    theirs_bias = getattr(theirs, "attention_bias", getattr(theirs, "qkv_bias", False))
    assert ours.attention_bias == (family == "qwen2" or theirs_bias)
    assert ours.output_bias == (family != "qwen2" and getattr(theirs, "attention_bias", False))
    assert ours.mlp_bias == getattr(theirs, "mlp_bias", False)
    assert ours.bos_id == theirs.bos_token_id
    eos = theirs.eos_token_id
    assert list(ours.eos_ids) == ([] if eos is None else sorted(eos) if isinstance(eos, list) else [eos])
    assert ours.dtype == (None if theirs.dtype is None else str(theirs.dtype).removeprefix("torch."))
    if family in ("mistral", "mixtral", "qwen3_moe"):
        layers = [theirs.sliding_window is not None] * theirs.num_hidden_layers
    else:
        layers = [kind == "sliding_attention" for kind in getattr(theirs, "layer_types", None) or []]
        layers = layers or [False] * theirs.num_hidden_layers
    assert list(ours.layer_is_sliding) == layers
    assert ours.sliding_window == (theirs.sliding_window if any(layers) else None)
    assert (ours.moe is not None) == (family in ("mixtral", "qwen2_moe", "qwen3_moe"))
    if ours.moe is not None:
        expect_experts_as_transformers(ours.moe, theirs)
    rope = {key: value for key, value in theirs.rope_parameters.items() if value is not None and key != "type"}
    names = {"rope_type": "kind", "rope_theta": "theta", "original_max_position_embeddings": "original_context"}
    assert ours.rope == RopeConfig(**{names.get(key, key): value for key, value in rope.items()})


def expect_experts_as_transformers(ours: MoeConfig, theirs: PreTrainedConfig) -> None:
    dense = getattr(theirs, "mlp_only_layers", ())
    step = getattr(theirs, "decoder_sparse_step", 1)
    sparse = [number not in dense and (number + 1) % step == 0 for number in range(theirs.num_hidden_layers)]
    assert list(ours.sparse_layers) == sparse
    assert (ours.num_experts, ours.top_k) == (theirs.num_experts, theirs.num_experts_per_tok)
    assert ours.intermediate_size == getattr(theirs, "moe_intermediate_size", theirs.intermediate_size)
    assert ours.shared_intermediate_size == getattr(theirs, "shared_expert_intermediate_size", None)
    assert ours.normalise == getattr(theirs, "norm_topk_prob", True)


CASES: list[tuple[str, dict[str, Any]]] = [
    ("llama", {}),
    ("llama", {"head_dim": 32, "attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True}),
    ("llama", {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 500.0}}),
    ("llama", {"rope_parameters": LLAMA3 | {"rope_theta": 500000.0}, "max_position_embeddings": 8192}),
    ("llama", {"eos_token_id": [9, 4, 7], "bos_token_id": None, "dtype": "bfloat16"}),
    ("qwen2", {"tie_word_embeddings": True, "dtype": "float16"}),
    ("qwen2", {"use_sliding_window": True, "sliding_window": 17, "max_window_layers": 1}),
    ("qwen2", {"rope_parameters": YARN | {"rope_theta": 1000000.0, "mscale": 0.7, "mscale_all_dim": 0.9}}),
    ("qwen3", {}),
    ("qwen3", {"attention_bias": True, "head_dim": 16, "eos_token_id": 3}),
    ("qwen3", {"rope_parameters": YARN | {"attention_factor": 1.5, "truncate": False, "rope_theta": 1e6}}),
    (
        "qwen3",
        {
            "use_sliding_window": True,
            "sliding_window": 8,
            "layer_types": ["full_attention", "sliding_attention", "full_attention", "sliding_attention"],
        },
    ),
    ("mistral", {}),
    ("mistral", {"sliding_window": None, "head_dim": 24}),
    ("mixtral", {}),
    ("mixtral", {"num_local_experts": 5, "num_experts_per_tok": 3, "sliding_window": 12, "head_dim": 24}),
    ("qwen2_moe", {}),
    ("qwen2_moe", {"decoder_sparse_step": 2, "mlp_only_layers": [3], "norm_topk_prob": True, "qkv_bias": False}),
    ("qwen2_moe", {"use_sliding_window": True, "sliding_window": 9, "max_window_layers": 3}),
    ("qwen3_moe", {"num_experts": 16, "num_experts_per_tok": 4, "moe_intermediate_size": 40}),
    ("qwen3_moe", {"attention_bias": True, "head_dim": 32, "use_sliding_window": True, "mlp_only_layers": [0, 1]}),
]


@pytest.mark.parametrize(("family", "changes"), CASES)
@pytest.mark.parametrize("style", ["new", "old"])
def test_a_config_reads_as_transformers_reads_it(
    family: str, changes: dict[str, Any], style: str, tmp_path: Path
) -> None:
    config = FAMILIES[family](**SMALL | changes, architectures=[ARCHITECTURES[family]])
    config.save_pretrained(tmp_path)
    raw = json.loads((tmp_path / "config.json").read_text())
    if style == "old":
        raw = old_style(raw)
    ours = read(tmp_path, raw)
    theirs = AutoConfig.from_pretrained(tmp_path)
    expect_as_transformers(ours, theirs)
    assert ours.context_length == theirs.max_position_embeddings * (
        2 if ours.rope.kind == "linear" else 1
    )  # as SGLang counts
    assert ours.raw == raw


@pytest.mark.parametrize("family", FAMILIES)
def test_keys_that_are_left_out_or_null_mean_what_they_mean_to_transformers(family: str, tmp_path: Path) -> None:
    bare = {"model_type": family}
    (tmp_path / "config.json").write_text(json.dumps(bare))
    expect_as_transformers(read(tmp_path, bare), AutoConfig.from_pretrained(tmp_path))
    null = bare | {"eos_token_id": None, "sliding_window": None}
    if family in ("llama", "qwen2", "qwen3"):  # the others do not allow it, or cannot use it then
        null["num_key_value_heads"] = None
    expect_as_transformers(read(tmp_path, null), AutoConfig.from_pretrained(tmp_path))


def test_a_window_shows_as_many_tokens_as_the_docstring_says() -> None:
    window, visible = 5, sliding_window_overlay(5)
    assert sum(visible(0, 0, 20, key) for key in range(21)) == window


def test_generation_config_adds_its_eos_ids(tmp_path: Path) -> None:
    generation = tmp_path / "generation_config.json"
    generation.write_text(json.dumps({"eos_token_id": [30, 5]}))
    assert read(tmp_path, {"model_type": "llama", "eos_token_id": 11}).eos_ids == (5, 11, 30)
    assert read(tmp_path, {"model_type": "llama"}).eos_ids == (5, 30)
    generation.write_text(json.dumps({"eos_token_id": "x"}))
    with pytest.raises(CheckpointError, match=r"generation_config.json: eos_token_id is 'x'"):
        read(tmp_path, {"model_type": "llama"})


def test_rope_parameters_per_layer_type(tmp_path: Path) -> None:
    one = YARN | {"rope_theta": 77.0}
    config = {"model_type": "qwen3", **SMALL, "rope_parameters": {"full_attention": one, "sliding_attention": one}}
    rope = read(tmp_path, config).rope
    assert (rope.kind, rope.theta, rope.original_context) == ("yarn", 77.0, 8192)
    config["rope_parameters"] = {"full_attention": one, "sliding_attention": one | {"rope_theta": 1.0}}
    with pytest.raises(CheckpointError, match=r"rope_parameters is .* must be the same for all layer types"):
        read(tmp_path, config)
    # Layer types that no layer has do not count.
    assert read(tmp_path, config | {"layer_types": ["full_attention"] * 4}).rope == rope


@pytest.mark.parametrize("style", ["new", "old"])
def test_overrides_win_in_either_style(style: str, tmp_path: Path) -> None:
    new = {"model_type": "llama", **SMALL, "rope_parameters": {"rope_type": "default", "rope_theta": 5.0}}
    raw = new if style == "new" else old_style(new)
    assert read(tmp_path, raw, {"rope_theta": 9.0}).rope.theta == 9.0
    assert read(tmp_path, raw, {"num_hidden_layers": 2}).num_layers == 2
    scaled = {"type": "linear", "factor": 4.0}
    for key in ("rope_scaling", "rope_parameters"):
        config = read(tmp_path, raw, {key: scaled, "max_position_embeddings": 100})
        assert (config.rope.kind, config.rope.factor, config.context_length) == ("linear", 4.0, 400)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_size": "big"}, "config.json: hidden_size is 'big'; it must be an integer of at least 1"),
        ({"num_hidden_layers": 0}, "num_hidden_layers is 0"),
        ({"num_key_value_heads": 5}, r"num_key_value_heads is 5; it must be a divisor of num_attention_heads \(6\)"),
        ({"rms_norm_eps": -1.0}, "rms_norm_eps is -1.0; it must be a number greater than 0"),
        ({"tie_word_embeddings": "yes"}, "tie_word_embeddings is 'yes'; it must be true or false"),
        ({"torch_dtype": "int4"}, "torch_dtype is 'int4'; it must be one of float32, float16, bfloat16"),
        ({"head_dim": 15}, "rotary dimension of 15"),
        ({"rope_scaling": {"type": "dynamic", "factor": 2}}, "'dynamic'; known are default, linear, llama3, yarn"),
        ({"rope_scaling": {"type": "linear"}}, "rope_scaling: factor is missing"),
        ({"rope_scaling": {"type": "linear", "factor": True}}, "factor is True; it must be a finite number"),
        ({"rope_scaling": {"type": "llama3", "factor": 2}}, "low_freq_factor is missing"),
        ({"rope_scaling": "linear"}, "rope_scaling is 'linear'; it must be an object"),
        ({"architectures": "LlamaForCausalLM"}, "architectures is 'LlamaForCausalLM', not a list"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quantization_config is set"),
        ({"model_type": "qwen2", "layer_types": ["full_attention"]}, "layer_types is"),
        ({"model_type": "qwen2", "layer_types": ["sliding_attention"] * 4}, "use_sliding_window"),
        (
            {"model_type": "mixtral", "num_experts_per_tok": 9},
            r"num_experts_per_tok is 9; .* at most num_local_experts",
        ),
        ({"model_type": "qwen2_moe", "mlp_only_layers": [True]}, "mlp_only_layers is .*a list of layer numbers"),
        ({"model_type": "qwen3_moe", "decoder_sparse_step": 0}, "decoder_sparse_step is 0"),
        ({"model_type": "gpt_neox"}, "vocab_size is missing.*known architectures are LlamaForCausalLM, Qwen2"),
    ],
)
def test_mistakes_are_named(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    base: dict[str, Any] = {"model_type": "llama", **SMALL}
    if changes.get("model_type") == "gpt_neox":
        base["max_position_embeddings"] = 100
    with pytest.raises(CheckpointError, match=message):
        read(tmp_path, base | changes)


@pytest.mark.parametrize("text", ["", "[1]", "{", "\x00"])
def test_a_config_that_is_no_json_object_is_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"config.json: is not"):
        read_model_config(ModelSource(name="x", kind="folder", path=str(tmp_path)))


def write_gguf(path: Path, arch: str, extra: dict[str, Any], tensors: dict[str, Any] | None = None) -> ModelSource:
    writer = gguf.GGUFWriter(path, arch)
    sizes = {"embedding_length": 64, "block_count": 2, "feed_forward_length": 96, "context_length": 512}
    for key, value in sizes.items():
        writer.add_uint32(f"{arch}.{key}", value)
    writer.add_uint32(f"{arch}.attention.head_count", 4)
    writer.add_float32(f"{arch}.attention.layer_norm_rms_epsilon", 1e-5)
    writer.add_array("tokenizer.ggml.tokens", ["a", "b", "c"])
    for key, value in extra.items():
        writer.add_key_value(f"{arch}.{key}", value, gguf.GGUFValueType.get_type(value))
    for name, tensor in (tensors or {}).items():
        writer.add_tensor(name, tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return ModelSource(name="x", kind="gguf", path=str(path))


def test_gguf_metadata(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    config = read_model_config(write_gguf(path, "qwen3", {"attention.key_length": 32, "attention.value_length": 32}))
    assert (config.architecture, config.head_dim, config.num_kv_heads, config.vocab_size) == (
        "Qwen3ForCausalLM", 32, 4, 3,
    )  # fmt: skip
    assert (config.rms_norm_eps, config.rope, config.tie_embeddings, config.dtype) == (1e-5, RopeConfig(), True, None)
    overridden = read_model_config(ModelSource(name="x", kind="gguf", path=str(path)), {"rope_theta": 3.0})
    assert overridden.rope.theta == 3.0

    scaled = {"rope.scaling.type": "linear", "rope.scaling.factor": 2.5}
    config = read_model_config(write_gguf(path, "llama", scaled))
    assert config.rope == RopeConfig(kind="linear", factor=2.5)
    config = read_model_config(write_gguf(path, "llama", {"attention.sliding_window": 7}))
    assert (config.architecture, config.sliding_window, config.layer_is_sliding) == (
        "MistralForCausalLM", 7, (True, True),
    )  # fmt: skip
    assert read_model_config(write_gguf(path, "llama", {"expert_count": 8, "expert_used_count": 2})).architecture == (
        "MixtralForCausalLM"
    )
    assert read_model_config(write_gguf(path, "gemma9", {})).architecture == "gemma9"

    yarn = {"type": "yarn", "factor": 4.0, "original_context_length": 128, "yarn_beta_fast": 16.0, "attn_factor": 2.0}
    config = read_model_config(write_gguf(path, "qwen2", {f"rope.scaling.{key}": value for key, value in yarn.items()}))
    assert (config.rope.kind, config.rope.factor, config.rope.original_context) == ("yarn", 4.0, 128)
    assert (config.rope.beta_fast, config.rope.beta_slow, config.context_length) == (16.0, 1.0, 512)
    assert config.rope.attention_factor == pytest.approx(2.0 * (0.1 * np.log(4.0) + 1.0))


def test_gguf_rotary_factors_are_carried(tmp_path: Path) -> None:
    factors = np.linspace(1, 8, 8, dtype=np.float32)
    config = read_model_config(write_gguf(tmp_path / "m.gguf", "llama", {}, {"rope_freqs.weight": factors}))
    assert config.rope == RopeConfig(frequency_factors=tuple(factors.tolist()))
    with pytest.raises(CheckpointError, match="5 rotary frequency factors do not fit 8 frequencies"):
        read_model_config(write_gguf(tmp_path / "m.gguf", "llama", {}, {"rope_freqs.weight": factors[:5].copy()}))


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ({"attention.head_count_kv": 3}, "num_key_value_heads is 3"),
        ({"attention.head_count_kv": [2, 2]}, r"attention.head_count_kv is \[2, 2\]"),
        (
            {"attention.value_length": 8},
            r"attention.value_length is 8; it must be equal to attention.key_length \(16\)",
        ),
        ({"rope.dimension_count": 8}, "rope.dimension_count is 8"),
        ({"rope.scaling.type": "longrope", "rope.scaling.factor": 2.0}, "rope_type is 'longrope'"),
    ],
)
def test_gguf_mistakes_are_named(extra: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=message):
        read_model_config(write_gguf(tmp_path / "m.gguf", "llama", extra))


def test_the_launcher_reads_a_config_without_torch() -> None:
    path = locate(None).path
    code = (
        "import sys; from engine.checkpoints.locate import locate;"
        "from engine.checkpoints.read_config import read_model_config as read; read(locate(sys.argv[1]));"
        "print([m for m in ('numpy', 'torch', 'gguf', 'transformers', 'huggingface_hub') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code, path], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.strip() == "[]"
