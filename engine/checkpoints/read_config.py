"""Read a model's hyperparameters: config.json in the old and the new style, or a GGUF file's metadata.

The defaults are those of transformers' configuration classes (5.23): a key that a config.json leaves out means there
what it means here.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import msgspec

from engine.checkpoints.architectures import ENCODERS, about
from engine.checkpoints.config_fields import MOST_LAYERS, Fields
from engine.checkpoints.errors import CheckpointError, makes_sense
from engine.checkpoints.gguf_config import config_of_gguf
from engine.checkpoints.gguf_file import read_gguf_header
from engine.checkpoints.gguf_split import split_files
from engine.checkpoints.model_config import ModelConfig
from engine.checkpoints.read_encoder import ENCODER_DEFAULTS, read_encoder
from engine.checkpoints.read_gemma import GEMMA3_DEFAULTS, gemma3_fields, gemma3_sliding
from engine.checkpoints.read_moe import MOE_DEFAULTS, read_moe
from engine.checkpoints.read_rope import context_length, read_rope
from engine.config import ModelSource

_DTYPES = ("float32", "float16", "bfloat16")
_ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "mistral": "MistralForCausalLM",
    "gemma3_text": "Gemma3ForCausalLM",
    "bert": "BertModel",
    "roberta": "RobertaModel",
    "xlm-roberta": "XLMRobertaModel",
    "qwen2_moe": "Qwen2MoeForCausalLM",
    "qwen3_moe": "Qwen3MoeForCausalLM",
    "mixtral": "MixtralForCausalLM",
}
_LLAMA_DEFAULTS: dict[str, Any] = {
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "hidden_act": "silu",
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-6,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_QWEN2_DEFAULTS: dict[str, Any] = {
    "vocab_size": 151936,
    "hidden_size": 4096,
    "intermediate_size": 22016,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "hidden_act": "silu",
    "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-6,
    "sliding_window": 4096,
    "max_window_layers": 28,
}
# What a key that is missing from config.json means, by family. A key that is there and null is another matter:
# it means what the code below says.
_DEFAULTS: dict[str, dict[str, Any]] = {
    "LlamaForCausalLM": _LLAMA_DEFAULTS,
    "Qwen2ForCausalLM": _QWEN2_DEFAULTS,
    "Qwen3ForCausalLM": {**_QWEN2_DEFAULTS, "head_dim": 128},
    "MistralForCausalLM": {
        **_LLAMA_DEFAULTS,
        "intermediate_size": 14336,
        "num_key_value_heads": 8,
        "max_position_embeddings": 131072,
        "sliding_window": 4096,
    },
    "Gemma3ForCausalLM": GEMMA3_DEFAULTS,
    **ENCODER_DEFAULTS,
    **MOE_DEFAULTS,
}


def read_model_config(source: ModelSource, overrides: dict[str, Any] | None = None) -> ModelConfig:
    """Read a model's hyperparameters.

    `overrides` replace top-level keys of config.json (of a GGUF file: of the config.json that says the same). Raises
    CheckpointError, which names the field and the value, for what is missing or makes no sense. That an architecture
    can be served is not checked here.
    """
    with makes_sense(source.path):
        return _read_config(source, overrides)


def _read_config(source: ModelSource, overrides: dict[str, Any] | None) -> ModelConfig:
    if source.kind == "folder":
        folder = Path(source.path)
        raw = _overridden(_read_json(folder / "config.json"), overrides or {})
        generation = folder / "generation_config.json"
        return _model_config(source, raw, _read_json(generation) if generation.is_file() else {})
    from_gguf = config_of_gguf([(path, read_gguf_header(path)) for path in split_files(Path(source.path))])
    config = _model_config(source, _overridden(from_gguf.raw, overrides or {}), {})
    return msgspec.structs.replace(config, **from_gguf.biases)


def _overridden(raw: dict[str, Any], overrides: dict[str, Any]) -> dict[str, Any]:
    """`overrides` laid over config.json, where it may say the same thing under the key of the other style."""
    result = raw | overrides
    for key, twin in (
        ("rope_parameters", "rope_scaling"),
        ("rope_scaling", "rope_parameters"),
        ("torch_dtype", "dtype"),
    ):
        if key in overrides and twin not in overrides:
            result.pop(twin, None)
    parameters = result.get("rope_parameters")
    if isinstance(parameters, dict) and "rope_parameters" not in overrides:
        inner = {key: overrides[key] for key in ("rope_theta", "partial_rotary_factor") if key in overrides}
        result["rope_parameters"] = parameters | inner
    return result


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_bytes())
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: is not JSON: {error}") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: is not a JSON object")
    return value


def _model_config(source: ModelSource, raw: dict[str, Any], generation: dict[str, Any]) -> ModelConfig:
    where = str(Path(source.path) / "config.json") if source.kind == "folder" else source.path
    architecture = _architecture(where, raw)
    fields = Fields(where, architecture, raw, _DEFAULTS.get(about(architecture).family, {}))
    try:
        return _read_fields(fields, generation)
    except CheckpointError as error:
        if about(architecture).family in _DEFAULTS:
            raise
        raise CheckpointError(f"{error} (known architectures are {', '.join(_DEFAULTS)})") from None


def _read_fields(fields: Fields, generation: dict[str, Any]) -> ModelConfig:
    where, architecture, raw = fields.where, fields.architecture, fields.raw
    family = about(architecture).family
    if raw.get("quantization_config") is not None:
        raise CheckpointError(f"{where}: quantization_config is set; quantised weights are served from GGUF files only")
    if family in ENCODERS:
        return read_encoder(fields, family, _dtype(fields), _eos_ids(fields, generation))
    hidden_size = fields.positive("hidden_size")
    num_heads = fields.positive("num_attention_heads")
    num_kv_heads = fields.positive("num_key_value_heads", num_heads)
    if num_heads % num_kv_heads:
        raise fields.error("num_key_value_heads", f"a divisor of num_attention_heads ({num_heads})")
    head_dim = fields.positive("head_dim", fields.defaults.get("head_dim") or hidden_size // num_heads)
    own = gemma3_fields(fields) if family == "Gemma3ForCausalLM" else {}
    rope, rotary_dim = read_rope(own.pop("rope_fields", fields), head_dim)
    sliding_window, layer_is_sliding = _sliding(fields, family, fields.positive("num_hidden_layers", most=MOST_LAYERS))
    attention_bias, output_bias, mlp_bias = _biases(fields, family)
    vocab_size = fields.positive("vocab_size")
    return ModelConfig(
        architecture=architecture,
        model_type=fields.text_or_none("model_type"),
        hidden_size=hidden_size,
        num_layers=len(layer_is_sliding),
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        rotary_dim=rotary_dim,
        intermediate_size=fields.positive("intermediate_size"),
        vocab_size=vocab_size,
        context_length=own.pop("context_length", None) or context_length(fields),
        rms_norm_eps=fields.positive_number("rms_norm_eps"),
        hidden_act=own.pop("hidden_act", None) or fields.text("hidden_act"),
        rope=rope,
        tie_embeddings=fields.flag("tie_word_embeddings", False),
        attention_bias=attention_bias,
        output_bias=output_bias,
        mlp_bias=mlp_bias,
        sliding_window=sliding_window,
        layer_is_sliding=layer_is_sliding,
        dtype=_dtype(fields),
        bos_id=next(iter(fields.token_ids("bos_token_id")), None),
        eos_ids=_eos_ids(fields, generation),
        raw=raw,
        causal=fields.flag("is_causal", True),
        **own,
        moe=read_moe(fields, len(layer_is_sliding)),
    )


def _architecture(where: str, raw: dict[str, Any]) -> str:
    """The first of `architectures` that is known here, else the first; without any, what `model_type` implies."""
    names = raw.get("architectures")
    if names is None or names == []:
        model_type = raw.get("model_type")
        if not isinstance(model_type, str):
            raise CheckpointError(f"{where}: has neither architectures nor model_type; is it a model's configuration?")
        return _ARCHITECTURES.get(model_type, model_type)
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise CheckpointError(f"{where}: architectures is {names!r}, not a list of names")
    return next((name for name in names if about(name).family in _DEFAULTS), str(names[0]))


_NO_MLP_BIAS = ("Qwen3ForCausalLM", "Qwen3MoeForCausalLM", "Gemma3ForCausalLM")


def _biases(fields: Fields, architecture: str) -> tuple[bool, bool, bool]:
    """Whether q, k and v have biases, whether o has, and whether the MLP has."""
    if architecture == "Qwen2ForCausalLM":
        return True, False, False
    if architecture in ("MistralForCausalLM", "MixtralForCausalLM"):
        return False, False, False
    if architecture == "Qwen2MoeForCausalLM":
        return fields.flag("qkv_bias", True), False, False
    attention = fields.flag("attention_bias", False)
    return attention, attention, architecture not in _NO_MLP_BIAS and fields.flag("mlp_bias", False)


def _sliding(fields: Fields, architecture: str, num_layers: int) -> tuple[int | None, tuple[bool, ...]]:
    """The window and which layers have it.

    transformers masks `key > query - window`: a window of W shows a token itself and the W - 1 before it. Mistral has
    its window in every layer, and so has Mixtral; Qwen2 and Qwen3 in those that `layer_types` or else
    `max_window_layers` names, and only with `use_sliding_window`; Qwen3's mixture of experts with that in every layer,
    and Qwen2's in every other one of the first `max_window_layers` unless `layer_types` says otherwise; Llama nowhere.
    """
    nowhere = (False,) * num_layers
    if architecture in ("MistralForCausalLM", "MixtralForCausalLM"):
        window = fields.positive_or_none("sliding_window")
        return window, (window is not None,) * num_layers
    if architecture == "Gemma3ForCausalLM":
        return gemma3_sliding(fields, num_layers)
    if architecture not in ("Qwen2ForCausalLM", "Qwen3ForCausalLM", "Qwen2MoeForCausalLM", "Qwen3MoeForCausalLM"):
        return None, nowhere
    window = fields.positive_or_none("sliding_window") if fields.flag("use_sliding_window", False) else None
    if architecture == "Qwen3MoeForCausalLM":
        return window, (window is not None,) * num_layers
    layer_types = fields.raw.get("layer_types")
    if layer_types is None:
        bound = fields.count("max_window_layers") if window is not None else num_layers
        if architecture == "Qwen2MoeForCausalLM":
            layers = tuple(window is not None and number < bound and number % 2 == 0 for number in range(num_layers))
        else:
            layers = tuple(number >= bound for number in range(num_layers))
    else:
        if not isinstance(layer_types, list) or len(layer_types) != num_layers:
            raise fields.error("layer_types", f"a list of num_hidden_layers ({num_layers}) entries")
        if any(kind not in ("full_attention", "sliding_attention") for kind in layer_types):
            raise fields.error("layer_types", "a list of 'full_attention' and 'sliding_attention'")
        layers = tuple(kind == "sliding_attention" for kind in layer_types)
        if window is None and any(layers):
            raise fields.error(
                "layer_types", "without 'sliding_attention' as use_sliding_window or sliding_window is not set"
            )
    return (window, layers) if any(layers) else (None, nowhere)


def _dtype(fields: Fields) -> str | None:
    key = "dtype" if fields.raw.get("dtype") is not None else "torch_dtype"
    name = fields.text_or_none(key)
    if name is None or name == "auto":
        return None
    if name.removeprefix("torch.") not in _DTYPES:
        raise fields.error(key, "one of " + ", ".join(_DTYPES))
    return name.removeprefix("torch.")


def _eos_ids(fields: Fields, generation: dict[str, Any]) -> tuple[int, ...]:
    """The ids that end a generation. The family's default counts only where neither file names any."""
    where = str(Path(fields.where).with_name("generation_config.json"))
    more = Fields(where, fields.architecture, generation, {}).token_ids("eos_token_id")
    if "eos_token_id" not in fields.raw and more:
        return tuple(sorted(set(more)))
    return tuple(sorted({*fields.token_ids("eos_token_id"), *more}))
