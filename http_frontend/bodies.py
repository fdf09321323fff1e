"""Request bodies as typed structs, and how they are read. Field lists: contract §3.6 to §3.9, §3.11, §3.12, §4.1, §5.1
and §6.1."""

from __future__ import annotations

import re
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any, Literal, TypeVar

import msgspec
from msgspec import UNSET, UnsetType

from engine.wire.sampling import GrammarKind
from http_frontend.errors import unreadable

T = TypeVar("T")
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]

Ids = list[int | list[int]]
"""A flat list of token ids or a list of such lists; normalisation refuses a mixture."""

GRAMMARS: dict[str, GrammarKind] = {
    "json_schema": "json", "regex": "regex", "ebnf": "ebnf", "structural_tag": "structural_tag",
}  # fmt: skip
"""Fields of `sampling_params` that an output has to conform to."""


class SamplingBody(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """`sampling_params`. UNSET: not named by the request; None: the built-in default, explicitly."""

    max_new_tokens: int | UnsetType | None = UNSET
    stop: str | list[str] | UnsetType | None = UNSET
    stop_token_ids: list[int] | UnsetType | None = UNSET
    stop_regex: str | list[str] | UnsetType | None = UNSET
    temperature: float | UnsetType | None = UNSET
    top_p: float | UnsetType | None = UNSET
    top_k: int | UnsetType | None = UNSET
    min_p: float | UnsetType | None = UNSET
    frequency_penalty: float | UnsetType | None = UNSET
    presence_penalty: float | UnsetType | None = UNSET
    repetition_penalty: float | UnsetType | None = UNSET
    min_new_tokens: int | UnsetType | None = UNSET
    n: int | UnsetType | None = UNSET
    json_schema: str | UnsetType | None = UNSET
    regex: str | UnsetType | None = UNSET
    ebnf: str | UnsetType | None = UNSET
    structural_tag: str | UnsetType | None = UNSET
    ignore_eos: bool | UnsetType | None = UNSET
    skip_special_tokens: bool | UnsetType | None = UNSET
    spaces_between_special_tokens: bool | UnsetType | None = UNSET
    no_stop_trim: bool | UnsetType | None = UNSET
    stream_interval: int | UnsetType | None = UNSET
    logit_bias: dict[str, float] | UnsetType | None = UNSET
    sampling_seed: int | UnsetType | None = UNSET
    custom_params: dict[str, Any] | UnsetType | None = UNSET
    beam_width: int | UnsetType | None = UNSET
    watermark: Any = UNSET
    choice: Any = UNSET


class GenerateBody(msgspec.Struct, kw_only=True):
    """Body of `/generate`. Fields that the contract calls plain booleans do not take null."""

    text: str | list[str] | None = None
    input_ids: Ids | None = None
    input_embeds: list[Any] | None = None
    sampling_params: SamplingBody | list[SamplingBody] | None = None
    rid: str | list[str] | None = None
    stream: bool = False
    return_logprob: bool | list[bool] | None = None
    logprob_start_len: int | list[int] | None = None
    top_logprobs_num: int | list[int] | None = None
    token_ids_logprob: Ids | None = None
    return_text_in_logprobs: bool = False
    return_prompt_token_ids: bool = False
    return_hidden_states: bool | list[bool] = False
    return_routed_experts: bool = False
    routed_experts_start_len: int = 0
    return_flat_raw_top_logprobs: bool = False
    return_entropy: bool = False
    session_params: dict[str, Any] | None = None
    session_id: str | None = None
    lora_path: str | list[str | None] | None = None
    custom_logit_processor: str | list[str | None] | None = None
    priority: int | None = None
    extra_key: str | list[str | None] | None = None
    cache_salt: str | list[str | None] | None = None
    max_thinking_tokens: int | None = None
    require_reasoning: bool = False
    routed_dp_rank: int | None = None
    log_metrics: bool = True
    no_logs: bool = False
    background: bool = False
    custom_labels: dict[str, Any] | None = None
    timeout: float | None = None
    return_timeline: bool = False
    image_data: Any = None
    video_data: Any = None
    audio_data: Any = None


def forget_inputs(body: GenerateBody) -> None:
    """Drop what a call is not answered with: its answer may take long, and its body be large."""
    body.text = body.input_ids = body.input_embeds = body.sampling_params = None
    body.token_ids_logprob = body.session_params = body.custom_labels = None
    body.image_data = body.video_data = body.audio_data = None


class EmbedBody(msgspec.Struct, kw_only=True):
    """Body of `/encode` and `/classify`. `text` may hold pairs, each a list of two strings."""

    text: str | list[str | list[str]] | None = None
    input_ids: Ids | None = None
    rid: str | list[str] | None = None
    dimensions: int | None = None
    is_cross_encoder_request: bool = False
    return_pooled_hidden_states: bool = False
    return_prompt_token_ids: bool = False
    lora_path: str | list[str | None] | None = None
    priority: int | None = None
    timeout: float | None = None
    image_data: Any = None
    video_data: Any = None
    audio_data: Any = None


class RerankBody(msgspec.Struct, kw_only=True):
    """Body of `/v1/rerank`."""

    query: str
    documents: list[str]
    instruct: str | None = None
    top_n: int | None = None
    return_documents: bool = True


class ScoreBody(msgspec.Struct, kw_only=True):
    """Body of `/v1/score`. Texts, or token ids."""

    query: str | list[int] | None = None
    items: str | list[str | list[int]] | None = None
    label_token_ids: Ids | None = None
    apply_softmax: bool = False
    temperature: float = 1.0
    item_first: bool = False
    return_token_logprobs: bool = False
    return_pooled_hidden_states: bool = False
    model: str | None = "default"


class EmbeddingsBody(msgspec.Struct, kw_only=True):
    """Body of `/v1/embeddings`."""

    input: str | list[str | int | list[int]]
    model: str | None = "default"
    encoding_format: Literal["float", "base64"] = "float"
    dimensions: int | None = None


class TokenizeBody(msgspec.Struct, kw_only=True):
    """Body of `/tokenize`."""

    prompt: str | list[str] | None = None
    messages: list[dict[str, Any]] | None = None
    add_special_tokens: bool | None = True
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    tools: list[dict[str, Any]] | None = None
    chat_template_kwargs: dict[str, Any] | None = None


class DetokenizeBody(msgspec.Struct, kw_only=True):
    """Body of `/detokenize`."""

    tokens: Ids
    skip_special_tokens: bool = True


class AbortBody(msgspec.Struct, kw_only=True):
    """Body of `/abort_request`."""

    rid: str | None = ""
    abort_all: bool | None = False


GENERATE: msgspec.json.Decoder[GenerateBody] = msgspec.json.Decoder(GenerateBody)
TOKENIZE: msgspec.json.Decoder[TokenizeBody] = msgspec.json.Decoder(TokenizeBody)
DETOKENIZE: msgspec.json.Decoder[DetokenizeBody] = msgspec.json.Decoder(DetokenizeBody)
EMBED: msgspec.json.Decoder[EmbedBody] = msgspec.json.Decoder(EmbedBody, strict=False)
RERANK: msgspec.json.Decoder[RerankBody] = msgspec.json.Decoder(RerankBody, strict=False)
SCORE: msgspec.json.Decoder[ScoreBody] = msgspec.json.Decoder(ScoreBody, strict=False)
EMBEDDINGS: msgspec.json.Decoder[EmbeddingsBody] = msgspec.json.Decoder(EmbeddingsBody, strict=False)
ABORT: msgspec.json.Decoder[AbortBody] = msgspec.json.Decoder(AbortBody, strict=False)

NOT_JSON = (msgspec.DecodeError, UnicodeDecodeError, RecursionError)
"""What a decoder raises of bytes that are no JSON: bad syntax, bad UTF-8, or nested too deep to be read."""

MAX_DEPTH = 128
"""Levels of lists and objects within those fields of a body that may hold any JSON and are sent on."""

_JSON_TYPE = re.compile(r"application/(json|[\w.!#$&^-]+\+json)\s*(;|$)", re.IGNORECASE)
_LONG_NUMBER = re.compile(rb"[0-9]{19}")

MAX_CONTAINERS = 1 << 19
"""Lists and objects of a body, of which each takes a hundred times the bytes that it is written in. The largest call
that there may be (65,536 items with parameters of their own) has fewer."""
_STRINGS = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+"?', re.DOTALL)
"""In linear time: one that does not end matches too."""


class ClientGoneError(Exception):
    """The client hung up before its request was complete."""


async def read_body(receive: Receive) -> bytes:
    """The whole body. Raises `ClientGoneError`."""
    message = await receive()
    if message["type"] == "http.request" and not message.get("more_body", False):
        return bytes(message["body"])
    parts = []
    while message["type"] == "http.request":
        parts.append(message["body"])
        if not message.get("more_body", False):
            return b"".join(parts)
        message = await receive()
    raise ClientGoneError


def content_type(headers: list[tuple[bytes, bytes]]) -> str:
    """Value of the `Content-Type` header, "" without one."""
    for name, value in headers:
        if name == b"content-type":
            return value.decode("latin-1").strip()
    return ""


def check_content_type(value: str, body: bytes) -> None:
    """Raise the shape C refusal of a body that is not declared to be JSON, of none at all, and of one that would take
    memory out of all proportion to its size."""
    if not body.strip():
        raise unreadable("1 validation error: Field required: the request has no body")
    if not _JSON_TYPE.match(value):
        raise unreadable(f"Content-Type must be application/json, got {value!r}: the body was not parsed as JSON")
    if _brackets(body) > MAX_CONTAINERS and (containers := _brackets(_STRINGS.sub(b"", body))) > MAX_CONTAINERS:
        raise unreadable(f"JSON decode error: the body has {containers} lists and objects, at most {MAX_CONTAINERS}")


def _brackets(body: bytes) -> int:
    return 0 if len(body) < MAX_CONTAINERS else body.count(b"[") + body.count(b"{")


def check_json_only(value: str, body: bytes) -> None:
    """As `check_content_type`, for the routes that insist on the type itself."""
    if value.partition(";")[0].strip().lower() != "application/json":
        raise unreadable("Unsupported Media Type: Only 'application/json' is allowed")
    check_content_type(value, body)


def find_wide_integer(body: bytes) -> int | None:
    """The first integer of a JSON body that does not fit 64 bits (signed or unsigned), or None.

    Raises one of `NOT_JSON` when the body is not JSON.
    """
    if not _LONG_NUMBER.search(body):
        return None
    waiting = [msgspec.json.decode(body)]
    while waiting:
        value = waiting.pop()
        if isinstance(value, dict):
            waiting.extend(value.values())
        elif isinstance(value, list):
            waiting.extend(value)
        elif isinstance(value, int) and not -(2**63) <= value < 2**64:
            return value
    return None


def check_depth(*values: Any) -> None:
    """Raise the shape C refusal of values that are nested deeper than every process can follow."""
    waiting = [(value, 1) for value in values]
    while waiting:
        value, depth = waiting.pop()
        if not isinstance(value, dict | list):
            continue
        if depth > MAX_DEPTH:
            raise unreadable(f"JSON decode error: the body is nested deeper than {MAX_DEPTH} levels")
        waiting.extend((inner, depth + 1) for inner in (value.values() if isinstance(value, dict) else value))


def decode_body(body: bytes, decoder: msgspec.json.Decoder[T]) -> T:
    """Decode the body of a route other than `/generate`. Raises the shape C refusal."""
    try:
        wide = find_wide_integer(body)
        if wide is not None:
            raise unreadable(f"JSON decode error: integer {wide} does not fit 64 bits")
        return decoder.decode(body)
    except msgspec.ValidationError as error:
        missing = "Field required: " if "missing required field" in str(error) else ""
        raise unreadable(f"1 validation error: {missing}{error}") from None
    except NOT_JSON as error:
        raise unreadable(f"JSON decode error: {error}") from None
