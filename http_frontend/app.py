"""The Starlette application: routes, HTTP-level errors (shape E), CORS, root path."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from engine.config.environment import switch
from http_frontend.auth import ApiKeys
from http_frontend.call import BARE_SEND
from http_frontend.control import Control
from http_frontend.encode import plan_embeddings, plan_encode
from http_frontend.errors import RefusedError, error_response, json_response
from http_frontend.experts import Experts
from http_frontend.frontend import Frontend
from http_frontend.generate import GenerateEndpoint
from http_frontend.guard import Guard
from http_frontend.health import Health
from http_frontend.info import Info
from http_frontend.loads import Loads
from http_frontend.openapi import Document
from http_frontend.operation import Operation
from http_frontend.rerank import plan_rerank
from http_frontend.score import plan_score
from http_frontend.text import Text
from http_frontend.weights import WeightRoutes
from http_frontend.whole_call import WholeCall


def build_app(frontend: Frontend) -> ASGIApp:
    """The application that answers for `frontend`."""
    server = frontend.run.server
    root_path = server.fastapi_root_path.rstrip("/")
    middleware = [
        Middleware(
            CORSMiddleware, allow_origins=["*"], allow_methods=["*"], allow_headers=["*"], allow_credentials=True
        )
    ]
    if server.api_key is not None or server.admin_api_key is not None:
        middleware.append(
            Middleware(
                ApiKeys,
                api_key=server.api_key,
                admin_key=server.admin_api_key,
                path_of=lambda scope: _below(root_path, scope["path"]),
            )
        )
    # Innermost, so that a call without a key takes no place.
    middleware.append(Middleware(Guard, server=server, path_of=lambda scope: _below(root_path, scope["path"])))
    app = Starlette(
        routes=_routes(frontend),
        middleware=middleware,
        exception_handlers={RefusedError: _refused, HTTPException: _http_error, ClientDisconnect: _nobody},
    )
    return _Outermost(app, root_path)


def _routes(frontend: Frontend) -> list[Route]:
    info, health, control, text = Info(frontend), Health(frontend), Control(frontend), Text(frontend)
    experts = Experts(frontend)
    routes = [
        _route("/generate", GenerateEndpoint(frontend), "POST", "PUT"),
        _route("/encode", WholeCall(frontend, plan_encode, "A"), "POST", "PUT"),
        _route("/classify", WholeCall(frontend, plan_encode, "A"), "POST", "PUT"),
        _route("/v1/rerank", WholeCall(frontend, plan_rerank, "D"), "POST", "PUT"),
        _route("/v1/score", WholeCall(frontend, plan_score, "D"), "POST"),
        _route("/v1/embeddings", WholeCall(frontend, plan_embeddings, "D"), "POST"),
        _route("/health", health.health, "GET"),
        _route("/health_generate", health.health_generate, "GET"),
        _route("/ready", health.ready, "GET"),
        _route("/ping", health.ping, "GET"),
        _route("/v1/models", info.models, "GET"),
        _route("/v1/models/{id:path}", info.model, "GET"),
        _route("/model_info", info.model_info, "GET"),
        _route("/get_model_info", info.model_info, "GET"),
        _route("/server_info", info.server_info, "GET"),
        _route("/get_server_info", info.server_info, "GET"),
        _route("/flush_cache", control.flush_cache, "GET", "POST"),
        _route("/abort_request", control.abort_request, "POST"),
        _route("/start_expert_distribution_record", experts.start, "GET", "POST"),
        _route("/stop_expert_distribution_record", experts.stop, "GET", "POST"),
        _route("/dump_expert_distribution_record", experts.dump, "GET", "POST"),
        _route("/tokenize", text.tokenize, "POST"),
        _route("/v1/tokenize", text.tokenize, "POST"),
        _route("/detokenize", text.detokenize, "POST"),
        _route("/v1/detokenize", text.detokenize, "POST"),
        _route("/", info.root, "GET", "HEAD"),
        *_weight_routes(WeightRoutes(frontend)),
        *_operation_routes(Operation(frontend)),
        *_load_routes(frontend),
    ]
    if not switch("DISABLE_OPENAPI_DOC"):
        routes.append(_route("/openapi.json", Document(frontend.run.server, lambda: routes).page, "GET"))
    return routes


def _weight_routes(weights: WeightRoutes) -> list[Route]:
    return [
        _route("/update_weights_from_disk", weights.update_from_disk, "POST"),
        _route("/update_weights", weights.update_from_disk, "POST"),
        _route("/update_weight_version", weights.update_version, "POST"),
        _route("/get_weights_by_name", weights.get_by_name, "GET", "POST"),
        _route("/pause_generation", weights.pause, "POST"),
        _route("/continue_generation", weights.resume, "POST"),
    ]


def _operation_routes(operation: Operation) -> list[Route]:
    return [
        _route("/configure_logging", operation.configure_logging, "GET", "POST"),
        _route("/start_profile", operation.start_profile, "GET", "POST"),
        _route("/stop_profile", operation.stop_profile, "GET", "POST"),
        _route("/freeze_gc", operation.freeze_gc, "GET", "POST"),
        _route("/slow_down", operation.slow_down, "GET", "POST"),
        _route("/set_internal_state", operation.set_internal_state, "POST", "PUT"),
        _route("/set_trace_level", operation.set_trace_level, "GET", "POST"),
    ]


def _load_routes(frontend: Frontend) -> list[Route]:
    loads = Loads(frontend)
    routes = [_route("/v1/loads", loads.loads, "GET"), _route("/get_load", loads.old_loads, "GET")]
    if frontend.run.server.enable_metrics:
        from http_frontend.metrics_page import MetricsPage  # its library is loaded only where it is wanted

        routes.append(_route("/metrics", MetricsPage(frontend).page, "GET"))
    return routes


def _route(path: str, endpoint: Callable[..., Any], *methods: str) -> Route:
    """A route with exactly these methods: Starlette would add HEAD to GET."""
    route = Route(path, endpoint, methods=methods)
    route.methods = set(methods)
    return route


def _refused(_request: Request, error: Exception) -> Response:
    assert isinstance(error, RefusedError)
    return error_response(error)


def _http_error(_request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    headers = dict(error.headers) if error.headers else None
    return json_response({"detail": error.detail}, error.status_code, headers)


def _nobody(_request: Request, _error: Exception) -> Response:
    """The client has hung up in the middle of its body: what is sent now reaches nobody."""
    return Response(status_code=400)


def _below(root_path: str, path: str) -> str:
    """`path` without `root_path`, where a proxy has left it on."""
    if root_path and (path == root_path or path.startswith(root_path + "/")):
        return path[len(root_path) :] or "/"
    return path


class _Outermost:
    """Tells the application the prefix it is reached under, whether or not the proxy strips it, and the server's
    own `send`."""

    def __init__(self, app: ASGIApp, root_path: str) -> None:
        self._app = app
        self._root_path = root_path

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            scope["root_path"] = self._root_path
            scope[BARE_SEND] = send
        await self._app(scope, receive, send)
