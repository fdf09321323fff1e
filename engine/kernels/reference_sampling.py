"""The reductions of sampling in numpy, row by row: what the methods of `engine.kernels.table.Backend` with these names
do. On a host without compiled kernels this is what serves."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from engine.kernels.table import Doubles, Floats, Logprobs, Longs

LARGEST = float(np.finfo(np.float32).max)

_FIRST_NUCLEUS = 256
"""How many of the most likely tokens are ranked at first, in the hope that top_p ends among them."""

_BLOCK = 256

Weights = NDArray[Any]


def best(logits: torch.Tensor) -> tuple[Longs, Floats]:
    z = logits.numpy()
    ids = z.argmax(axis=1)  # the first of equals, and the first NaN if there is one
    peaks = z[np.arange(len(z)), ids]
    ids[np.isnan(peaks)] = 0
    return ids, peaks


def draw(
    logits: torch.Tensor,
    rows: Longs,
    temperatures: Doubles,
    top_ks: Longs,
    top_ps: Doubles,
    min_ps: Doubles,
    uniforms: Doubles,
) -> Longs:
    z = logits.numpy()
    columns = (rows, temperatures.tolist(), top_ks.tolist(), top_ps.tolist(), min_ps.tolist(), uniforms.tolist())
    return np.array([_draw_row(z[row], *rest) for row, *rest in zip(*columns, strict=True)], np.int64)


def logprobs(
    logits: torch.Tensor,
    rows: Longs,
    temperatures: Doubles,
    tokens: Longs,
    tops: Longs,
    id_counts: Longs,
    ids: Longs,
) -> Logprobs:
    z = logits.numpy()
    values = np.empty(len(rows), np.float32)
    top_ids, top_values, id_values = [np.empty(0, np.int64)], [np.empty(0, np.float32)], [np.empty(0, np.float32)]
    ends = np.cumsum(id_counts)
    for i, row in enumerate(rows):
        of_row = _log_softmax(z[row], float(temperatures[i]))
        finite = bool(np.isfinite(of_row).any())
        best_first = best_ids(z[row], int(tops[i])) if finite else np.arange(tops[i])
        values[i] = of_row[tokens[i]]
        top_ids.append(best_first)
        top_values.append(of_row[best_first])
        id_values.append(of_row[ids[ends[i] - id_counts[i] : ends[i]]])
    return Logprobs(values, np.concatenate(top_ids), np.concatenate(top_values), np.concatenate(id_values))


def best_ids(scores: Weights, count: int) -> Longs:
    """Ids of the `count` largest of `scores` [V], largest first, the lower id first among equals: int64 [count].

    Partitions and unstable sorts leave the order of equals open, so it is fixed here: the draw and the logprobs of a
    request must be the same in any company.
    """
    count = min(count, len(scores))
    if count <= 0:
        return np.empty(0, np.int64)
    if count < len(scores):
        threshold = np.partition(scores, len(scores) - count)[len(scores) - count]
        ids = np.flatnonzero(scores >= threshold)
    else:
        ids = np.arange(len(scores))
    order = np.argsort(-scores[ids], kind="stable")
    return ids[order[:count]]


def _draw_row(z: Weights, temperature: float, top_k: int, top_p: float, min_p: float, uniform: float) -> int:
    peak = z.max()
    if not np.isfinite(peak):
        return 0 if np.isnan(peak) else int(z.argmax())
    with np.errstate(over="ignore"):  # far below the largest is as good as minus infinity
        weights = np.exp((z - peak) / np.float32(min(temperature, LARGEST)))  # softmax times its sum
    limit = len(z) if top_k < 0 else min(top_k, len(z))
    ids = _nucleus(z, weights, limit, top_p) if limit < len(z) or top_p < 1.0 else None
    kept = weights if ids is None else weights[ids]
    if min_p > 0.0:
        kept = np.where(kept >= np.float32(min_p), kept, np.float32(0.0))  # the largest weight is 1
    index = _locate(kept, uniform)
    return index if ids is None else int(ids[index])


def _nucleus(z: Weights, weights: Weights, limit: int, top_p: float) -> Longs:
    """Ids of the tokens that top_k (`limit`) and top_p leave, most likely first."""
    most = top_p * float(np.sum(weights, dtype=np.float64)) if top_p < 1.0 else np.inf
    count = min(limit, _FIRST_NUCLEUS)
    while True:
        ids = best_ids(z, count)
        kept = weights[ids].astype(np.float64)
        inside = np.cumsum(kept) - kept <= most
        if count == limit or not inside[-1]:
            return ids[inside]
        count = min(limit, count * 8)


def _locate(weights: Weights, uniform: float) -> int:
    """Index of the weight in which `uniform` of their sum falls; never one that is 0.

    Sums of blocks first, then within one block: a running sum over a whole vocabulary takes ten times as long.
    """
    starts = np.arange(0, len(weights), _BLOCK)
    blocks = np.cumsum(np.add.reduceat(weights, starts, dtype=np.float64))
    target = uniform * blocks[-1]
    block = int(np.searchsorted(blocks, target, side="right"))
    if block < len(blocks):
        before = blocks[block - 1] if block else 0.0
        inside = weights[starts[block] : starts[block] + _BLOCK]
        offset = int(np.searchsorted(np.cumsum(inside, dtype=np.float64) + before, target, side="right"))
        if offset < len(inside) and inside[offset] > 0:
            return int(starts[block]) + offset
    # Rounding has put the target beyond the last sum of its block: the nearest weight before it is the one meant.
    end = len(weights) if block == len(blocks) else int(starts[block]) + _BLOCK
    return int(np.flatnonzero(weights[:end])[-1])


def _log_softmax(z: Weights, temperature: float) -> Floats:
    """float32 [V]; NaN throughout for a row whose largest is not finite."""
    peak = z.max()
    if not np.isfinite(peak):
        return np.full(len(z), np.nan, np.float32)
    cooled = (z.astype(np.float64) - peak) / min(temperature, LARGEST)
    with np.errstate(over="ignore"):  # logprobs below the smallest float32
        result: Floats = (cooled - np.log(np.exp(cooled).sum())).astype(np.float32)
    return result
