"""Routes whose bodies are parsed and validated before FastAPI sees them: large ones on a thread, in one pass."""

from __future__ import annotations

import email.message
from collections.abc import Callable, Coroutine
from typing import Any

import anyio.to_thread
import pydantic_core
from fastapi import Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import Response
from fastapi.routing import APIRoute
from pydantic import BaseModel, ValidationError

# Small bodies take less time than handing them to a thread does (measured: 16 kB of the worst take 2 ms).
_INLINE_BYTES = 16_384


class BodyRoute(APIRoute):
    """A route that keeps the event loop free of its body.

    FastAPI would parse and validate on the loop: two megabytes of wrong token ids took ten seconds there
    (benchmarks/hostile_bodies.py).
    """

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handle = super().get_route_handler()
        if self.body_field is None:
            return handle
        model: type[BaseModel] = self.body_field.field_info.annotation  # type: ignore[assignment]

        async def handle_validated(request: Request) -> Response:
            body = await request.body()
            if not body or not _is_json(request.headers.get("content-type", "")):
                return await handle(request)
            if len(body) <= _INLINE_BYTES:
                value = parse_body(model, body)
            else:
                value = await anyio.to_thread.run_sync(parse_body, model, body)
            return await handle(_Validated(request, value))

        return handle_validated


class _Validated(Request):
    """A request whose JSON is the finished value, which FastAPI takes as it is."""

    def __init__(self, request: Request, value: BaseModel) -> None:
        super().__init__(request.scope, request.receive)
        self._value = value

    async def body(self) -> bytes:
        return b"{}"

    async def json(self) -> BaseModel:
        return self._value


def parse_body(model: type[BaseModel], body: bytes) -> BaseModel:
    """The value of a JSON body.

    Lone surrogates, NaN, and more than 200 levels are no JSON here: nothing behind could print, compute or walk them.

    Raises:
        RequestValidationError: If it is no JSON, or not of the model. What was sent is not part of it.
    """
    try:
        value = pydantic_core.from_json(body, allow_inf_nan=False, cache_strings="keys")
    except ValueError as error:
        raise RequestValidationError(
            [{"type": "json_invalid", "loc": ("body",), "msg": f"The body is not valid JSON: {error}."}]
        ) from None
    try:
        return model.model_validate(value)
    except ValidationError as error:
        problems = error.errors(include_url=False, include_input=False, include_context=False)
        raise RequestValidationError([{**problem, "loc": ("body", *problem["loc"])} for problem in problems]) from None


def _is_json(content_type: str) -> bool:
    message = email.message.Message()
    message["content-type"] = content_type
    subtype = message.get_content_subtype()
    return message.get_content_maintype() == "application" and (subtype == "json" or subtype.endswith("+json"))
