"""Weight updates, versions and pauses (contract §3.5, §4.2, §4.3)."""

from __future__ import annotations

import logging
from typing import Any, Literal, TypeVar

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from engine.wire.weights import (
    ContinueGeneration,
    Paused,
    PauseGeneration,
    ReadWeights,
    SetWeightVersion,
    UpdateWeights,
    WeightRows,
    WeightsUpdated,
)
from http_frontend.bodies import check_content_type, decode_body
from http_frontend.errors import RefusedError, invalid, json_response
from http_frontend.frontend import Frontend

log = logging.getLogger(__name__)

B = TypeVar("B")


class UpdateBody(msgspec.Struct, kw_only=True):
    """Body of `/update_weights_from_disk`. What has no effect here is still checked."""

    model_path: str
    load_format: str | None = None
    abort_all_requests: bool = False
    weight_version: str | None = None
    is_async: bool = False
    torch_empty_cache: bool = False
    keep_pause: bool = False
    recapture_cuda_graph: bool = False
    token_step: int = 0
    flush_cache: bool = True
    manifest: dict[str, Any] | None = None


class VersionBody(msgspec.Struct, kw_only=True):
    """Body of `/update_weight_version`."""

    new_version: str
    abort_all_requests: bool = True


class TensorBody(msgspec.Struct, kw_only=True):
    """Body of `/get_weights_by_name`."""

    name: str
    truncate_size: int = 100


class PauseBody(msgspec.Struct, kw_only=True):
    """Body of `/pause_generation`."""

    mode: Literal["abort", "retract", "in_place"] = "abort"


class ContinueBody(msgspec.Struct, kw_only=True):
    """Body of `/continue_generation`."""

    torch_empty_cache: bool = False


UPDATE: msgspec.json.Decoder[UpdateBody] = msgspec.json.Decoder(UpdateBody, strict=False)
VERSION: msgspec.json.Decoder[VersionBody] = msgspec.json.Decoder(VersionBody, strict=False)
TENSOR: msgspec.json.Decoder[TensorBody] = msgspec.json.Decoder(TensorBody, strict=False)
PAUSE: msgspec.json.Decoder[PauseBody] = msgspec.json.Decoder(PauseBody, strict=False)
CONTINUE: msgspec.json.Decoder[ContinueBody] = msgspec.json.Decoder(ContinueBody, strict=False)


class WeightRoutes:
    """The handlers. The scheduler takes one update after the other."""

    def __init__(self, frontend: Frontend) -> None:
        self._frontend = frontend

    async def update_from_disk(self, request: Request) -> Response:
        asked = await _read(request, UPDATE)
        self._frontend.check_open()
        if asked.abort_all_requests:
            self._abort_all()
        ring = self._frontend.ring
        message = UpdateWeights(
            key=ring.next_key(),
            model_path=asked.model_path,
            load_format=asked.load_format,
            weight_version=asked.weight_version,
            flush_cache=asked.flush_cache,
            keep_pause=asked.keep_pause,
        )
        log.info("update_weights_from_disk: %s, step %d", asked.model_path, asked.token_step)
        try:
            answer = await ring.ask(message, WeightsUpdated)
        except RefusedError as error:  # whoever updates weights reads `success`
            body = {"success": False, "message": error.message, "num_paused_requests": 0}
            return json_response(body, error.status)
        body = {"success": answer.success, "message": answer.message, "num_paused_requests": 0}
        return json_response(body, 200 if answer.success else 400)

    async def update_version(self, request: Request) -> Response:
        asked = await _read(request, VERSION)
        self._frontend.check_open()
        if asked.abort_all_requests:
            self._abort_all()
        ring = self._frontend.ring
        answer = await ring.ask(SetWeightVersion(ring.next_key(), asked.new_version), WeightsUpdated)
        return json_response({"success": True, "message": answer.message, "new_version": asked.new_version})

    async def get_by_name(self, request: Request) -> Response:
        asked = await _read(request, TENSOR)
        if asked.truncate_size < 0:
            raise invalid(f"truncate_size must be at least 0, got {asked.truncate_size}")
        self._frontend.check_open()
        ring = self._frontend.ring
        answer = await ring.ask(ReadWeights(ring.next_key(), asked.name, asked.truncate_size), WeightRows)
        if answer.values is None:
            raise invalid("Get parameter by name failed")
        return json_response(answer.values)

    async def pause(self, request: Request) -> Response:
        asked = await _read(request, PAUSE)
        self._frontend.check_open()
        if asked.mode == "abort":
            self._abort_all()
        ring = self._frontend.ring
        await ring.ask(PauseGeneration(ring.next_key(), asked.mode), Paused)
        return json_response({"message": "Generation paused successfully.", "status": "ok"})

    async def resume(self, request: Request) -> Response:
        await _read(request, CONTINUE)
        ring = self._frontend.ring
        await ring.ask(ContinueGeneration(ring.next_key()), Paused)
        return json_response({"message": "Generation continued successfully.", "status": "ok"})

    def _abort_all(self) -> None:
        """The ring keeps order: whatever is asked next finds these requests ended."""
        journal = self._frontend.journal
        entries = journal.match(None)
        log.info("aborting all %d requests", len(entries))
        journal.abort(entries)


async def _read(request: Request, decoder: msgspec.json.Decoder[B]) -> B:
    body = await request.body()
    check_content_type(request.headers.get("content-type", ""), body)
    return decode_body(body, decoder)
