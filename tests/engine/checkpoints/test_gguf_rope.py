"""llama3's rotary scaling, which GGUF files carry as a tensor of factors, against transformers."""

from __future__ import annotations

from pathlib import Path

import gguf
import torch
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from engine.checkpoints.read_config import read_model_config
from engine.config import ModelSource
from engine.layers.rope import rotary_frequencies


def test_factors_from_a_gguf_file_scale_as_llama3_does(tmp_path: Path) -> None:
    theirs = LlamaConfig(
        hidden_size=256,
        num_attention_heads=4,
        max_position_embeddings=131072,
        rope_parameters={
            "rope_type": "llama3",
            "rope_theta": 500000.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
    )
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](theirs, "cpu")
    unscaled = 1.0 / 500000.0 ** (torch.arange(0, 64, 2) / 64)
    factors = unscaled / scaled
    assert factors.max() > 7.9

    path = tmp_path / "m.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(131072)
    writer.add_embedding_length(256)
    writer.add_block_count(1)
    writer.add_feed_forward_length(64)
    writer.add_head_count(4)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(500000.0)
    writer.add_array("tokenizer.ggml.tokens", ["a"])
    writer.add_tensor("rope_freqs.weight", factors.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()

    config = read_model_config(ModelSource(name="x", kind="gguf", path=str(path)))
    torch.testing.assert_close(rotary_frequencies(config).inverse, scaled, rtol=1e-6, atol=0)
