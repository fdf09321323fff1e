"""Experts in every layout that checkpoints have them in: the model is the same."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from backends import backend
from gguf import GGMLQuantizationType, quants
from safetensors.torch import load_file, save_file
from tiny_models import load_oracle, tiny_mixtral, tiny_qwen2_moe, tiny_qwen3_moe

from engine.checkpoints.errors import CheckpointError
from engine.checkpoints.load_weights import load_weights, open_weights
from engine.checkpoints.locate import locate
from engine.checkpoints.model_config import ModelConfig
from engine.checkpoints.read_config import read_model_config
from engine.checkpoints.weights import TensorPlace
from engine.kernels.packed import PackedBias, PackedRows
from engine.models.registry import build_model

FAMILIES = {
    "qwen2moe": (
        tiny_qwen2_moe,
        {"hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2, "mlp_only_layers": []},
    ),
    "qwen3moe": (tiny_qwen3_moe, {"hidden_size": 64, "head_dim": 16}),
    "llama": (tiny_mixtral, {"hidden_size": 64, "sliding_window": None}),
}
Tensors = dict[str, torch.Tensor]


@pytest.fixture(scope="module", params=FAMILIES)
def family(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path, Any]:
    write: Callable[..., Path]
    write, overrides = FAMILIES[request.param]
    path = write(tmp_path_factory.mktemp("experts") / "model", **overrides)
    return request.param, path, load_oracle(path)


def load(path: Path, backend_name: str = "reference") -> tuple[ModelConfig, Tensors]:
    source = locate(str(path))
    config = read_model_config(source)
    model = build_model(config, dtype=torch.float32, backend=backend(backend_name))
    load_weights(open_weights(source, config), model.places, ignore=model.ignored)
    found = {}
    for name, place in model.places.items():
        assert isinstance(place, TensorPlace | PackedRows | PackedBias)
        found[name] = place.tensor if isinstance(place, TensorPlace) else place.read()
    return config, found


def check_same(found: Tensors, expected: Tensors) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name


def with_weights(path: Path, folder: Path, tensors: Tensors) -> Path:
    shutil.copytree(path, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors")
    return folder


def test_one_tensor_or_many(family: tuple[str, Path, Any], tmp_path: Path) -> None:
    """What save_pretrained writes (a matrix an expert, as models name them), and the tensors of its model itself."""
    _, path, oracle = family
    config, expected = load(path)
    assert config.moe is not None
    assert expected.keys() == load_file(path / "model.safetensors").keys()
    fused = oracle.state_dict()
    assert any(tensor.dim() == 3 for tensor in fused.values())
    folder = with_weights(path, tmp_path / "fused", fused)
    for backend_name in ("reference", "avx2"):
        check_same(load(folder, backend_name)[1], expected)


def test_what_is_missing_or_misshapen_is_named_as_it_is_stored(family: tuple[str, Path, Any], tmp_path: Path) -> None:
    _, path, oracle = family
    fused = oracle.state_dict()
    name, down = "model.layers.0.mlp.experts.gate_up_proj", "model.layers.2.mlp.experts.down_proj"
    without = {key: tensor for key, tensor in fused.items() if key != down}
    with pytest.raises(CheckpointError, match=r"8 missing: model\.layers\.2\..*experts\.0\..*\.weight"):
        load(with_weights(path, tmp_path / "without", without))
    shape = list(fused[name].shape)
    with pytest.raises(CheckpointError, match=rf"misshapen: {name} \[7, .*\] instead of \[8, {shape[1]}, {shape[2]}\]"):
        load(with_weights(path, tmp_path / "misshapen", {**fused, name: fused[name][:7]}))


def ggml_tensors(arch: str, oracle: Any) -> Tensors:
    """The model under llama.cpp's names, its rows of q and k permuted where that is its order."""
    architecture = {"llama": gguf.MODEL_ARCH.LLAMA, "qwen2moe": gguf.MODEL_ARCH.QWEN2MOE,
                    "qwen3moe": gguf.MODEL_ARCH.QWEN3MOE}[arch]  # fmt: skip
    config = oracle.config
    names = gguf.get_tensor_name_map(architecture, config.num_hidden_layers)
    found = {}
    for name, tensor in oracle.state_dict().items():
        parts = {name: tensor}
        if name.endswith("experts.gate_up_proj"):
            gate, up = tensor.chunk(2, dim=1)
            parts = {name.replace("gate_up", "gate") + ".weight": gate, name.replace("gate_up", "up") + ".weight": up}
        elif name.endswith("experts.down_proj"):
            parts = {f"{name}.weight": tensor}
        for part, values in parts.items():
            ggml_name = names.get_name(part, try_suffixes=(".weight", ".bias"))
            assert ggml_name is not None, part
            if arch == "llama" and part.endswith(("q_proj.weight", "k_proj.weight")):
                heads = config.num_attention_heads if "q_proj" in part else config.num_key_value_heads
                values = values.view(heads, 2, -1, values.shape[1]).transpose(1, 2).reshape(values.shape)
            found[ggml_name] = values[0] if "gate_inp_shexp" in ggml_name else values
    return found


def write_gguf(path: Path, arch: str, oracle: Any, kind: GGMLQuantizationType) -> Tensors:
    """Returns the tensors as they are in the file, decoded."""
    config, tensors = oracle.config, ggml_tensors(arch, oracle)
    writer = gguf.GGUFWriter(path, arch)
    writer.add_context_length(64)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_expert_count(8)
    writer.add_expert_used_count(config.num_experts_per_tok)
    if arch != "llama":
        writer.add_expert_feed_forward_length(config.moe_intermediate_size)
    if arch == "qwen2moe":
        writer.add_expert_shared_feed_forward_length(config.shared_expert_intermediate_size)
    decoded = {}
    for name, tensor in tensors.items():
        exact = tensor.dim() == 1 or tensor.shape[-1] % 32 != 0
        chosen = GGMLQuantizationType.F32 if exact else kind
        encoded = quants.quantize(tensor.contiguous().numpy(), chosen)
        writer.add_tensor(name, encoded, raw_dtype=chosen)
        decoded[name] = torch.from_numpy(quants.dequantize(encoded, chosen)).view(tensor.shape)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return decoded


@pytest.mark.parametrize("kind", [GGMLQuantizationType.F32, GGMLQuantizationType.Q8_0], ids=lambda kind: kind.name)
def test_gguf(family: tuple[str, Path, Any], kind: GGMLQuantizationType, tmp_path: Path) -> None:
    arch, path, oracle = family
    decoded = write_gguf(tmp_path / "model.gguf", arch, oracle, kind)
    expected_config, expected = load(path)
    config, found = load(tmp_path / "model.gguf")
    assert (config.architecture, config.model_type, config.moe, config.head_dim, config.rope) == (
        expected_config.architecture, expected_config.model_type, expected_config.moe, expected_config.head_dim,
        expected_config.rope,
    )  # fmt: skip
    if kind == GGMLQuantizationType.F32:
        check_same(found, expected)
        return
    block, gate = ("block_sparse_moe", "w1") if arch == "llama" else ("mlp", "gate_proj")
    for expert in range(8):
        name = f"model.layers.2.{block}.experts.{expert}.{gate}.weight"
        assert torch.equal(found[name], decoded["blk.2.ffn_gate_exps.weight"][expert])
        torch.testing.assert_close(found[name], expected[name], rtol=0.02, atol=0.02)
