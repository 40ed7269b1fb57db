"""What a client sees when something goes wrong: one table, five spellings.

/v1/…            {"error": {"message", "type", "param", "code"}}      as OpenAI's clients expect
/api/…           application/problem+json                             RFC 9457
/api/v1/…        {"detail": …}                                        as the training service's users know it
/mcp/…           {"jsonrpc", "id": null, "error": {"code", …}}        JSON-RPC, as clients of MCP show it
/mem0/…          {"detail": …}, always in words                       as mem0's client shows it
and all others   {"detail": …}                                        as the parametric-memory API promises
"""

from __future__ import annotations

import difflib
import http
import logging
from collections.abc import Mapping, Sequence
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from starlette.exceptions import HTTPException

from nightschool.errors import Interrupted, NightschoolError, NotLoaded, QueueFull
from nightschool.store.atomic import refusal_of as disk_refusal_of

log = logging.getLogger("nightschool.server")

# Of JSON-RPC 2.0.
_INVALID_REQUEST, _INTERNAL_ERROR = -32600, -32603


class ClientGone(Exception):
    """The client closed its connection before the answer was whole; nobody reads a response."""


class Refusal(Exception):
    """An answer that is an error. `param` names the field of the request that is meant."""

    def __init__(
        self,
        status: int,
        message: str,
        code: str,
        *,
        param: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.code = code
        self.param = param
        self.headers = dict(headers or {})


def model_not_loaded() -> Refusal:
    """The exact text of row 000-37."""
    return Refusal(503, "Model not loaded", "not_loaded", headers={"Retry-After": "5"})


def refusal_of(error: NightschoolError) -> Refusal:
    """The status, code and headers of one of our errors (see `nightschool.errors`)."""
    if isinstance(error, NotLoaded):
        return model_not_loaded()
    headers: dict[str, str] = {}
    if isinstance(error, QueueFull):
        headers["Retry-After"] = str(error.retry_after_seconds)
    elif isinstance(error, Interrupted):
        headers["Retry-After"] = "5"
    return Refusal(error.http_status, str(error), error.code, headers=headers)


def family(path: str) -> str:
    """`openai`, `api`, `mcp`, `mem0` or `plain`: which spelling of errors a path has."""
    if path == "/v1" or path.startswith("/v1/"):
        return "openai"
    if path == "/api" or (path.startswith("/api/") and not path.startswith("/api/v1/")):
        return "api"
    return next((kind for kind in ("mcp", "mem0") if path.startswith(f"/{kind}/")), "plain")


def error_body(path: str, refusal: Refusal) -> tuple[dict[str, Any], str]:
    """The JSON object and the media type of a refusal on that path."""
    kind = family(path)
    if kind == "openai":
        return {"error": openai_error(refusal)}, "application/json"
    if kind == "api":
        problem = {
            "type": f"urn:nightschool:problem:{refusal.code}",
            "title": http.HTTPStatus(refusal.status).phrase,
            "status": refusal.status,
            "detail": refusal.message,
            "code": refusal.code,
        }
        return problem | ({"param": refusal.param} if refusal.param else {}), "application/problem+json"
    if kind == "mcp":
        return {"jsonrpc": "2.0", "id": None, "error": json_rpc_error(refusal)}, "application/json"
    return {"detail": refusal.message}, "application/json"


def json_rpc_error(refusal: Refusal) -> dict[str, Any]:
    """The object under `error`; what our own code is stands in its `data`."""
    code = _INVALID_REQUEST if refusal.status < 500 else _INTERNAL_ERROR
    return {"code": code, "message": refusal.message, "data": {"status": refusal.status, "code": refusal.code}}


def openai_error(refusal: Refusal) -> dict[str, Any]:
    """The object under `error`, with the type that OpenAI gives to the status."""
    types = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}
    kind = types.get(refusal.status, "invalid_request_error" if refusal.status < 500 else "server_error")
    return {"message": refusal.message, "type": kind, "param": refusal.param, "code": refusal.code}


def error_response(path: str, refusal: Refusal) -> Response:
    """A whole response for a refusal on that path."""
    body, media_type = error_body(path, refusal)
    return JSONResponse(body, refusal.status, refusal.headers, media_type)


def install_handlers(app: FastAPI) -> None:
    """Answer every error of every route through the one table above."""
    app.add_exception_handler(Refusal, _on_refusal)
    app.add_exception_handler(NightschoolError, _on_our_error)
    app.add_exception_handler(RequestValidationError, _on_validation)
    app.add_exception_handler(HTTPException, _on_http)
    app.add_exception_handler(OSError, _on_os_error)


async def _on_refusal(request: Request, error: Exception) -> Response:
    assert isinstance(error, Refusal)
    return error_response(request.url.path, error)


async def _on_our_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, NightschoolError)
    refusal = refusal_of(error)
    if refusal.status >= 500:
        log.error("request failed", extra={"facts": {"path": request.url.path, "error": str(error)}})
    return error_response(request.url.path, refusal)


async def _on_os_error(request: Request, error: Exception) -> Response:
    named = disk_refusal_of(error, "the home")
    if named is None:
        raise error
    return await _on_our_error(request, named)


async def _on_http(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    phrase = http.HTTPStatus(error.status_code).phrase
    codes = {404: "not_found", 405: "method_not_allowed", 400: "bad_request"}
    messages = {
        404: f"There is no {request.url.path} here. See /openapi.json for what there is.",
        405: f"{request.method} is not allowed on {request.url.path}. See /openapi.json for what is.",
        400: "The body is not valid JSON in UTF-8. Send a JSON object.",
    }
    message = messages.get(error.status_code, str(error.detail) or phrase)
    code = codes.get(error.status_code, phrase.lower().replace(" ", "_"))
    refusal = Refusal(error.status_code, message, code, headers=error.headers or {})
    return error_response(request.url.path, refusal)


async def _on_validation(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    path = request.url.path
    # What was sent is never echoed: it may be a prompt, or not even be representable in UTF-8.
    details = [
        {"loc": [_printable(part) for part in problem["loc"]], "msg": _sentence(problem), "type": problem["type"]}
        for problem in error.errors()
    ]
    if family(path) == "plain":
        return JSONResponse({"detail": details}, 422)
    message = " ".join(f"{_dotted(detail['loc'])}: {detail['msg']}" for detail in details[:5])
    param = _dotted(details[0]["loc"]) or None
    status = 400 if family(path) in ("openai", "mem0") else 422
    return error_response(path, Refusal(status, message, _code_of(details[0]["type"]), param=param))


def _printable(part: str | int) -> str | int:
    return part if isinstance(part, int) else part.encode("utf-8", "replace").decode()[:200]


def _dotted(location: Sequence[str | int]) -> str:
    return ".".join(str(part) for part in location if part != "body")


def _code_of(problem_type: str) -> str:
    known = {"extra_forbidden": "unknown_parameter", "unsupported_parameter": "unsupported_parameter"}
    return known.get(problem_type, "missing_required_parameter" if problem_type == "missing" else "invalid_value")


def _sentence(problem: Mapping[str, Any]) -> str:
    if problem["type"] == "model_type":
        return "Input should be an object"
    return str(problem["msg"]).removeprefix("Value error, ").encode("utf-8", "replace").decode()


def nearest_name(name: str, known: Sequence[str]) -> str:
    """` Did you mean 'x'?`, or nothing if no known name is near."""
    near = difflib.get_close_matches(name[:100], known, n=1, cutoff=0.6)
    return f" Did you mean {near[0]!r}?" if near else ""
