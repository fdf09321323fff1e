"""What the routes that answer with vectors have in common: which models have some, and how vectors become numbers."""

from __future__ import annotations

import math
import uuid
from array import array
from collections.abc import Sequence

from engine.config.run import ModelFacts, PooledFacts
from engine.wire.to_tokenizer import Embed
from http_frontend.errors import invalid
from http_frontend.items import Desk
from http_frontend.journal import Entry

NOT_AN_EMBEDDING_MODEL = (
    "This model does not appear to be an embedding model by default. Please add `--is-embedding` when launching the "
    "server or try another model."
)


def pooled_of(facts: ModelFacts) -> PooledFacts:
    """What the model's vectors are. Raises `RefusedError` of a model that generates."""
    if facts.pooled is None:
        raise invalid(NOT_AN_EMBEDDING_MODEL)
    return facts.pooled


def embed(
    desk: Desk,
    *,
    text: str | None = None,
    pair: str | None = None,
    input_ids: bytes | None = None,
    rid: str | None = None,
    dimensions: int | None = None,
    with_hidden: bool = False,
    priority: int | None = None,
) -> Embed:
    """The message of a new item; it gets a rid of its own where none is given."""
    return Embed(
        key=desk.next_key(),
        attempt=0,
        rid=new_rid() if rid is None else rid,
        text=text,
        pair=pair,
        input_ids=input_ids,
        dimensions=dimensions,
        with_hidden=with_hidden,
        priority=priority,
    )


def new_rid() -> str:
    return uuid.uuid4().hex


def check_dimensions(dimensions: int | None, pooled: PooledFacts, model: str) -> None:
    """Whether vectors may be cut to `dimensions` entries (contract §3.6). Raises `RefusedError`."""
    if dimensions is None:
        return
    if dimensions <= 0:
        raise invalid("Requested dimensions must be greater than 0")
    if pooled.dimensions is None:
        raise invalid(
            f"Model '{model}' does not support matryoshka representation, changing output dimensions will lead to poor "
            "results."
        )
    if pooled.dimensions and dimensions not in pooled.dimensions:
        raise invalid(
            f"Model '{model}' only supports {pooled.dimensions} matryoshka dimensions, using other output dimensions "
            "will lead to poor results."
        )
    if dimensions > pooled.width:
        raise invalid(f"Provided dimensions are greater than max embedding dimension: {pooled.width}")


def numbers(packed: bytes) -> list[float]:
    """Float32, little-endian, as a list.

    As JSON each takes about 20 bytes, with the digits of a float64. Fewer would tell the same float32, but to find them
    costs as much time as the longer text does.
    """
    row = array("f")
    row.frombytes(packed)
    return row.tolist()


def pair_score(entry: Entry, pooled: PooledFacts) -> float:
    """How well a pair of texts fits: the first entry of its vector, put through the model's activation (float64)."""
    score = numbers(entry.vector[:4])[0]
    match pooled.score_activation:
        case "identity":
            return score
        case "sigmoid":
            return sigmoid(score)
        case "tanh":
            return math.tanh(score)
        case "relu":
            return max(score, 0.0)


def sigmoid(x: float) -> float:
    """1 / (1 + e^-x), of any finite x."""
    if x >= 0:
        return 1 / (1 + math.exp(-x))
    power = math.exp(x)
    return power / (1 + power)


def softmax(row: Sequence[float], temperature: float) -> list[float]:
    """Of finite numbers divided by `temperature` > 0, in float64."""
    best = max(row)
    powers = [math.exp((x - best) / temperature) for x in row]
    total = math.fsum(powers)
    return [power / total for power in powers]
