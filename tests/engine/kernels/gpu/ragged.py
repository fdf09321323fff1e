"""Batches and numbers for the tests of the GPU's kernels, and how far these may be from the reference."""

from __future__ import annotations

import dataclasses

import torch

from engine.kernels.batch import RaggedBatch, offsets

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
STEP = {F32: 2.0**-22, BF16: 2.0**-8, F16: 2.0**-11}
"""Relative size of a rounding; of float32 some more, since sums of it are in another order than the oracle's."""


def random(seed: int, *shape: int, dtype: torch.dtype = F32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def batch_of(
    queries: list[int], cached: list[int], slots: int, seed: int = 0, device: torch.device | str = "cpu"
) -> RaggedBatch:
    """Sequences of `cached` tokens and `queries` new ones in scattered slots."""
    lengths = tuple(new + old for new, old in zip(queries, cached, strict=True))
    contexts = torch.randperm(slots, generator=torch.Generator().manual_seed(seed))[: sum(lengths)].split(lengths)
    batch = RaggedBatch(
        token_ids=torch.arange(sum(queries)),
        positions=torch.cat([torch.arange(old, old + new) for new, old in zip(queries, cached, strict=True)]),
        slots=torch.cat([context[-new:] for context, new in zip(contexts, queries, strict=True)]),
        query_starts=offsets(tuple(queries)),
        context_lengths=lengths,
        context_slots=torch.cat(contexts),
        context_starts=offsets(lengths),
    )
    return moved(batch, device)


def moved(batch: RaggedBatch, device: torch.device | str) -> RaggedBatch:
    tensors = {
        field.name: value.to(device)
        for field in dataclasses.fields(batch)
        if isinstance(value := getattr(batch, field.name), torch.Tensor)
    }
    return dataclasses.replace(batch, **tensors)


def check(found: torch.Tensor, expected: torch.Tensor, dtype: torch.dtype, roundings: float = 4) -> None:
    """Equal but for a few roundings of `dtype`, relative to the largest entry."""
    assert found.shape == expected.shape
    expected = expected.double()
    allowed = roundings * STEP[dtype] * max(1.0, float(expected.abs().max()))
    off = float((found.cpu().double() - expected).abs().max())
    assert off <= allowed, f"off by {off:.3g}, allowed are {allowed:.3g}"


def bits(tensor: torch.Tensor) -> bytes:
    return tensor.cpu().contiguous().view(torch.uint8).numpy().tobytes()
