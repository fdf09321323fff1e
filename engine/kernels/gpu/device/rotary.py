"""Queries, keys and values out of a fused projection: normed, rotated, written."""

import triton
import triton.language as tl


@triton.jit
def rotary_store(
    qkv, q_norm, k_norm, cos, sin, slots, queries, keys, values, eps, head_stride,
    QUERY_HEADS: tl.constexpr, KV_HEADS: tl.constexpr, DIM: tl.constexpr, BLOCK: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    """One head of one token. HALF: half the channels that are rotated, 0 for none; cos, sin: [T, HALF].

    What is normed is rounded before it is rotated, and that before it goes into the pool, as between two ops.
    """
    token, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    column = tl.arange(0, BLOCK)
    inside = column < DIM
    source = qkv + (token * (QUERY_HEADS + 2 * KV_HEADS) + head) * DIM
    kind = qkv.dtype.element_ty
    value = tl.load(source + column, mask=inside, other=0.0).to(tl.float32)
    pool_row = 0
    if head >= QUERY_HEADS:
        slot = tl.load(slots + token).to(tl.int64)
        pool_row = ((head - QUERY_HEADS) % KV_HEADS).to(tl.int64) * head_stride + slot * DIM
    if head >= QUERY_HEADS + KV_HEADS:
        tl.store(values + pool_row + column, value.to(values.dtype.element_ty), mask=inside)
    else:
        partner = column
        turned = column < 2 * HALF
        if HALF > 0:
            partner = tl.where(column < HALF, column + HALF, tl.where(turned, column - HALF, column))
        other = tl.load(source + partner, mask=inside, other=0.0).to(tl.float32)
        if q_norm is not None:
            norm = k_norm
            if head < QUERY_HEADS:
                norm = q_norm
            inverse = 1.0 / tl.sqrt_rn(tl.sum(value * value, 0) / DIM + eps)
            value = value * inverse * tl.load(norm + column, mask=inside, other=0.0).to(tl.float32)
            other = other * inverse * tl.load(norm + partner, mask=inside, other=0.0).to(tl.float32)
            value = value.to(kind).to(tl.float32)
            other = other.to(kind).to(tl.float32)
        if HALF > 0:
            angle = token * HALF + tl.where(column < HALF, column, column - HALF)
            c = tl.load(cos + angle, mask=turned, other=1.0)
            s = tl.load(sin + angle, mask=turned, other=0.0)
            value = value * c + other * tl.where(column < HALF, -s, s)
        result = value.to(kind)
        if head < QUERY_HEADS:
            tl.store(queries + (token * QUERY_HEADS + head) * DIM + column, result, mask=inside)
        else:
            tl.store(keys + pool_row + column, result.to(keys.dtype.element_ty), mask=inside)
