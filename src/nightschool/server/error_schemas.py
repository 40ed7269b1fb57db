"""What the OpenAPI document says about errors."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, Field

_WHEN = {
    400: "The request cannot be answered as it is: no JSON, or prompt and answer do not fit the context.",
    401: "There is no API key, or it is not known.",
    403: "A page of another origin, or another host name, sent this.",
    404: "It is not there.",
    405: "This method is not allowed here.",
    406: "The client accepts no JSON.",
    408: "The body did not arrive in time.",
    409: "The present state forbids it.",
    413: "The body is larger than what is accepted.",
    422: "A field is missing, unknown or out of bounds.",
    429: "Too many requests wait, or came from this caller; `Retry-After` says when to come again.",
    500: "It failed; the message says why.",
    501: "It takes a package that is not installed on the server.",
    503: "No model is loaded.",
    507: "The disk is full.",
}


class Detail(BaseModel):
    """An error of the parametric-memory API."""

    detail: str


class FieldProblem(BaseModel):
    """What is wrong with one field. What was sent is not repeated."""

    loc: list[str | int]
    msg: str
    type: str


class FieldProblems(BaseModel):
    """All problems of one body."""

    detail: list[FieldProblem] | str


class OpenAIErrorObject(BaseModel):
    """The error as OpenAI's clients read it."""

    message: str
    type: str
    param: str | None
    code: str | None


class OpenAIError(BaseModel):
    """An error of the OpenAI-compatible routes."""

    error: OpenAIErrorObject


class JsonRpcErrorObject(BaseModel):
    """The error as clients of the Model Context Protocol show it."""

    code: int
    message: str
    data: Any = None


class JsonRpcError(BaseModel):
    """An error of the Model Context Protocol's route."""

    jsonrpc: Literal["2.0"]
    id: int | str | None
    error: JsonRpcErrorObject


class Problem(BaseModel):
    """RFC 9457."""

    type: str
    title: str
    status: int
    detail: str
    code: str
    param: str | None = Field(None, description="The field that is meant.")


def refusals(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """Error responses in the spelling of the parametric-memory API."""
    models: dict[int, type[BaseModel]] = {422: FieldProblems}
    return {s: {"description": _WHEN[s], "model": models.get(s, Detail)} for s in _with_common(statuses)}


def openai_refusals(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """Error responses in OpenAI's spelling."""
    return {status: {"description": _WHEN[status], "model": OpenAIError} for status in _with_common(statuses)}


def json_rpc_refusals(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """Error responses as JSON-RPC."""
    return {status: {"description": _WHEN[status], "model": JsonRpcError} for status in _with_common(statuses)}


def problems(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """Error responses as problem documents."""
    schema = {"schema": {"$ref": "#/components/schemas/Problem"}}
    return {
        status: {"description": _WHEN[status], "content": {"application/problem+json": schema}}
        for status in _with_common(statuses)
    }


def _with_common(statuses: tuple[int, ...]) -> list[int]:
    return sorted({401, 403, 429, *statuses})
