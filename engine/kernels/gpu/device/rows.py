"""Kernels of rows: norms, embeddings, activations, pooling. All compute in float32 and round once, at the store."""

import triton
import triton.language as tl

from engine.kernels.gpu.device.activations import activate


@triton.jit
def rms_norm(
    x, residual, weight, normed, total, eps, WIDTH: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """One row: x + residual, rounded as it is kept, and its norm."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < WIDTH
    where = row * WIDTH + column
    value = tl.load(x + where, mask=inside, other=0.0).to(tl.float32)
    if residual is not None:
        value += tl.load(residual + where, mask=inside, other=0.0).to(tl.float32)
        kept = value.to(total.dtype.element_ty)
        tl.store(total + where, kept, mask=inside)
        value = kept.to(tl.float32)
    square = tl.sum(value * value, 0) / WIDTH
    scale = tl.load(weight + column, mask=inside, other=0.0).to(tl.float32)
    result = value * (1.0 / tl.sqrt_rn(square + eps)) * scale
    tl.store(normed + where, result.to(normed.dtype.element_ty), mask=inside)


@triton.jit
def layer_norm(
    x, residual, weight, bias, normed, eps, WIDTH: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < WIDTH
    where = row * WIDTH + column
    value = tl.load(x + where, mask=inside, other=0.0).to(tl.float32)
    if residual is not None:
        value += tl.load(residual + where, mask=inside, other=0.0).to(tl.float32)
        value = value.to(normed.dtype.element_ty).to(tl.float32)
    centred = tl.where(inside, value - tl.sum(value, 0) / WIDTH, 0.0)
    variance = tl.sum(centred * centred, 0) / WIDTH
    scale = tl.load(weight + column, mask=inside, other=0.0).to(tl.float32)
    shift = tl.load(bias + column, mask=inside, other=0.0).to(tl.float32)
    result = centred * (1.0 / tl.sqrt_rn(variance + eps)) * scale + shift
    tl.store(normed + where, result.to(normed.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["first", "held"])
def embed(ids, weight, out, scale, first, held, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """The rows of tokens whose ids are in [first, first + held), times `scale`; zeros for others."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < WIDTH
    own = tl.load(ids + row).to(tl.int64) - first
    here = column < tl.where((own >= 0) & (own < held), WIDTH, 0)
    value = tl.load(weight + own * WIDTH + column, mask=here, other=0.0).to(tl.float32) * scale
    tl.store(out + row * WIDTH + column, value.to(out.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["first_position", "first", "held"])
def embed_sum(
    ids, places, type_ids, tokens, positions, types, out, first_position, first, held, WIDTH: tl.constexpr,
    BLOCK: tl.constexpr
):  # fmt: skip
    """The rows of a token (as in `embed`), of its type (type 0 without type_ids) and of its position, added in this
    order."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < WIDTH
    own = tl.load(ids + row).to(tl.int64) - first
    here = column < tl.where((own >= 0) & (own < held), WIDTH, 0)
    value = tl.load(tokens + own * WIDTH + column, mask=here, other=0.0).to(tl.float32)
    if types is not None:
        kind = column
        if type_ids is not None:
            kind = tl.load(type_ids + row).to(tl.int64) * WIDTH + column
        value += tl.load(types + kind, mask=inside, other=0.0).to(tl.float32)
    if positions is not None:
        place = (tl.load(places + row).to(tl.int64) + first_position) * WIDTH + column
        value += tl.load(positions + place, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + row * WIDTH + column, value.to(out.dtype.element_ty), mask=inside)


@triton.jit
def finish(x, bias, WIDTH: tl.constexpr, BLOCK: tl.constexpr, ACTIVATION: tl.constexpr):
    """In place: a product's bias and activation."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < WIDTH
    where = x + row * WIDTH + column
    value = tl.load(where, mask=inside, other=0.0).to(tl.float32)
    if bias is not None:
        value += tl.load(bias + column, mask=inside, other=0.0).to(tl.float32)
    tl.store(where, activate(value, ACTIVATION).to(x.dtype.element_ty), mask=inside)


@triton.jit
def gate(x, bias, out, WIDTH: tl.constexpr, BLOCK: tl.constexpr, ACTIVATION: tl.constexpr):
    """activation(first half) * second half of rows [2 WIDTH] that lack their bias."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < WIDTH
    where = x + row * (2 * WIDTH) + column
    first = tl.load(where, mask=inside, other=0.0).to(tl.float32)
    second = tl.load(where + WIDTH, mask=inside, other=0.0).to(tl.float32)
    if bias is not None:
        first += tl.load(bias + column, mask=inside, other=0.0).to(tl.float32)
        second += tl.load(bias + WIDTH + column, mask=inside, other=0.0).to(tl.float32)
    result = activate(first, ACTIVATION) * second
    tl.store(out + row * WIDTH + column, result.to(out.dtype.element_ty), mask=inside)


@triton.jit
def pool(x, starts, stops, out, WIDTH: tl.constexpr, BLOCK: tl.constexpr, POOLING: tl.constexpr):
    """The mean or the largest of each channel over the rows [start, stop), one after the other."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < WIDTH
    start = tl.load(starts + row)
    stop = tl.load(stops + row)
    source = x + start.to(tl.int64) * WIDTH + column
    value = tl.load(source, mask=inside, other=0.0).to(tl.float32)
    for _ in range(start + 1, stop):
        source += WIDTH
        there = tl.load(source, mask=inside, other=0.0).to(tl.float32)
        if POOLING == "mean":
            value += there
        else:
            value = tl.maximum(value, there)
    if POOLING == "mean":
        value = value / (stop - start).to(tl.float32)
    tl.store(out + row * WIDTH + column, value.to(out.dtype.element_ty), mask=inside)


@triton.jit
def add_up(parts, out, count, RANKS: tl.constexpr, BLOCK: tl.constexpr):
    """parts: [RANKS, count], added one after the other: what `engine.parallel.group.in_order` gives, in one go."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < count
    total = tl.load(parts + at, mask=inside, other=0.0).to(tl.float32)
    for _ in tl.static_range(1, RANKS):
        parts += count
        total += tl.load(parts + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + at, total.to(out.dtype.element_ty), mask=inside)
