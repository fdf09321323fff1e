"""How many bytes a launch asks memory for, against the fewest that it could: an estimate for `docs/gpu.md`.

The fewest: every input that is needed once, every result once. Asked for: what its programs load and store, counting
what several programs share as often as they do (caches serve part of that).
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from engine.kernels.gpu.attention import SPLIT
from engine.kernels.gpu.launch import Call, parts


def traffic(call: Call, context: int) -> tuple[int, int]:
    """(asked for, fewest), bytes. context: tokens that a sequence has, for attention."""
    return _RULES.get(call.name, _rows)(call, context)


def _size(call: Call, *names: str) -> int:
    tensors = (call.arguments.get(name) for name in names)
    return sum(tensor.numel() * tensor.itemsize for tensor in tensors if isinstance(tensor, torch.Tensor))


def _rows(call: Call, context: int) -> tuple[int, int]:
    """Every row once; the vectors that all rows share, once for each."""
    rows = call.grid[0]
    shared = _size(call, "weight", "bias") if call.name != "embed" else 0
    own = _size(call, "x", "residual", "normed", "total", "out", "ids", "parts", "shares", "shared", "shared_gate")
    own += _size(call, "logits") if call.name == "choose" else 0
    if call.name in ("embed", "embed_sum"):
        out = call.arguments["out"]
        tables = 1 if call.name == "embed" else 3
        own += tables * out.numel() * out.itemsize
    if call.name == "finish":
        own *= 2  # in place
    return own + shared * rows, own + shared


def _rotary(call: Call, context: int) -> tuple[int, int]:
    qkv, half = _size(call, "qkv"), call.constants["HALF"]
    angles = _size(call, "cos", "sin")
    fewest = 2 * qkv + angles + _size(call, "q_norm", "k_norm", "slots")
    # A channel's partner is loaded beside it.
    return fewest + (qkv if half else 0) + (call.grid[1] - 1) * angles, fewest


def _attend(call: Call, context: int) -> tuple[int, int]:
    """Each tile reads the keys and values that its sequence has; once for a sequence would do. One sequence's chunk, or
    decodes, whose splits share the reading."""
    decodes = call.arguments["in_parts"] > 0
    seen = context if call.constants["CAUSAL"] or not decodes else 1
    keys = call.arguments["keys"]
    read = 2 * seen * call.constants["DIM"] * keys.itemsize * call.constants["HEADS"]
    row = call.constants["HEADS"] * call.constants["GROUP"] * call.constants["DIM"] * keys.itemsize
    items = len(call.arguments["items"])
    readers = items // parts(seen, SPLIT) if decodes else items
    tokens = readers if decodes else items * (call.constants["ROWS"] // call.constants["GROUP"])
    sequences = readers if decodes else 1
    fewest = tokens * row + sequences * (read + seen * 8) + (0 if decodes else tokens * row)
    left = _size(call, "part_totals", "part_peaks")
    slots = seen * 8 * call.constants["HEADS"]
    return tokens * row * (1 if decodes else 2) + left + readers * (read + slots), fewest + left


def _merge(call: Call, context: int) -> tuple[int, int]:
    total = _size(call, "part_totals", "part_peaks", "output")
    return total, total


def _product(call: Call, context: int) -> tuple[int, int]:
    constants, x = call.constants, call.arguments["x"]
    matrix = constants["OUTPUTS"] * constants["INPUTS"] * x.itemsize * (2 if constants["GATED"] else 1)
    out = _size(call, "out")
    rows = out // call.arguments["out"].itemsize // constants["OUTPUTS"]
    experts = min(rows, constants["EXPERTS"])
    blocks = min(call.grid[0], max(experts, parts(rows, constants["ROWS"])))
    row = constants["INPUTS"] * x.itemsize
    return blocks * matrix + call.grid[1] * rows * row + out, experts * matrix + _size(call, "x") + out


def _logits(call: Call, context: int) -> tuple[int, int]:
    """Rows of logits: once for the largest and the sums, thrice at most for a draw."""
    times = 3 if call.name == "locate" else 1
    size = _size(call, "logits") if "logits" in call.arguments else _size(call, "peaks", "ids")
    return times * size, size


_RULES: dict[str, Callable[[Call, int], tuple[int, int]]] = {
    "rotary_store": _rotary, "attend": _attend, "merge": _merge, "grouped_product": _product,
    "best_parts": _logits, "best_whole": _logits, "locate": _logits, "log_sums": _logits,
}  # fmt: skip
