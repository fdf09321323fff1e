"""What the server says of itself: /model_info, /server_info, /v1/models (contract §3.1, §3.2, §4.8)."""

from __future__ import annotations

import asyncio
import logging
from typing import Any

import msgspec
from starlette.requests import Request
from starlette.responses import RedirectResponse, Response

from engine.config import RunConfig
from engine.wire.lifecycle import Limits
from engine.wire.to_frontend import State
from engine.wire.to_scheduler import QueryState
from http_frontend.errors import json_response
from http_frontend.frontend import Frontend

log = logging.getLogger(__name__)

API_VERSION = "0.5.23"
"""Version of the API that is answered here; clients of that API read it from /server_info."""

_SECRETS = ("api_key", "admin_api_key", "ssl_keyfile_password")


class Info:
    """The handlers."""

    def __init__(self, frontend: Frontend) -> None:
        self._frontend = frontend

    async def root(self, _request: Request) -> Response:
        return json_response("Tokenmill is running")

    async def model_info(self, request: Request) -> Response:
        _warn_of_old_name(request, "/get_model_info", "/model_info")
        run = self._frontend.run
        return json_response(
            {
                "model_path": run.model.name,
                "tokenizer_path": _tokenizer_path(run),
                "is_generation": run.facts.is_generation,
                "preferred_sampling_params": run.server.preferred_sampling_params,
                "weight_version": self._frontend.weight_version,
                "has_image_understanding": False,
                "has_audio_understanding": False,
                "model_type": run.facts.model_type,
                "architectures": run.facts.architectures,
            }
        )

    async def server_info(self, request: Request) -> Response:
        """Waits for the model to be loaded, since the limits are known only then."""
        _warn_of_old_name(request, "/get_server_info", "/server_info")
        run = self._frontend.run
        # Shielded: that one waiter leaves must not cancel what all wait for.
        limits = await asyncio.shield(self._frontend.limits)
        ring = self._frontend.ring
        answer = await ring.ask(QueryState(ring.next_key()), State)
        flags = _resolved_flags(run, limits) | {"weight_version": self._frontend.weight_version}
        state = flags | _rank_state(limits, self._frontend.startup_seconds) | answer.state
        facts = {
            "launch_command": run.launch_command,
            "status": "ready",
            "max_total_num_tokens": limits.max_total_num_tokens,
            "max_req_input_len": limits.max_req_input_len,
            "startup_time": self._frontend.startup_seconds,
            "version": API_VERSION,
            "frontend": "python",
            "kv_events": None,
            "internal_states": [state],
        }
        return json_response(flags | facts)

    async def models(self, _request: Request) -> Response:
        return json_response({"object": "list", "data": [_card(self._frontend.run)]})

    async def model(self, request: Request) -> Response:
        name: str = request.path_params["id"]
        if name.endswith("/") or not name:
            return RedirectResponse(request.url.replace(path=request.url.path.rstrip("/")))
        card = _card(self._frontend.run)
        if name == card["id"]:
            return json_response(card)
        error = {
            "message": f"The model '{name}' does not exist",
            "type": "invalid_request_error",
            "param": "model",
            "code": "model_not_found",
        }
        return json_response({"error": error}, 404)


def _warn_of_old_name(request: Request, old: str, new: str) -> None:
    if request.scope["route"].path == old:
        log.warning(
            "Endpoint '%s' is deprecated and will be removed in a future version. Please use '%s' instead.", old, new
        )


def _tokenizer_path(run: RunConfig) -> str:
    return run.tokenizer.name if run.tokenizer is not None else run.server.tokenizer_path or run.model.name


def _resolved_flags(run: RunConfig, limits: Limits) -> dict[str, Any]:
    """Every flag in snake_case, what was decided at start filled in, secrets as null."""
    flags: dict[str, Any] = msgspec.to_builtins(run.server)
    return flags | {
        **dict.fromkeys(_SECRETS),
        "model_path": run.model.name,
        "tokenizer_path": _tokenizer_path(run),
        "served_model_name": run.server.served_model_name or run.model.name,
        "context_length": run.facts.context_length,
        "max_running_requests": limits.max_running_requests,
        "chunked_prefill_size": limits.chunked_prefill_size,
        "max_total_tokens": limits.max_total_num_tokens,
        "page_size": run.server.page_size or 1,
        "speculative_algorithm": None,
    }


def _rank_state(limits: Limits, startup_seconds: float) -> dict[str, Any]:
    """The part of `internal_states[0]` that holds until the scheduler's own answer says otherwise."""
    return {
        "last_gen_throughput": 0.0,
        "effective_max_running_requests_per_dp": limits.max_running_requests,
        "memory_usage": {
            "weight": limits.weight_gb,
            "kvcache": limits.kvcache_gb,
            "startup_available": limits.available_gb,
            "token_capacity": limits.max_total_num_tokens,
            "graph": {"decode": limits.graph_gb} if limits.graph_sizes else {},
        },
        "load_seconds": limits.load_seconds,
        "startup_time": startup_seconds,
        "world_size": 1,
        "dp_size": 1,
        "attn_dp_size": 1,
        "decode_cuda_graph_bs": list(limits.graph_sizes),
        "decode_cuda_graph_memory_gb": limits.graph_gb,
    }


def _card(run: RunConfig) -> dict[str, Any]:
    name = run.server.served_model_name or run.model.name
    return {
        "id": name,
        "object": "model",
        "created": int(run.started_at),
        "owned_by": "sglang",
        "root": name,
        "parent": None,
        "max_model_len": run.facts.context_length,
    }
