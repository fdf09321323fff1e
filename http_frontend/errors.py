"""Refusals: the error shapes A to D of the contract (§2.2). Shape E is the application's own (app.py)."""

from __future__ import annotations

from typing import Any, Literal

import msgspec
from starlette.responses import Response

Shape = Literal["A", "B", "C", "D"]

_KINDS = {400: "BadRequestError", 500: "InternalServerError", 501: "NotImplementedError"}


class RefusedError(Exception):
    """A request that is answered with an error.

    shape: which of the contract's bodies. kind: the `type` of shape D; by default the status decides.
    """

    def __init__(self, shape: Shape, message: str, status: int = 400, kind: str | None = None) -> None:
        super().__init__(message)
        self.shape = shape
        self.message = message
        self.status = status
        self.kind = kind


def invalid(message: str) -> RefusedError:
    """Shape A: understood, but invalid."""
    return RefusedError("A", message)


def unreadable(message: str) -> RefusedError:
    """Shape C: a body or query that cannot be parsed."""
    return RefusedError("C", message)


def error_body(refused: RefusedError) -> dict[str, Any]:
    """The JSON body of a refusal."""
    match refused.shape:
        case "A":
            return {"error": {"message": refused.message}}
        case "B":
            return {"error": refused.message}
        case "C":
            kind = "Bad Request"
        case "D":
            kind = refused.kind or _KINDS.get(refused.status, str(refused.status))
    return {"object": "error", "message": refused.message, "type": kind, "param": None, "code": refused.status}


def error_response(refused: RefusedError) -> Response:
    """The whole answer; 503 carries `Retry-After`."""
    headers = {"Retry-After": "1"} if refused.status == 503 else None
    return json_response(error_body(refused), refused.status, headers)


def json_response(data: Any, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    """`data` as JSON; NaN and infinities, which JSON cannot say, become null."""
    return Response(msgspec.json.encode(data), status, headers, media_type="application/json")


def text_response(text: str, status: int = 200) -> Response:
    """Plain text."""
    return Response(text, status, media_type="text/plain")
