"""The fields of `ServerConfig` as flags of the command line."""

from __future__ import annotations

import functools
import types
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

import msgspec

from engine.config.flags import Flag
from engine.config.server import ServerConfig

FieldKind = Literal["switch", "int", "float", "str", "strs", "json"]

_KINDS: dict[Any, FieldKind] = {bool: "switch", int: "int", float: "float", str: "str", list: "strs", dict: "json"}


@dataclass(frozen=True)
class ConfigField:
    """One field: its name, its kind of value, its default, the spellings of its flag (the first is its main one)."""

    name: str
    kind: FieldKind
    default: Any
    names: tuple[str, ...]
    options: Flag

    @property
    def flag(self) -> str:
        return self.names[0]


@functools.cache
def config_fields() -> tuple[ConfigField, ...]:
    """Every field of `ServerConfig`, in its order."""
    hints = get_type_hints(ServerConfig, include_extras=True)
    return tuple(_field(field, hints[field.name]) for field in msgspec.structs.fields(ServerConfig))


def _field(field: msgspec.structs.FieldInfo, hint: Any) -> ConfigField:
    assert get_origin(hint) is Annotated, field.name
    declared, options = get_args(hint)
    default = field.default_factory() if field.default is msgspec.NODEFAULT else field.default
    names = options.names or ("--" + field.name.replace("_", "-"),)
    return ConfigField(field.name, _kind(declared), default, names, options)


def _kind(declared: Any) -> FieldKind:
    if get_origin(declared) in (Union, types.UnionType):
        (declared,) = (part for part in get_args(declared) if part is not type(None))
    return _KINDS[get_origin(declared) or declared]
