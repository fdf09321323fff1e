"""Why a `/generate` body was refused: read again as plain JSON, and answered as the contract's §2.3 and §2.4 say.

Only bodies that the typed decoder has refused come here. Two passes over the top-level fields, as in
SGLang: what not even a lenient reader could use is shape C; then the first strict mismatch is shape B.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import msgspec

from http_frontend.bodies import NOT_JSON, SamplingBody, find_wide_integer
from http_frontend.errors import RefusedError, unreadable

Check = Callable[[Any], bool]
Mismatch = Callable[[Any], str | None]

_TRUTH_WORDS = {"true", "false", "yes", "no", "on", "off", "t", "f", "y", "n", "1", "0"}


def diagnose(body: bytes, reason: Exception) -> RefusedError:
    """The refusal of `body`, which the typed decoder has refused with `reason`."""
    try:
        wide = find_wide_integer(body)
        value = msgspec.json.decode(body)
    except NOT_JSON as error:
        return unreadable(f"JSON decode error: {error}")
    if wide is not None:
        return unreadable(f"JSON decode error: the body contains non-int64 element {wide}")
    if not isinstance(value, dict):
        return unreadable(f"1 validation error: the body must be a JSON object; got {type(value).__name__}")
    for name, field in value.items():
        if (message := _unusable(name, field)) is not None:
            return unreadable(f"1 validation error: {name} {message}")
    for name, field in value.items():
        if (mismatch := _mistyped(name, field)) is not None:
            return RefusedError("B", mismatch)
    return unreadable(f"1 validation error: {reason}")


# Lenient pass -------------------------------------------------------------------------------------------------------


def _unusable(name: str, value: Any) -> str | None:
    """What is wrong with top-level field `name` for a reader that converts what it can; None if nothing."""
    if name == "input_ids":
        return _unusable_ids(value)
    usable = _LENIENT.get(name)
    if usable is None or usable(value):
        return None
    if value is None:
        return "must not be null"
    return f"cannot be read from {_sent(value)}"


def _unusable_ids(value: Any) -> str | None:
    if value is None:
        return None
    if not isinstance(value, list):
        return f"must be list or null; got {type(value).__name__}"
    for element in value:
        for token in element if isinstance(element, list) else (element,):
            if isinstance(token, bool) or not isinstance(token, int):
                return f"elements must be int or list; got {type(token).__name__}"
            if token >= 2**63:
                return f"contains non-int64 element {token}"
    return None


def _text(value: Any) -> bool:
    return isinstance(value, str)


def _truth(value: Any) -> bool:
    if isinstance(value, str):
        return value.lower() in _TRUTH_WORDS
    return isinstance(value, bool | int | float) and value in (0, 1)


def _whole(value: Any) -> bool:
    if isinstance(value, str):
        return value.strip().lstrip("+-").isdecimal()
    return isinstance(value, int) or (isinstance(value, float) and value.is_integer())


def _number(value: Any) -> bool:
    if not isinstance(value, str):
        return isinstance(value, int | float)
    try:
        float(value)
    except ValueError:
        return False
    return True


def _hidden(value: Any) -> bool:
    return _truth(value) or value in ("last", "full")


def _mapping(value: Any) -> bool:
    return isinstance(value, dict)


def _listing(value: Any) -> bool:
    return isinstance(value, list)


def _nullable(check: Check) -> Check:
    return lambda value: value is None or check(value)


def _one_or_list(check: Check) -> Check:
    return lambda value: check(value) or (isinstance(value, list) and all(map(check, value)))


def _token_ids(value: Any) -> bool:
    return isinstance(value, list) and all(map(_one_or_list(_whole), value))


def _sampling(value: Any) -> bool:
    """Scalars in a list are of no use; null and a list are left to the strict pass (`struct SamplingParams`)."""
    if isinstance(value, list):
        return all(element is None or isinstance(element, dict | list) for element in value)
    return isinstance(value, dict)


_PLAIN_BOOLEANS = (
    "stream", "return_text_in_logprobs", "return_prompt_token_ids", "return_routed_experts", "return_entropy",
    "return_flat_raw_top_logprobs", "require_reasoning", "log_metrics", "no_logs", "background",
    "return_timeline",
)  # fmt: skip
_TEXTS = ("rid",)
_TEXTS_OR_NULLS = ("lora_path", "custom_logit_processor", "extra_key", "cache_salt")

_LENIENT: dict[str, Check] = {
    "text": _nullable(_one_or_list(_text)),
    "input_embeds": _nullable(_listing),
    "sampling_params": _nullable(_sampling),
    "return_logprob": _nullable(_one_or_list(_truth)),
    "logprob_start_len": _nullable(_one_or_list(_whole)),
    "top_logprobs_num": _nullable(_one_or_list(_whole)),
    "token_ids_logprob": _nullable(_token_ids),
    "return_hidden_states": _one_or_list(_hidden),
    "session_params": _nullable(_mapping),
    "session_id": _nullable(_text),
    "priority": _nullable(_whole),
    "routed_dp_rank": _nullable(_whole),
    "max_thinking_tokens": _nullable(_whole),
    "timeout": _nullable(_number),
    "custom_labels": _nullable(_mapping),
    "routed_experts_start_len": _whole,
    **dict.fromkeys(_PLAIN_BOOLEANS, _truth),
    **dict.fromkeys(_TEXTS, _nullable(_one_or_list(_text))),
    **dict.fromkeys(_TEXTS_OR_NULLS, _nullable(_one_or_list(_nullable(_text)))),
}

# Strict pass --------------------------------------------------------------------------------------------------------


def _sent(value: Any) -> str:
    match value:
        case None:
            return "null"
        case bool():
            return f"boolean `{str(value).lower()}`"
        case int():
            return f"integer `{value}`"
        case float():
            return f"floating point `{value!r}`"
        case str():
            return f"string {json.dumps(value, ensure_ascii=False)}"
        case list():
            return "sequence"
    return "map"


def _wanted(value: Any, wanted: str) -> str:
    return f"invalid type: {_sent(value)}, expected {wanted}"


def _is(kind: type, wanted: str) -> Mismatch:
    def mismatch(value: Any) -> str | None:
        fits = isinstance(value, kind) and (kind is bool or not isinstance(value, bool))
        return None if fits else _wanted(value, wanted)

    return mismatch


_BOOL = _is(bool, "a boolean")
_I64 = _is(int, "i64")
_STRING = _is(str, "a string")
_MAP = _is(dict, "a map")
_SEQUENCE = _is(list, "a sequence")


def _f64(value: Any) -> str | None:
    fits = isinstance(value, int | float) and not isinstance(value, bool)
    return None if fits else _wanted(value, "f64")


def _optional(mismatch: Mismatch) -> Mismatch:
    return lambda value: None if value is None else mismatch(value)


def _first(values: Any, mismatch: Mismatch) -> str | None:
    return next((message for message in map(mismatch, values) if message is not None), None)


def _or_list(element: Mismatch, name: str) -> Mismatch:
    def mismatch(value: Any) -> str | None:
        if isinstance(value, list):
            return _first(value, element)
        return None if element(value) is None else _wanted(value, f"a value or an array of values for {name}")

    return mismatch


def _sequence_of(element: Mismatch) -> Mismatch:
    return lambda value: _SEQUENCE(value) or _first(value, element)


def _map_of(element: Mismatch) -> Mismatch:
    return lambda value: _MAP(value) or _first(value.values(), element)


def _token_ids_row(value: Any) -> str | None:
    return _first(value, _I64) if isinstance(value, list) else _I64(value)


def _anything(value: Any) -> None:
    return None


def _sampling_params(value: Any) -> str | None:
    if not isinstance(value, dict):
        return _wanted(value, "struct SamplingParams")
    for name, field in value.items():
        mismatch = _SAMPLING.get(name)
        if mismatch is None:
            known = ", ".join(f"`{field.name}`" for field in msgspec.structs.fields(SamplingBody))
            return f"unknown field `{name}`, expected one of {known}"
        if (message := mismatch(field)) is not None:
            return message
    return None


_SAMPLING: dict[str, Mismatch] = {
    "stop": _optional(_or_list(_STRING, "StringOrList")),
    "stop_regex": _optional(_or_list(_STRING, "StringOrList")),
    "stop_token_ids": _optional(_sequence_of(_I64)),
    "logit_bias": _optional(_map_of(_f64)),
    "custom_params": _optional(_MAP),
    "watermark": _anything,
    "choice": _anything,
    **dict.fromkeys(
        ("max_new_tokens", "min_new_tokens", "top_k", "n", "stream_interval", "sampling_seed", "beam_width"),
        _optional(_I64),
    ),
    **dict.fromkeys(
        ("temperature", "top_p", "min_p", "frequency_penalty", "presence_penalty", "repetition_penalty"),
        _optional(_f64),
    ),
    **dict.fromkeys(("json_schema", "regex", "ebnf", "structural_tag"), _optional(_STRING)),
    **dict.fromkeys(
        ("ignore_eos", "skip_special_tokens", "spaces_between_special_tokens", "no_stop_trim"), _optional(_BOOL)
    ),
}

_STRICT: dict[str, Mismatch] = {
    "sampling_params": _optional(_or_list(_sampling_params, "SamplingParamsOrList")),
    "return_logprob": _optional(_or_list(_BOOL, "BoolOrList")),
    "return_hidden_states": _or_list(_BOOL, "BoolOrList"),
    "logprob_start_len": _optional(_or_list(_I64, "Int64OrList")),
    "top_logprobs_num": _optional(_or_list(_I64, "Int64OrList")),
    "token_ids_logprob": _optional(_sequence_of(_token_ids_row)),
    "priority": _optional(_I64),
    "routed_dp_rank": _optional(_I64),
    "max_thinking_tokens": _optional(_I64),
    "timeout": _optional(_f64),
    "routed_experts_start_len": _I64,
    **dict.fromkeys(_PLAIN_BOOLEANS, _BOOL),
}


def _mistyped(name: str, value: Any) -> str | None:
    """The strict reader's complaint about top-level field `name`; None if it has none."""
    if name == "sampling_params" and isinstance(value, dict):
        return _sampling_params(value)
    return _STRICT.get(name, _anything)(value)
