"""Broken bytes and absurd values, drawn from a random.Random: the same seed breaks the same things."""

from __future__ import annotations

import copy
import os
import random
import struct
from collections.abc import Callable
from typing import Any

import msgspec
from msgspec import inspect

INTEGERS = (
    0,
    1,
    -1,
    2,
    3,
    7,
    49,
    50,
    255,
    2**15,
    2**31 - 1,
    2**31,
    2**32 - 1,
    -(2**31),
    2**63 - 1,
    2**64 - 1,
    -(2**63),
)
FLOATS = (0.0, -0.0, 1.0, 0.5, -1.5, 1e-300, 1e300, float("inf"), float("-inf"), float("nan"))
_NODES: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 3, 2**31, 2**40, 2**63, 10**400, 0.5, -0.0, 1e308, "", "a", "7", "é\0", [], {}, [None],
    [0], ["a"], [[]], [1, 2], {"a": 1}, {"type": "a"},
)  # fmt: skip
TEXTS = ("", "a", "default", "\0", "é🙂", "%s", "../..", "x" * 300, "\ud7ff", "(")


def mutated(rng: random.Random, data: bytes, within: int | None = None) -> bytes:
    """`data` after one to three mutations, which begin in its first `within` bytes."""
    broken = bytearray(data)
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        if broken:
            rng.choice(_MUTATIONS)(rng, broken, rng.randrange(min(within or len(broken), len(broken))))
    return bytes(broken)


def _flip(rng: random.Random, data: bytearray, at: int) -> None:
    data[at] ^= 1 << rng.randrange(8)


def _set(rng: random.Random, data: bytearray, at: int) -> None:
    data[at] = rng.choice((0, 1, 0x7F, 0x80, 0x91, 0xC0, 0xDD, 0xDF, 0xFF, rng.randrange(256)))


def _cut(_rng: random.Random, data: bytearray, at: int) -> None:
    del data[at:]


def _leave_out(rng: random.Random, data: bytearray, at: int) -> None:
    del data[at : at + rng.randrange(1, 9)]


def _insert(rng: random.Random, data: bytearray, at: int) -> None:
    data[at:at] = rng.randbytes(rng.randrange(1, 9))


def _repeat(rng: random.Random, data: bytearray, at: int) -> None:
    piece = bytes(data[at : at + rng.randrange(1, 40)])
    data[at:at] = piece * rng.randrange(1, 4)


def _tail(_rng: random.Random, data: bytearray, at: int) -> None:
    data += data[at:]


def _nest(rng: random.Random, data: bytearray, at: int) -> None:
    """Opens lists of msgpack, or of JSON."""
    data[at:at] = rng.choice((b"\x91", b"\x81\xa1a", b"[", b'{"a":')) * rng.choice((3, 200, 5000))


def _number(rng: random.Random, data: bytearray, at: int) -> None:
    """A count or offset of 4 or 8 bytes, whatever stood there."""
    value = rng.choice((0, 1, 2**16, 2**24, 2**31, 2**32 - 1, 2**60, 2**63, 2**64 - 1, rng.getrandbits(64)))
    form = rng.choice(("<I", "<Q", ">I", ">Q"))
    size = struct.calcsize(form)
    data[at : at + size] = struct.pack(form, value % (1 << 8 * size))


_MUTATIONS: tuple[Callable[[random.Random, bytearray, int], None], ...] = (
    _flip, _flip, _flip, _set, _set, _cut, _leave_out, _insert, _repeat, _tail, _nest, _number, _number,
)  # fmt: skip


def random_value(rng: random.Random, kind: Any, absurd: float = 0.2) -> Any:
    """A value of the type `kind`, of which each part is absurd with this probability (but of its type)."""
    return _value(rng, inspect.type_info(kind), absurd)


def _value(rng: random.Random, kind: inspect.Type, absurd: float) -> Any:
    odd = rng.random() < absurd
    match kind:
        case inspect.IntType():
            return rng.choice(INTEGERS) if odd else rng.randrange(6)
        case inspect.FloatType():
            return rng.choice(FLOATS) if odd else rng.choice((0.0, 0.7, 1.0))
        case inspect.BoolType():
            return rng.random() < 0.5
        case inspect.StrType():
            return rng.choice(TEXTS) if odd else rng.choice(("a", "ab", "default"))
        case inspect.BytesType():
            return rng.randbytes(rng.randrange(20)) if odd else _packed_ids(rng)
        case inspect.NoneType():
            return None
        case inspect.AnyType():
            return rng.choice((1, "a", None, [1], {"a": 1}, 0.5))
        case inspect.LiteralType(values=values):
            return rng.choice(list(values))
        case inspect.ListType(item_type=item):
            return [_value(rng, item, absurd) for _ in range(rng.choice((0, 1, 2, 2, 2, 3)))]
        case inspect.VarTupleType(item_type=item):
            return tuple(_value(rng, item, absurd) for _ in range(rng.randrange(4)))
        case inspect.TupleType(item_types=items):
            return tuple(_value(rng, item, absurd) for item in items)
        case inspect.DictType(key_type=key, value_type=value):
            return {_value(rng, key, absurd): _value(rng, value, absurd) for _ in range(rng.randrange(3))}
        case inspect.UnionType(types=types):
            return _value(rng, rng.choice(types), absurd)
        case inspect.StructType(cls=cls, fields=fields):
            return cls(**{field.name: _value(rng, field.type, absurd) for field in fields})
        case _:
            raise TypeError(f"no values of {kind}")


def varied(rng: random.Random, message: Any) -> Any:
    """A struct with up to two of its fields replaced by values of their types, absurd ones among them."""
    for _ in range(rng.choice((0, 1, 1, 2))):
        field = rng.choice(inspect.type_info(type(message)).fields)
        value = getattr(message, field.name)
        other = varied(rng, value) if isinstance(value, msgspec.Struct) else _value(rng, field.type, 0.6)
        message = msgspec.structs.replace(message, **{field.name: other})
    return message


def _packed_ids(rng: random.Random) -> bytes:
    return struct.pack("<4i", *(rng.randrange(1, 50) for _ in range(4)))[: 4 * rng.randrange(1, 5)]


def cases(count: int) -> int:
    """How many cases a test tries: `count`, or as many times more as TOKENMILL_FUZZ says."""
    return count * int(os.environ.get("TOKENMILL_FUZZ", "1"))


def mutated_json(rng: random.Random, value: Any) -> Any:
    """A copy of a JSON value in which a few nodes, wherever they lie, are other values, doubled or gone."""
    value = copy.deepcopy(value)
    for _ in range(rng.choice((1, 1, 2, 3))):
        node, key = value, None
        parent: Any = None
        while isinstance(node, dict | list) and node and (parent is None or rng.random() < 0.8):
            parent, key = node, rng.choice(list(node)) if isinstance(node, dict) else rng.randrange(len(node))
            node = node[key]
        if parent is None:
            return copy.deepcopy(rng.choice(_NODES))
        if rng.random() < 0.15:
            del parent[key]
        elif rng.random() < 0.1 and isinstance(parent, dict):
            parent[rng.choice(TEXTS)] = parent.pop(key)
        else:
            parent[key] = copy.deepcopy(rng.choice((*_NODES, [node], {"a": node}, str(node))))
    return value
