"""Administrative routes for whoever operates the server: logs, profiles, and what tests and benchmarks want changed
(contract §4.4, §4.5, §4.7)."""

from __future__ import annotations

import logging
import math
import re
import time
from typing import Any, TypeVar

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from engine.config.environment import setting
from engine.config.logs import set_level
from engine.wire.operation import MOST_SLEEP, Profile, Profiled, SlowDown, Tune
from engine.wire.tuning import tune
from http_frontend.bodies import check_content_type, decode_body
from http_frontend.errors import invalid, json_response, text_response, unreadable
from http_frontend.frontend import Frontend

log = logging.getLogger(__name__)

B = TypeVar("B")

_LEVELS = ("critical", "error", "warning", "info", "debug")
_ACTIVITIES = ("CPU", "GPU", "MEM", "CUDAPROFILER", "RPD")
_THRESHOLDS = ("speculative_accept_threshold_single", "speculative_accept_threshold_acc")


class LoggingBody(msgspec.Struct, kw_only=True):
    """Body of /configure_logging; None: as it is."""

    log_requests: bool | None = None
    log_requests_level: int | None = None
    log_requests_format: str | None = None
    log_level: str | None = None
    dump_requests_folder: str | None = None
    dump_requests_threshold: int | None = None
    crash_dump_folder: str | None = None


class ProfileBody(msgspec.Struct, kw_only=True):
    """Body of /start_profile. What it does not name is accepted and has no effect."""

    output_dir: str | None = None
    start_step: int | None = None
    num_steps: int | None = None
    activities: list[str] | None = None
    profile_by_stage: bool | None = False
    profile_id: str | None = None
    profile_prefix: str | None = None


class SlowDownBody(msgspec.Struct, kw_only=True):
    forward_sleep_time: float | None = None


class InternalStateBody(msgspec.Struct, kw_only=True):
    server_args: dict[str, Any]


LOGGING = msgspec.json.Decoder(LoggingBody, strict=False)
PROFILE = msgspec.json.Decoder(ProfileBody, strict=False)
SLOW_DOWN = msgspec.json.Decoder(SlowDownBody, strict=False)
INTERNAL_STATE = msgspec.json.Decoder(InternalStateBody, strict=False)


class Operation:
    """The handlers."""

    def __init__(self, frontend: Frontend) -> None:
        self._frontend = frontend

    async def configure_logging(self, request: Request) -> Response:
        asked = await _body(request, LOGGING)
        requests = self._frontend.request_log
        level = None if asked.log_level is None else asked.log_level.lower()
        if level is not None and level not in _LEVELS:
            raise invalid(f"log_level must be one of {', '.join(_LEVELS)}, got {asked.log_level!r}.")
        if asked.log_requests_level is not None and not 0 <= asked.log_requests_level <= 3:
            raise invalid(f"log_requests_level must be in [0, 3], got {asked.log_requests_level}.")
        if asked.log_requests_format not in (None, "text", "json"):
            raise invalid(f"log_requests_format must be text or json, got {asked.log_requests_format!r}.")
        requests.on = requests.on if asked.log_requests is None else asked.log_requests
        requests.level = requests.level if asked.log_requests_level is None else asked.log_requests_level
        requests.form = asked.log_requests_format or requests.form
        self._frontend.keep(
            log_level=level or self._frontend.standing.log_level, log_requests=requests.on,
            log_requests_level=requests.level, log_requests_format=requests.form,
        )  # fmt: skip
        if level is not None:
            set_level(level)
            self._frontend.ring.tell(Tune(log_level=level))
        for name in ("dump_requests_folder", "dump_requests_threshold", "crash_dump_folder"):
            if getattr(asked, name) is not None:
                log.warning("configure_logging: %s has no effect: requests are not dumped", name)
        log.info(
            "configure_logging: log_level=%s log_requests=%s level=%d format=%s", level, requests.on, requests.level,
            requests.form,
        )  # fmt: skip
        return Response(status_code=200)

    async def start_profile(self, request: Request) -> Response:
        asked = await _body(request, PROFILE, needed=False)
        for name in ("num_steps", "start_step"):
            value = getattr(asked, name)
            if value is not None and value < 1:
                raise invalid(f"{name} must be at least 1, got {value}.")
        for activity in asked.activities or ():
            if activity not in _ACTIVITIES:
                raise invalid(f"activities must be of {', '.join(_ACTIVITIES)}, got {activity!r}.")
        name = "-".join(filter(None, [asked.profile_prefix, asked.profile_id or f"{time.time():.3f}"]))
        if not re.fullmatch(r"[\w.-]{1,200}", name) or name.startswith("."):
            raise invalid(f"profile_prefix and profile_id may have letters, digits, '_', '.' and '-', got {name!r}.")
        folder = asked.output_dir or setting("TORCH_PROFILER_DIR") or "/tmp"
        await self._profile(
            Profile(
                key=self._frontend.ring.next_key(), action="start", folder=folder, name=name,
                num_steps=asked.num_steps, start_step=asked.start_step,
            )
        )  # fmt: skip
        return text_response("Start profiling.\n")

    async def stop_profile(self, _request: Request) -> Response:
        await self._profile(Profile(key=self._frontend.ring.next_key(), action="stop"))
        return text_response("Stop profiling. This will take some time.\n")

    async def _profile(self, message: Profile) -> None:
        answer = await self._frontend.ring.ask(message, Profiled)
        if answer.error is not None:
            raise invalid(answer.error)

    async def freeze_gc(self, _request: Request) -> Response:
        message = Tune(freeze_gc=True)
        tune(message)
        self._frontend.keep(gc_frozen=True)
        self._frontend.ring.tell(message)
        return text_response("Garbage collection frozen.\n")

    async def slow_down(self, request: Request) -> Response:
        seconds = (await _body(request, SLOW_DOWN)).forward_sleep_time or 0.0
        if not 0 <= seconds <= MOST_SLEEP or not math.isfinite(seconds):
            raise invalid(f"forward_sleep_time must be in [0, {MOST_SLEEP:g}] seconds, got {seconds}.")
        self._frontend.keep(step_sleep=seconds)
        self._frontend.ring.tell(SlowDown(seconds))
        return json_response(None)

    async def set_internal_state(self, request: Request) -> Response:
        given = (await _body(request, INTERNAL_STATE)).server_args
        limits = self._frontend.limits
        most = limits.result().max_running_requests if limits.done() else 1
        good = all(_settable(name, value, most) for name, value in given.items())
        log.info("set_internal_state: %s: %s", sorted(given), "accepted, without effect here" if good else "refused")
        return json_response([good])

    async def set_trace_level(self, request: Request) -> Response:
        word = request.query_params.get("level", "")
        try:
            level = int(word)
        except ValueError:
            raise unreadable(f"1 validation error: level must be an integer, got {word!r}") from None
        log.info("set_trace_level: %d has no effect: nothing is traced", level)
        return text_response("success")


def _settable(name: str, value: Any, most: int) -> bool:
    """The contract's three names; here is neither a pipeline nor speculation that they could change."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    if name == "pp_max_micro_batch_size":
        return 1 <= value <= most
    return name in _THRESHOLDS and 0 <= value <= 1


async def _body(request: Request, decoder: msgspec.json.Decoder[B], *, needed: bool = True) -> B:
    """The body; where none is `needed`, an empty one is an empty object. Raises the shape C refusal."""
    body = await request.body()
    if not needed and not body.strip():
        body = b"{}"
    else:
        check_content_type(request.headers.get("content-type", ""), body)
    return decode_body(body, decoder)
