"""Mixtures of experts: the choice, products of the rows of one expert together, and the sum over a token's experts."""

import triton
import triton.language as tl

from engine.kernels.gpu.device.activations import activate, sigmoid


@triton.jit
def choose(logits, ids, shares, EXPERTS: tl.constexpr, BLOCK: tl.constexpr, TOP: tl.constexpr, NORMALISE: tl.constexpr):
    """One token's TOP experts, the largest logit first, the lower one among equals, and their shares of the softmax."""
    token = tl.program_id(0).to(tl.int64)
    expert = tl.arange(0, BLOCK)
    inside = expert < EXPERTS
    value = tl.load(logits + token * EXPERTS + expert, mask=inside, other=float("-inf"))
    share = tl.exp(value - tl.max(value, 0))
    share = share / tl.sum(share, 0)
    left = inside
    chosen = 0.0
    if NORMALISE:
        for _ in range(TOP):
            best = _best(value, expert, left, BLOCK)
            chosen += tl.sum(tl.where(expert == best, share, 0.0), 0)
            left = left & (expert != best)
        left = inside
    else:
        chosen = 1.0
    for rank in range(TOP):
        best = _best(value, expert, left, BLOCK)
        tl.store(ids + token * TOP + rank, best)
        tl.store(shares + token * TOP + rank, tl.sum(tl.where(expert == best, share, 0.0), 0) / chosen)
        left = left & (expert != best)


@triton.jit
def _best(value, expert, left, BLOCK: tl.constexpr):
    """The lowest of those left that have the largest value; of NaN, just the lowest left."""
    highest = tl.max(tl.where(left, value, float("-inf")), 0)
    found = tl.min(tl.where(left & (value == highest), expert, BLOCK), 0)
    return tl.where(found == BLOCK, tl.min(tl.where(left, expert, BLOCK - 1), 0), found)


@triton.jit
def grouped_product(
    x, weights, biases, block_experts, block_rows, out,
    INPUTS: tl.constexpr, OUTPUTS: tl.constexpr, EACH: tl.constexpr, EXPERTS: tl.constexpr, GATED: tl.constexpr,
    ACTIVATION: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """A tile of an expert's product: out[r] = the matrix of the block's expert times x[r // EACH], for its rows r.

    weights, biases (or None): the addresses of the experts' matrices [OUTPUTS, INPUTS] (twice the outputs if GATED, the
    gates first) and biases. block_experts: [blocks], EXPERTS for a block of no rows. block_rows: [blocks, ROWS], -1 for
    no row.
    """
    block = tl.program_id(0)
    expert = tl.load(block_experts + block)
    if expert >= EXPERTS:
        return
    kind = x.dtype.element_ty
    matrix = tl.multiple_of(tl.load(weights + expert).to(tl.pointer_type(kind)), 16)
    row = tl.load(block_rows + block * ROWS + tl.arange(0, ROWS))
    used = row >= 0
    source = x + tl.where(used, row // EACH, 0).to(tl.int64)[:, None] * INPUTS
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = column < OUTPUTS
    depth = tl.arange(0, DEPTH)
    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    second = tl.zeros([ROWS, COLUMNS], tl.float32)
    for start in range(0, INPUTS, DEPTH):
        place = start + depth
        held = place < INPUTS
        a = tl.load(source + place[None, :], mask=used[:, None] & held[None, :], other=0.0)
        where = column.to(tl.int64)[None, :] * INPUTS + place[:, None]
        b = tl.load(matrix + where, mask=held[:, None] & inside[None, :], other=0.0)
        total = tl.dot(a, b, total, input_precision="ieee")
        if GATED:
            c = tl.load(matrix + where + OUTPUTS * INPUTS, mask=held[:, None] & inside[None, :], other=0.0)
            second = tl.dot(a, c, second, input_precision="ieee")
    if biases is not None:
        offset = tl.load(biases + expert).to(tl.pointer_type(kind))
        total += tl.load(offset + column, mask=inside, other=0.0).to(tl.float32)[None, :]
        if GATED:
            second += tl.load(offset + OUTPUTS + column, mask=inside, other=0.0).to(tl.float32)[None, :]
    if GATED:
        total = activate(total, ACTIVATION) * second
    target = out + tl.where(used, row, 0).to(tl.int64)[:, None] * OUTPUTS + column[None, :]
    tl.store(target, total.to(out.dtype.element_ty), mask=used[:, None] & inside[None, :])


@triton.jit
def combine(parts, shares, shared, shared_gate, out, WIDTH: tl.constexpr, BLOCK: tl.constexpr, TOP: tl.constexpr):
    """The experts of a token times their shares, the best first, and then the shared one times its gate's sigmoid."""
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < WIDTH
    total = tl.zeros([BLOCK], tl.float32)
    for rank in range(TOP):
        part = tl.load(parts + (token * TOP + rank) * WIDTH + column, mask=inside, other=0.0)
        total += part * tl.load(shares + token * TOP + rank)
    if shared is not None:
        open_part = sigmoid(tl.load(shared_gate + token).to(tl.float32))
        total += open_part * tl.load(shared + token * WIDTH + column, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + token * WIDTH + column, total.to(out.dtype.element_ty), mask=inside)
