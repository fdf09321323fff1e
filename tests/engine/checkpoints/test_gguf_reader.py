"""GGUF weights against the gguf package's own dequantisation, and against transformers' checkpoints."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import msgspec
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, quants
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, Gemma3TextConfig, LlamaConfig, PreTrainedModel, Qwen2Config, Qwen3Config

from engine.checkpoints.dequantize import dequantize_into
from engine.checkpoints.errors import CheckpointError
from engine.checkpoints.gguf_file import KINDS
from engine.checkpoints.gguf_reader import GgufReader
from engine.checkpoints.load_weights import load_weights, open_weights
from engine.checkpoints.locate import locate
from engine.checkpoints.read_config import read_model_config
from engine.checkpoints.weights import TensorPlace
from engine.config import ModelSource

torch.set_num_threads(1)

QUANTISED = sorted(int(kind) for kind in quants._type_traits)
KIND_IDS = [KINDS[kind][0] for kind in QUANTISED]


def blocks_of(kind: int, rows: int, columns: int, seed: int) -> np.ndarray[Any, Any]:
    """Valid blocks: quantised normal numbers where gguf can quantise, else random bytes with finite scales."""
    random = np.random.default_rng(seed)
    values = random.normal(size=(rows, columns)).astype(np.float32)
    try:
        return quants.quantize(values, GGMLQuantizationType(kind)).view(np.uint8).reshape(rows, -1)
    except NotImplementedError:
        _, block, block_bytes = KINDS[kind]
        # A float16 whose high byte is below 0x7c is finite, wherever in the block it lies.
        return random.integers(0, 0x7C, (rows, columns // block * block_bytes), dtype=np.uint8)


@pytest.mark.parametrize("kind", QUANTISED, ids=KIND_IDS)
@settings(max_examples=10, deadline=None)
@given(rows=st.integers(1, 9), blocks=st.integers(1, 4), seed=st.integers(0, 2**32))
def test_every_kind_is_dequantised_as_gguf_does(kind: int, rows: int, blocks: int, seed: int) -> None:
    columns = blocks * KINDS[kind][1]
    data = blocks_of(kind, rows, columns, seed)
    with np.errstate(all="ignore"):
        expected = quants.dequantize(data, GGMLQuantizationType(kind)).reshape(rows, columns)
    out = torch.full((rows, columns), float("nan"))
    dequantize_into(kind, torch.from_numpy(data), out)
    np.testing.assert_array_equal(out.numpy(), expected)


@pytest.mark.parametrize("name", ["Q4_0", "Q4_1", "Q8_0"])
def test_any_bytes_are_dequantised_as_gguf_does(name: str) -> None:
    kind = GGMLQuantizationType[name]
    data = np.random.default_rng(5).integers(0, 256, (4000, KINDS[kind][2]), dtype=np.uint8)
    with np.errstate(all="ignore"):
        expected = quants.dequantize(data, kind)
    out = torch.empty(4000, KINDS[kind][1])
    dequantize_into(int(kind), torch.from_numpy(data), out)
    np.testing.assert_array_equal(out.numpy(), expected)


def test_default_model_is_what_gguf_reads() -> None:
    source = locate(None)
    config = read_model_config(source)
    reader = open_weights(source, config)
    places = {name: torch.empty(shape) for name, shape in reader.shapes().items()}
    load_weights(reader, {name: TensorPlace(tensor) for name, tensor in places.items()})
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(source.path).tensors}
    assert len(tensors) == len(places)

    def oracle(name: str) -> torch.Tensor:
        tensor = tensors[name]
        return torch.from_numpy(quants.dequantize(tensor.data, tensor.tensor_type).copy())

    heads = {"attn_q": config.num_heads, "attn_k": config.num_kv_heads}
    ggml_names = {"attn_q": "q_proj", "attn_k": "k_proj", "attn_v": "v_proj", "attn_output": "o_proj"}
    assert torch.equal(places["model.embed_tokens.weight"], oracle("token_embd.weight"))
    assert torch.equal(places["model.norm.weight"], oracle("output_norm.weight"))
    for layer in range(config.num_layers):
        for ggml_name, name in ggml_names.items():
            expected = oracle(f"blk.{layer}.{ggml_name}.weight")
            if ggml_name in heads:
                # The inverse of convert_hf_to_gguf.py's permute.
                expected = expected.view(heads[ggml_name], -1, 2, expected.shape[1]).transpose(1, 2).flatten(0, 2)
            assert torch.equal(places[f"model.layers.{layer}.self_attn.{name}.weight"], expected)
        for part in ("gate", "up", "down"):
            expected = oracle(f"blk.{layer}.ffn_{part}.weight")
            assert torch.equal(places[f"model.layers.{layer}.mlp.{part}_proj.weight"], expected)
        for norm, name in (("attn_norm", "input_layernorm"), ("ffn_norm", "post_attention_layernorm")):
            assert torch.equal(places[f"model.layers.{layer}.{name}.weight"], oracle(f"blk.{layer}.{norm}.weight"))


def tiny(family: str, **changes: Any) -> PreTrainedModel:
    torch.manual_seed(3)
    classes = {"llama": LlamaConfig, "qwen2": Qwen2Config, "qwen3": Qwen3Config, "gemma3": Gemma3TextConfig}
    settings_ = {
        "vocab_size": 96,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
    }
    model = AutoModelForCausalLM.from_config(classes[family](**settings_ | changes))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_()
    return model


def write_gguf(model: PreTrainedModel, path: Path, kind: GGMLQuantizationType, split: bool = False) -> None:
    """Write a model as convert_hf_to_gguf.py would: names from gguf's own table, rows of llama's q and k permuted."""
    config = model.config
    arch = config.model_type.removesuffix("_text")
    writer = gguf.GGUFWriter(path, arch, split_max_tensors=7 if split else 0)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    if arch == "gemma3":
        writer.add_sliding_window(config.sliding_window)
        writer.add_rope_freq_base(config.rope_parameters["full_attention"]["rope_theta"])
        writer.add_rope_freq_base_swa(config.rope_parameters["sliding_attention"]["rope_theta"])
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(config.rope_parameters["full_attention"]["factor"])
    else:
        writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_eos_token_id(7)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH[arch.upper()], config.num_hidden_layers)
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        if arch == "llama" and (".q_proj." in name or ".k_proj." in name):
            heads = config.num_attention_heads if ".q_proj." in name else config.num_key_value_heads
            tensor = tensor.view(heads, 2, -1, *tensor.shape[1:]).transpose(1, 2).reshape(tensor.shape)
        if arch == "gemma3" and name.endswith("norm.weight"):
            tensor = tensor + 1
        own = kind if tensor.dim() == 2 else GGMLQuantizationType.F32
        ggml_name = names.get_name(name, try_suffixes=(".weight", ".bias"))
        writer.add_tensor(ggml_name, quants.quantize(tensor.numpy(), own), raw_dtype=own)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def load_all(path: Path) -> dict[str, torch.Tensor]:
    source = ModelSource(name="x", kind="gguf", path=str(path))
    reader = open_weights(source, read_model_config(source))
    places = {name: torch.full(shape, float("nan")) for name, shape in reader.shapes().items()}
    load_weights(reader, {name: TensorPlace(tensor) for name, tensor in places.items()})
    return places


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("llama", {}),
        ("llama", {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True}),
        ("qwen2", {}),
        ("qwen3", {"attention_bias": True}),
    ],
)
def test_a_float_gguf_gives_back_the_checkpoint(family: str, changes: dict[str, Any], tmp_path: Path) -> None:
    model = tiny(family, **changes)
    write_gguf(model, tmp_path / "m.gguf", GGMLQuantizationType.F32)
    places = load_all(tmp_path / "m.gguf")
    expected = model.state_dict()
    if changes.get("tie_word_embeddings"):
        del expected["lm_head.weight"]
    assert places.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(places[name], tensor), name
    config = read_model_config(ModelSource(name="x", kind="gguf", path=str(tmp_path / "m.gguf")))
    biased = any(name.endswith("q_proj.bias") for name in expected)
    assert (config.architecture, config.attention_bias) == (type(model).__name__, biased)
    assert config.output_bias == ("model.layers.0.self_attn.o_proj.bias" in expected)
    assert config.mlp_bias == ("model.layers.0.mlp.gate_proj.bias" in expected)
    assert config.tie_embeddings == model.config.tie_word_embeddings
    assert (config.head_dim, config.eos_ids) == (32, (7,))


def test_gemma3_is_computed_as_its_checkpoint(tmp_path: Path) -> None:
    ropes = {
        "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 500.0},
        "sliding_attention": {"rope_type": "default", "rope_theta": 90.0},
    }
    model = tiny("gemma3", rope_parameters=ropes, sliding_window=5, num_hidden_layers=7, query_pre_attn_scalar=32)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.mul_(0.2 if "norm" in name else 0.15)
    write_gguf(model, tmp_path / "m.gguf", GGMLQuantizationType.F32)
    model.save_pretrained(tmp_path / "folder")
    configs, found = [], []
    for kind, path in (("gguf", tmp_path / "m.gguf"), ("folder", tmp_path / "folder")):
        source = ModelSource(name="x", kind=kind, path=str(path))
        configs.append(read_model_config(source))
        reader = open_weights(source, configs[-1])
        places = {name: torch.full(shape, float("nan")) for name, shape in reader.shapes().items()}
        load_weights(reader, {name: TensorPlace(tensor) for name, tensor in places.items()})
        found.append(places)
    assert found[0].keys() == found[1].keys()
    for name, tensor in found[1].items():
        torch.testing.assert_close(found[0][name], tensor, rtol=0, atol=1e-6 if "norm" in name else 0)
    theirs, ours = (msgspec.structs.asdict(config) for config in configs)
    for key in theirs.keys() - {"raw", "dtype", "eos_ids", "bos_id"}:
        assert theirs[key] == ours[key], key
    assert configs[0].layer_is_sliding == (True,) * 5 + (False, True)


def test_a_split_model_is_read_whole_or_not_at_all(tmp_path: Path) -> None:
    model = tiny("llama")
    write_gguf(model, tmp_path / "m.gguf", GGMLQuantizationType.F16, split=True)
    parts = sorted(tmp_path.glob("*.gguf"))
    assert len(parts) > 2
    source = locate(str(tmp_path))
    places = load_all(Path(source.path))
    for name, tensor in model.state_dict().items():
        assert torch.equal(places[name], tensor.half().float() if tensor.dim() == 2 else tensor), name
    assert not read_model_config(source).tie_embeddings
    parts[1].unlink()
    with pytest.raises(CheckpointError, match=parts[1].name):
        load_all(parts[0])


def test_rows_are_converted_to_the_destinations_type_in_any_layout(tmp_path: Path) -> None:
    write_gguf(tiny("llama"), tmp_path / "m.gguf", GGMLQuantizationType.Q8_0)
    expected = load_all(tmp_path / "m.gguf")
    source = ModelSource(name="x", kind="gguf", path=str(tmp_path / "m.gguf"))
    reader = GgufReader(tmp_path / "m.gguf", read_model_config(source))
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        places = {
            name: torch.zeros((*tensor.shape[:-1], 2 * tensor.shape[-1]), dtype=dtype)[..., ::2]
            for name, tensor in expected.items()
        }
        load_weights(reader, {name: TensorPlace(tensor) for name, tensor in places.items()})
        for name, tensor in expected.items():
            assert torch.equal(places[name], tensor.to(dtype)), (name, dtype)


def test_a_kind_that_gguf_does_not_dequantise_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="Q8_1 cannot be dequantised"):
        dequantize_into(9, torch.zeros((1, 40), dtype=torch.uint8), torch.empty((1, 32)))
