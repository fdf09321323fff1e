"""Recording which experts are chosen: /start_, /stop_ and /dump_expert_distribution_record (contract §3.10, §8)."""

from __future__ import annotations

from typing import Literal

from starlette.requests import Request
from starlette.responses import Response

from engine.wire.to_frontend import ExpertsRecorded
from engine.wire.to_scheduler import RecordExperts
from http_frontend.errors import RefusedError, invalid, text_response
from http_frontend.frontend import Frontend

_NO_MODE = "Please set ServerArgs.expert_distribution_recorder_mode to use ExpertDistributionRecorder."


class Experts:
    """The handlers."""

    def __init__(self, frontend: Frontend) -> None:
        self._frontend = frontend

    async def start(self, _request: Request) -> Response:
        return await self._record("start", "Start recording the expert distribution.\n")

    async def stop(self, _request: Request) -> Response:
        return await self._record("stop", "Stop recording the expert distribution.\n")

    async def dump(self, _request: Request) -> Response:
        return await self._record("dump", "Dump expert distribution record.\n")

    async def _record(self, action: Literal["start", "stop", "dump"], done: str) -> Response:
        if self._frontend.run.server.expert_distribution_recorder_mode is None:
            raise invalid(_NO_MODE)
        ring = self._frontend.ring
        answer = await ring.ask(RecordExperts(ring.next_key(), action), ExpertsRecorded)
        if answer.error is not None:
            raise RefusedError("A", answer.error, 500)
        return text_response(done)
