"""GET /openapi.json: what the routes take and answer, as OpenAPI 3.1. Bodies are described by the very types that they
are decoded into."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from engine import __version__
from engine.config import ServerConfig
from http_frontend import loads
from http_frontend.auth import key_of
from http_frontend.bodies import ABORT, DETOKENIZE, EMBED, EMBEDDINGS, GENERATE, RERANK, SCORE, TOKENIZE
from http_frontend.operation import INTERNAL_STATE, LOGGING, PROFILE, SLOW_DOWN
from http_frontend.weights import CONTINUE, PAUSE, TENSOR, UPDATE, VERSION

Schema = dict[str, Any]

JSON = "application/json"
TEXT = "text/plain"
EVENTS = "text/event-stream"
_REF = "#/components/schemas/{name}"


class BadField(msgspec.Struct):
    """Shape A: understood, but invalid."""

    error: dict[str, Any]


class Mistyped(msgspec.Struct):
    """Shape B: a field of the wrong type; and a call without the key it needs."""

    error: str


class Refused(msgspec.Struct):
    """Shapes C and D."""

    object: str
    message: str
    type: str
    param: str | None
    code: int


class Detail(msgspec.Struct):
    """Shape E: no such page, or not with this method."""

    detail: str


_ERRORS = {
    400: "Refused: the message names the field, the value and the allowed range.",
    401: "The key that this route needs is missing or wrong.",
    404: "There is no such thing.",
    413: "The body is larger than the server accepts (--max-body-bytes).",
    500: "The request has failed inside the server; the log has the details.",
    503: "Overloaded, not ready or leaving: try again after Retry-After seconds.",
}


@dataclass(frozen=True, kw_only=True)
class Page:
    """What a path does, with every method that its route has.

    body: decodes its body; None where it takes none. needed: an empty body is refused. media: types of the 200's body;
    none: it is empty. errors: other answers. plain_errors: those with a body that is plain text.
    bare_errors: those with none.
    """

    summary: str
    body: msgspec.json.Decoder[Any] | None = None
    needed: bool = True
    query: Sequence[Schema] = ()
    media: Sequence[str] = (JSON,)
    errors: Sequence[int] = ()
    plain_errors: Sequence[int] = ()
    bare_errors: Sequence[int] = ()


_READS = (400, 413, 500, 503)


def _query(name: str, schema: Schema, *, required: bool = False) -> Schema:
    return {"name": name, "in": "query", "required": required, "schema": schema}


def _computes(summary: str, body: msgspec.json.Decoder[Any], *media: str) -> Page:
    return Page(summary=summary, body=body, media=media or (JSON,), errors=_READS)


def _commands(
    summary: str, body: msgspec.json.Decoder[Any] | None = None, *media: str, query: Sequence[Schema] = (),
    needed: bool = True, plain_errors: Sequence[int] = (),
) -> Page:  # fmt: skip
    """An administrative route."""
    return Page(
        summary=summary, body=body, media=media, query=query, needed=needed, errors=_READS, plain_errors=plain_errors
    )


_TOKENIZE = _computes("Texts, or messages under the chat template, as token ids.", TOKENIZE)
_DETOKENIZE = _computes("Token ids as text.", DETOKENIZE)
_MODEL_INFO = Page(summary="What is served.")
_SERVER_INFO = Page(summary="Every flag, the limits, and the state of the scheduler.", errors=(500, 503))
_UPDATE = _commands("Replace the weights by those of another checkpoint.", UPDATE, JSON)
_LOADS = Page(
    summary="How busy the server is.",
    media=(JSON, TEXT),
    errors=(400, 500, 503),
    query=[
        _query("include", {"type": "string", "description": "comma-separated: " + ", ".join(loads.SECTIONS)}),
        _query("format", {"enum": list(loads.FORMATS)}),
        _query("dp_rank", {"const": 0}),
    ],
)
_HEALTH = Page(summary="Whether the scheduler makes progress.", media=(), bare_errors=(503,))

PAGES = {
    "/": Page(summary="Says that the server runs."),
    "/openapi.json": Page(summary="This document."),
    "/generate": _computes("Generate from a text or token ids; in one piece or as a stream.", GENERATE, JSON, EVENTS),
    "/encode": _computes("The model's vectors of texts.", EMBED),
    "/classify": _computes("The scores of a model with a head.", EMBED),
    "/v1/embeddings": _computes("The model's vectors, in the shape of OpenAI.", EMBEDDINGS),
    "/v1/rerank": _computes("How well documents fit a query.", RERANK),
    "/v1/score": _computes("How likely tokens are behind query and item.", SCORE),
    "/tokenize": _TOKENIZE,
    "/v1/tokenize": _TOKENIZE,
    "/detokenize": _DETOKENIZE,
    "/v1/detokenize": _DETOKENIZE,
    "/health": _HEALTH,
    "/health_generate": _HEALTH,
    "/ready": Page(summary="Whether generation is possible now.", media=(), bare_errors=(503,)),
    "/ping": Page(summary="Whether the processes are up.", media=(), bare_errors=(503,)),
    "/v1/models": Page(summary="The models that are served: one."),
    "/v1/models/{id}": Page(summary="The model of this name.", errors=(404,)),
    "/model_info": _MODEL_INFO,
    "/get_model_info": _MODEL_INFO,
    "/server_info": _SERVER_INFO,
    "/get_server_info": _SERVER_INFO,
    "/v1/loads": _LOADS,
    "/get_load": Page(summary="How busy the server is, in the form that sglang-router reads.", errors=(500, 503)),
    "/metrics": Page(
        summary="Counts and times for Prometheus.",
        media=(TEXT, "application/openmetrics-text"),
        errors=(500, 503),
    ),
    "/flush_cache": _commands(
        "Empty the prefix cache.", None, TEXT, plain_errors=(400,),
        query=[_query("timeout", {"type": "number", "minimum": 0, "description": "seconds to wait until idle"})],
    ),
    "/abort_request": _commands("End requests.", ABORT),
    "/update_weights_from_disk": _UPDATE,
    "/update_weights": _UPDATE,
    "/update_weight_version": _commands("Call the weights that serve by another version.", VERSION, JSON),
    "/get_weights_by_name": _commands("The first rows of a tensor.", TENSOR, JSON),
    "/pause_generation": _commands("Compute nothing until continue_generation.", PAUSE, JSON),
    "/continue_generation": _commands("Go on after a pause.", CONTINUE, JSON),
    "/configure_logging": _commands("Log level and the logging of requests.", LOGGING),
    "/start_profile": _commands("Record where the time of steps goes.", PROFILE, TEXT, needed=False),
    "/stop_profile": _commands("Write what was recorded.", None, TEXT),
    "/freeze_gc": _commands("Leave what lives now alone when garbage is collected.", None, TEXT),
    "/slow_down": _commands("Sleep before each step.", SLOW_DOWN, JSON),
    "/set_internal_state": _commands("Accepted for the sake of clients; changes nothing.", INTERNAL_STATE, JSON),
    "/set_trace_level": _commands(
        "Accepted for the sake of clients; changes nothing.", None, TEXT,
        query=[_query("level", {"type": "integer"}, required=True)],
    ),
    "/start_expert_distribution_record": _commands("Record which experts are chosen.", None, TEXT),
    "/stop_expert_distribution_record": _commands("Stop recording which experts are chosen.", None, TEXT),
    "/dump_expert_distribution_record": _commands("Write to a file which experts were chosen.", None, TEXT),
}  # fmt: skip
"""By path, in the document's spelling."""


class Document:
    """The handler. The document is made when it is first asked for."""

    def __init__(self, server: ServerConfig, routes: Callable[[], Sequence[Route]]) -> None:
        self._server = server
        self._routes = routes
        self._body = b""

    async def page(self, _request: Request) -> Response:
        if not self._body:
            self._body = msgspec.json.encode(describe(self._routes(), self._server))
        return Response(self._body, media_type=JSON)


def describe(routes: Sequence[Route], server: ServerConfig) -> Schema:
    """The document. Raises KeyError for a route that has no page."""
    decoders = {id(page.body): page.body for page in PAGES.values() if page.body is not None}
    kinds: list[Any] = [decoder.type for decoder in decoders.values()]
    schemas, components = msgspec.json.schema_components(
        [*kinds, BadField, Mistyped, Refused, Detail], ref_template=_REF
    )
    bodies = dict(zip(decoders, schemas, strict=False))
    paths: Schema = {}
    for route in routes:
        path = re.sub(r"\{(\w+):\w+\}", r"{\1}", route.path)
        page = PAGES[path]
        security = _security(route.path, server)
        paths[path] = {
            method.lower(): _operation(path, method, page, bodies, security) for method in sorted(route.methods or ())
        }
    document: Schema = {
        "openapi": "3.1.0",
        "info": {"title": "Tokenmill", "version": __version__},
        "paths": paths,
        "components": {"schemas": components},
    }
    if root := server.fastapi_root_path.rstrip("/"):
        document["servers"] = [{"url": root}]
    schemes = {name: {"type": "http", "scheme": "bearer"} for name in _schemes(server)}
    if schemes:
        document["components"]["securitySchemes"] = schemes
    return document


def _operation(path: str, method: str, page: Page, bodies: dict[int, Schema], security: list[str]) -> Schema:
    words = re.sub(r"\W+", "_", path).strip("_") or "root"
    operation: Schema = {"operationId": f"{method.lower()}_{words}", "summary": page.summary}
    parameters = [*page.query, *_path_parameters(path)]
    if parameters:
        operation["parameters"] = parameters
    if page.body is not None:
        content = {JSON: {"schema": bodies[id(page.body)]}}
        operation["requestBody"] = {"required": page.needed, "content": content}
    media = () if method == "HEAD" else page.media
    answers = {"200": _answer("Done." if not media else "The answer.", {kind: {} for kind in media})}
    statuses = {*page.errors, *page.plain_errors, *page.bare_errors} | ({401} if security else set())
    if method in ("GET", "HEAD"):
        statuses -= {413}
    for status in sorted(statuses):
        content = {} if status in page.bare_errors else {JSON: {"schema": _error(status)}}
        if status in page.plain_errors:
            content[TEXT] = {}
        answers[str(status)] = _answer(_ERRORS[status], content)
    operation["responses"] = answers
    if security:
        operation["security"] = [{name: []} for name in security]
    return operation


def _path_parameters(path: str) -> list[Schema]:
    return [
        {"name": name, "in": "path", "required": True, "schema": {"type": "string"}}
        for name in re.findall(r"\{(\w+)\}", path)
    ]


def _answer(description: str, content: Schema) -> Schema:
    return {"description": description, "content": content} if content else {"description": description}


def _error(status: int) -> Schema:
    shapes = ["Mistyped"] if status == 401 else ["BadField", "Mistyped", "Refused", "Detail"]
    if status == 404:
        shapes = ["BadField", "Detail"]
    refs = [{"$ref": _REF.format(name=name)} for name in shapes]
    return refs[0] if len(refs) == 1 else {"anyOf": refs}


def _schemes(server: ServerConfig) -> dict[str, str]:
    """Names of the keys that are configured → the keys."""
    keys = {"AdminKey": server.admin_api_key, "ApiKey": server.api_key}
    return {name: key for name, key in keys.items() if key is not None}


def _security(path: str, server: ServerConfig) -> list[str]:
    """Which of them opens `path`; empty: it is open."""
    needed = key_of(path, server.api_key, server.admin_api_key)
    return [name for name, key in _schemes(server).items() if key == needed][:1]
