"""Structural tags: free text in which a trigger begins a tag whose content follows a JSON schema."""

from __future__ import annotations

import json
from collections.abc import Collection
from typing import Any, Literal

import msgspec


class Tag(msgspec.Struct, frozen=True):
    """`begin`, JSON under `schema`, `end`."""

    begin: str
    schema: Any
    end: str


class Tags(msgspec.Struct, frozen=True):
    """triggers: each tag's `begin` starts with one of them."""

    triggers: list[str]
    tags: list[Tag]
    at_least_one: bool = False
    stop_after_first: bool = False


class _OldForm(msgspec.Struct):
    structures: list[Tag]
    triggers: list[str]
    type: Literal["structural_tag"] = "structural_tag"


class _Content(msgspec.Struct):
    type: Literal["json_schema"]
    json_schema: Any


class _NewTag(msgspec.Struct):
    begin: str
    content: _Content
    end: str
    type: Literal["tag"] = "tag"


class _Triggered(msgspec.Struct):
    type: str
    triggers: list[str] = []
    tags: list[_NewTag] = []
    at_least_one: bool = False
    stop_after_first: bool = False


class _NewForm(msgspec.Struct):
    format: _Triggered
    type: Literal["structural_tag"] = "structural_tag"


def read_tags(text: str) -> Tags:
    """Read either form: `structures` and `triggers`, or a `format` of the type `triggered_tags`.

    Raises ValueError, which says what is wrong.
    """
    raw = json.loads(text)
    if isinstance(raw, dict) and "format" in raw:
        new = msgspec.convert(raw, _NewForm).format
        if new.type != "triggered_tags":
            raise ValueError(f"format.type must be triggered_tags, got {new.type!r}")
        tags = [Tag(tag.begin, tag.content.json_schema, tag.end) for tag in new.tags]
        found = Tags(new.triggers, tags, new.at_least_one, new.stop_after_first)
    else:
        old = msgspec.convert(raw, _OldForm)
        found = Tags(old.triggers, old.structures)
    if not found.tags:
        raise ValueError("there must be at least 1 tag, got 0")
    for tag in found.tags:
        if not any(trigger and tag.begin.startswith(trigger) for trigger in found.triggers):
            raise ValueError(f"begin must start with one of the triggers {found.triggers}, got {tag.begin!r}")
    return found


def tags_to_lark(tags: Tags, special: Collection[str]) -> str:
    """The grammar in Lark's notation; the content of tag i is the grammar called `tag<i>`. special: texts of special
    tokens, which as triggers stand for the tokens."""
    rules = []
    for i, tag in enumerate(tags.tags):
        trigger = next(t for t in sorted(tags.triggers, key=len, reverse=True) if t and tag.begin.startswith(t))
        body = " ".join(part for part in (_text(tag.begin[len(trigger) :]), f"@tag{i}", _text(tag.end)) if part)
        if trigger in special:
            rules.append(f"tag_{i}: TEXT {trigger} {body}")
        else:
            rules.append(f"head_{i}[lazy]: TEXT {_text(trigger)}\ntag_{i}: head_{i} {body}")
    any_tag = " | ".join(f"tag_{i}" for i in range(len(tags.tags)))
    once, many = f"({any_tag})", f"({any_tag})*"
    if tags.stop_after_first:
        start = once if tags.at_least_one else f"{once} | rest"
    else:
        start = f"{once} {many} rest" if tags.at_least_one else f"{many} rest"
    return "\n".join([f"start: {start}", "rest: TEXT", r"TEXT: /(.|\n)*/", *rules]) + "\n"


def _text(text: str) -> str:
    return json.dumps(text) if text else ""
