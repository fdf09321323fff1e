"""The part of a model's config that a rank computes."""

from __future__ import annotations

import msgspec

from engine.checkpoints.model_config import ModelConfig
from engine.parallel.division import Division


def held_config(config: ModelConfig, division: Division) -> ModelConfig:
    """`config` with the numbers of heads, and the width of the MLP, of one rank."""
    return msgspec.structs.replace(
        config,
        num_heads=division.queries.size,
        num_kv_heads=division.kv.size,
        intermediate_size=division.mlp.size,
    )
