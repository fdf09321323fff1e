"""Features that a `/generate` call may ask for and this server does not have: each is refused by name."""

from __future__ import annotations

from typing import Any

from engine.config import ServerConfig
from http_frontend.bodies import EmbedBody, GenerateBody
from http_frontend.errors import RefusedError, invalid

_INT64 = 2**63
_UNSUPPORTED = ("return_routed_experts", "return_flat_raw_top_logprobs", "return_entropy")
_MEDIA = ("image_data", "video_data", "audio_data")


def check_features(body: GenerateBody) -> None:
    """Raise `RefusedError` for a feature that is off or not built (contract E29 to E31, E38, §5.1, §5.6)."""
    if body.session_id and body.session_params:
        raise invalid("session_id and session_params cannot both be set.")
    if body.session_params is not None:
        raise invalid("session_params: sessions are not supported yet")
    refuse_adapters(body.lora_path)
    if any(_listed(body.return_hidden_states)):
        raise invalid(
            "The server is not configured to return hidden states. Please set `--return-hidden-states-mode last`, "
            "`--return-hidden-states-mode full`, or the legacy `--enable-return-hidden-states` flag."
        )
    if any(_listed(body.custom_logit_processor)):
        raise invalid(
            "The server is not configured to enable custom logit processor. Please set "
            "`--enable-custom-logit-processor` to enable this feature."
        )
    for name in _UNSUPPORTED:
        if getattr(body, name):
            raise invalid(f"{name} must be false: it is not supported")
    refuse_media(body)
    if body.routed_dp_rank not in (None, 0):
        raise invalid(f"routed_dp_rank must be in [0, 1), got {body.routed_dp_rank}.")


def refuse_adapters(lora_path: str | list[str | None] | None) -> None:
    """E29."""
    for adapter in _listed(lora_path):
        if adapter:
            raise invalid(
                f"LoRA adapter '{adapter}' was requested, but LoRA is not enabled. Please launch the server with "
                "--enable-lora flag and preload adapters using --lora-paths or /load_lora_adapter endpoint."
            )


def refuse_media(body: GenerateBody | EmbedBody) -> None:
    """Raise `RefusedError` for images, videos and sound."""
    for name in _MEDIA:
        if _has_media(getattr(body, name)):
            raise invalid(f"{name} must be null or []: the model takes text only")


def priority_of(asked: int | None, server: ServerConfig) -> int | None:
    """The call's priority, None where priorities are off. Raises `RefusedError` (E32, E33)."""
    if asked is not None and not -_INT64 <= asked < _INT64:
        raise invalid(f"priority must be a signed 64-bit integer between {-_INT64} and {_INT64 - 1}")
    if server.enable_priority_scheduling:
        return server.default_priority_value if asked is None else asked
    if asked is not None and server.abort_on_priority_when_disabled:
        raise RefusedError(
            "D", "Using priority is disabled for this server. Please send a new request without a priority.", 503
        )
    return None


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _has_media(value: Any) -> bool:
    """Whether there is anything but nulls, empty strings and lists of these; lists may be nested very deep."""
    waiting = [value]
    while waiting:
        one = waiting.pop()
        if isinstance(one, list):
            waiting.extend(one)
        elif one is not None and one != "":
            return True
    return False
