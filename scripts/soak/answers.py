"""What an answer comes to, and whether it is the oracle's."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field
from typing import Any

import msgspec

from scripts.soak.table import Job, Json

NAMES = ("prompt_tokens", "completion_tokens", "finish_reason")
OUTPUT_LISTS = ("output_token_logprobs", "output_top_logprobs", "output_token_ids_logprobs")
INPUT_LISTS = ("input_token_logprobs", "input_top_logprobs", "input_token_ids_logprobs")
SHOWN = 300


class WrongError(Exception):
    """An answer that is not what it must be; the message says in what."""


class RefusedError(Exception):
    """A 503, to be tried again later."""


class GivenUpError(Exception):
    """A 500 that says that the request was there at too many deaths."""


@dataclass
class Item:
    """One item of a call's answer, as deltas have come to it."""

    text: str = ""
    ids: list[int] = field(default_factory=list)
    lists: Json = field(default_factory=dict)
    meta: Json = field(default_factory=dict)

    @property
    def finish(self) -> Json | None:
        return self.meta.get("finish_reason")

    def add(self, chunk: Json) -> None:
        """A chunk of a stream, or a whole answer."""
        if self.finish is not None:
            raise WrongError(f"a chunk after the last: {str(chunk)[:SHOWN]}")
        self.text += chunk["text"]
        self.ids += chunk["output_ids"]
        self.meta = chunk["meta_info"]
        if self.meta["completion_tokens"] != len(self.ids):
            raise WrongError(f"{len(self.ids)} ids have come, completion_tokens is {self.meta['completion_tokens']}")
        for name in OUTPUT_LISTS:
            self.lists.setdefault(name, []).extend(self.meta.get(name) or [])
        for name in INPUT_LISTS:
            came = self.meta.get(name) or []
            if came and self.lists.setdefault(name, came) != came:
                raise WrongError(f"{name} has changed between two chunks")

    def essence(self) -> Json:
        """What must not depend on what happened on the way."""
        return {"text": self.text, "ids": self.ids, **{name: self.meta[name] for name in NAMES}, **self.lists}


def items_of(body: bytes) -> list[Item]:
    """The items of a plain answer of /generate."""
    answer = msgspec.json.decode(body)
    items = []
    for one in answer if isinstance(answer, list) else [answer]:
        item = Item()
        item.add(one)
        items.append(item)
    return items


def check_failure(finish: Json | None) -> None:
    """Raise what an item that has ended in a failure means to its client."""
    if finish is None or finish["type"] != "abort" or finish.get("status_code") is None:
        return
    check_status(finish["status_code"], str(finish["message"]))


def check_status(status: int, message: str) -> None:
    if status == 503:
        raise RefusedError(message)
    if status == 500 and "deaths of the scheduler" in message:
        raise GivenUpError(message)
    raise WrongError(f"answered {status}: {message[:SHOWN]}")


def was_aborted(item: Item) -> bool:
    return item.finish is not None and item.finish["type"] == "abort"


def compare(job: Job, items: list[Item], oracle: list[Json]) -> int:
    """Hold whole answers to the oracle's, and aborted ones to its beginning. Returns how many tokens were compared.

    Raises WrongError.
    """
    if len(items) != len(oracle):
        raise WrongError(f"{len(items)} items instead of {len(oracle)}")
    for number, (item, wanted) in enumerate(zip(items, oracle, strict=True)):
        if item.finish is None:
            raise WrongError(f"item {number} has no end: {item.essence()}"[:SHOWN])
        if not job.exact:
            if not was_aborted(item) and item.essence()["completion_tokens"] != wanted["completion_tokens"]:
                raise WrongError(f"{len(item.ids)} tokens instead of {wanted['completion_tokens']}")
        elif was_aborted(item):
            check_beginning(job, item, wanted)
        elif (found := item.essence()) != wanted:
            raise WrongError(f"item {number}: {_difference(found, wanted)}")
    return sum(len(item.ids) for item in items) if job.exact else 0


def check_beginning(job: Job, item: Item, wanted: Json) -> None:
    """What has come of an item that was cut off must be the beginning of the oracle's answer."""
    if not job.exact:
        return
    if item.ids != wanted["ids"][: len(item.ids)]:
        raise WrongError(f"cut off: {_difference({'ids': item.ids}, {'ids': wanted['ids'][: len(item.ids)]})}")
    if job.plain_text and not wanted["text"].startswith(item.text.rstrip("\ufffd")):
        raise WrongError(f"cut off: {item.text!r} does not begin {wanted['text']!r}"[:SHOWN])
    for name in OUTPUT_LISTS:
        came = item.lists.get(name, [])
        if came != wanted.get(name, [])[: len(came)]:
            raise WrongError(f"cut off: {name} differ")


def _difference(found: Json, wanted: Json) -> str:
    for name in wanted:
        mine, theirs = found.get(name), wanted[name]
        if mine == theirs:
            continue
        if isinstance(theirs, list | str) and isinstance(mine, list | str):
            at = next((i for i, (a, b) in enumerate(itertools.zip_longest(mine, theirs)) if a != b), 0)
            return (f"{name} differs at {at} of {len(mine)}, wanted {len(theirs)}: "
                    f"{mine[at : at + 8]!r} instead of {theirs[at : at + 8]!r}")[:SHOWN]  # fmt: skip
        return f"{name} is {mine!r} instead of {theirs!r}"[:SHOWN]
    return f"more than was wanted: {sorted(set(found) - set(wanted))}"


def decoded(body: bytes) -> Any:
    """JSON where it is JSON, else text; without what may differ from call to call."""
    try:
        value = msgspec.json.decode(body)
    except msgspec.DecodeError:
        return body.decode(errors="replace")
    return _without_meta(value)


def _without_meta(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_meta(inner) for key, inner in value.items() if key not in ("meta_info", "usage", "id")}
    return [_without_meta(inner) for inner in value] if isinstance(value, list) else value
