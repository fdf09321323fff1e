"""GET /health, /health_generate, /ready and /ping (contract §3.3, §4.4). All bodies are empty."""

from __future__ import annotations

import logging

from starlette.requests import Request
from starlette.responses import Response

from engine.config.environment import number, switch
from http_frontend.frontend import Frontend

log = logging.getLogger(__name__)


class Health:
    """The handlers. Anything that the scheduler says proves health; a probe makes it say something."""

    def __init__(self, frontend: Frontend) -> None:
        self._frontend = frontend
        self._seconds = number("HEALTH_CHECK_TIMEOUT", 20)
        self._generates = switch("ENABLE_HEALTH_ENDPOINT_GENERATION", True)

    async def health(self, request: Request) -> Response:
        if not self._generates:
            return _up(self._frontend.up)
        return await self.health_generate(request)

    async def health_generate(self, _request: Request) -> Response:
        if not self._frontend.up:
            return _up(False)
        alive = await self._frontend.pulse.felt_within(self._seconds, probe=not self._frontend.paused)
        if not alive:
            log.error("health check: no sign of life from the scheduler within %g s", self._seconds)
        return _up(alive and self._frontend.up)

    async def ready(self, _request: Request) -> Response:
        return _up(self._frontend.up and not self._frontend.paused)

    async def ping(self, _request: Request) -> Response:
        return _up(self._frontend.up)


def _up(up: bool) -> Response:
    return Response(status_code=200) if up else Response(status_code=503, headers={"Retry-After": "1"})
