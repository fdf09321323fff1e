"""Triton's interpreter as a judge of bfloat16: what it does otherwise than a GPU is set right here.

It keeps bfloat16 as bare 16 bits: it multiplies tiles of them as integers, cuts off where a GPU rounds to the
nearest, and loses a carry into the exponent where it is told to round.
"""

from __future__ import annotations

import inspect
from typing import Any

import numpy as np
import triton.language as tl
from numpy.typing import NDArray
from triton.runtime import interpreter
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

Array = NDArray[Any]


def widened(bits: Array) -> Array:
    """bfloat16, as uint16, to float32."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def narrowed(values: Array) -> Array:
    """float32 to bfloat16, as uint16: to the nearest, to even among two."""
    bits = np.ascontiguousarray(values).view(np.uint32)
    rounded = ((bits.astype(np.uint64) + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return np.where(np.isnan(values), np.uint16(0x7FC0), rounded)


def hasten() -> None:
    """Have the interpreter put itself in the place of Triton's language once in this process, not at each call of each
    function, where it spends most of its time."""
    patch, done = interpreter._patch_lang, set()

    def patch_once(function: Any) -> Any:
        modules = frozenset(id(value) for value in vars_of(function) if value is tl or value is tl.core)
        if modules not in done:
            done.add(modules)
            patch(function)
        return interpreter._LangPatchScope()

    def vars_of(function: Any) -> list[Any]:
        return [value for value in function.__globals__.values() if inspect.ismodule(value)]

    interpreter._patch_lang = patch_once


def repair() -> None:
    """Replace the interpreter's conversions and products of bfloat16, for this process."""
    cast, dot = InterpreterBuilder.cast_impl, InterpreterBuilder.create_dot

    def exact_cast(self: Any, source: Any, target: Any) -> Any:
        before, after = source.dtype.scalar, target.scalar
        if before == after:
            return source
        if before == tl.bfloat16:
            return cast(self, TensorHandle(widened(source.data), tl.float32), target)
        if after == tl.bfloat16:
            wide = source if before == tl.float32 else cast(self, source, tl.float32)
            return TensorHandle(narrowed(wide.data), tl.bfloat16)
        return cast(self, source, target)

    def rounding_cast(self: Any, source: Any, target: Any, mode: Any) -> Any:
        return exact_cast(self, source, target)

    def exact_dot(self: Any, a: Any, b: Any, d: Any, *rest: Any) -> Any:
        a, b = (
            TensorHandle(widened(side.data), tl.float32) if side.dtype.scalar == tl.bfloat16 else side
            for side in (a, b)
        )
        return dot(self, a, b, d, *rest)

    InterpreterBuilder.cast_impl = exact_cast
    InterpreterBuilder.create_fp_to_fp = rounding_cast
    InterpreterBuilder.create_dot = exact_dot
