"""`/v1/files`: training data on its way in, and the figures of jobs on their way out."""

from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor
from typing import Annotated, Any, Literal

import anyio.to_thread
from fastapi import APIRouter, Query, Request
from fastapi.responses import FileResponse, JSONResponse, Response
from pydantic import BaseModel, Field

from nightschool.data.sources.jsonl_check import check_jsonl
from nightschool.errors import DataError
from nightschool.server.error_schemas import openai_refusals
from nightschool.server.errors import Refusal
from nightschool.server.openai.multipart import FileForm
from nightschool.server.openai.pages import After, page
from nightschool.server.service import PrincipalOf, Service, ServiceOf, home_of_service
from nightschool.store.files import Arrival, FileStore, Purpose, StoredFile
from nightschool.store.principal import Principal

router = APIRouter(prefix="/v1/files", tags=["OpenAI-compatible"])
UPLOAD_PATH = "/v1/files"
PURPOSE: Purpose = "fine-tune"
FORMATS = ("messages", "prompt_completion", "preference")
_PIECE_BYTES = 1 << 20
# Reading a file keeps a core busy, and nobody is helped by several at once.
_CHECKS = ThreadPoolExecutor(1, thread_name_prefix="check-file")
_FORM = {
    "content": {
        "multipart/form-data": {
            "schema": {
                "type": "object",
                "required": ["file", "purpose"],
                "properties": {
                    "file": {"type": "string", "format": "binary", "description": "JSON Lines, one example a line."},
                    "purpose": {"enum": [PURPOSE], "description": "What it is for."},
                },
            }
        }
    },
    "required": True,
}


class FileObject(BaseModel):
    """A file that was uploaded, or that a job made."""

    id: str
    object: Literal["file"]
    bytes: int
    created_at: int = Field(..., description="Seconds since 1970.")
    filename: str
    purpose: Purpose
    status: Literal["processed"] = Field(..., description="What is here was checked when it came.")
    status_details: None = None
    expires_at: None = Field(None, description="Files stay until they are deleted.")


class FileList(BaseModel):
    """Files, newest first."""

    object: Literal["list"]
    data: list[FileObject]
    first_id: str | None
    last_id: str | None
    has_more: bool


class FileDeleted(BaseModel):
    """It is not there any more."""

    id: str
    object: Literal["file"]
    deleted: Literal[True]


@router.post(
    "", response_model=FileObject, responses=openai_refusals(400, 408, 413), openapi_extra={"requestBody": _FORM}
)
async def upload(request: Request, service: ServiceOf, principal: PrincipalOf) -> Response:
    """Take in a file to train on. Every line is read as training will read it; the error names the first wrong ones."""
    store = _store(service, principal)
    receiving = store.receive()
    arrival = await anyio.to_thread.run_sync(receiving.__enter__)
    try:
        await _take_in(request, arrival)
    except BaseException as error:
        with anyio.CancelScope(shield=True):
            await anyio.to_thread.run_sync(receiving.__exit__, type(error), error, error.__traceback__)
        raise
    await anyio.to_thread.run_sync(receiving.__exit__, None, None, None)
    return JSONResponse(shown(await anyio.to_thread.run_sync(store.get, arrival.id)))


@router.get("", response_model=FileList, responses=openai_refusals(400))
async def files(
    service: ServiceOf,
    principal: PrincipalOf,
    purpose: Annotated[str | None, Query(max_length=64, description="Only files for this.")] = None,
    limit: Annotated[int, Query(ge=1, le=10_000, description="Most files on a page.")] = 10_000,
    order: Annotated[Literal["asc", "desc"], Query(description="By the time of their upload.")] = "desc",
    after: After = None,
) -> Response:
    """All files, newest first."""
    found = await anyio.to_thread.run_sync(_store(service, principal).ls)
    rows = [file for file in found if purpose in (None, file.purpose)]
    return page(rows if order == "desc" else rows[::-1], shown, after=after, limit=limit)


@router.get("/{file_id}", response_model=FileObject, responses=openai_refusals(404))
async def file(file_id: str, service: ServiceOf, principal: PrincipalOf) -> Response:
    """One file."""
    return JSONResponse(shown(await anyio.to_thread.run_sync(_store(service, principal).get, file_id)))


@router.get(
    "/{file_id}/content",
    response_class=FileResponse,
    responses={**openai_refusals(404), 200: {"content": {"application/octet-stream": {}}}},
)
async def content(file_id: str, service: ServiceOf, principal: PrincipalOf) -> Response:
    """The bytes of a file: as they were sent, or the figures of a job as CSV."""
    found = await anyio.to_thread.run_sync(_store(service, principal).get, file_id)
    media_type = "application/jsonl" if found.purpose == PURPOSE else "text/csv; charset=utf-8"
    return FileResponse(found.path, filename=found.filename, media_type=media_type)


@router.delete("/{file_id}", response_model=FileDeleted, responses=openai_refusals(404))
async def delete(file_id: str, service: ServiceOf, principal: PrincipalOf) -> Response:
    """Delete a file. A job that was begun with it keeps its own copy until it is gone."""
    await anyio.to_thread.run_sync(_store(service, principal).delete, file_id)
    return JSONResponse({"id": file_id, "object": "file", "deleted": True})


def shown(file: StoredFile) -> dict[str, Any]:
    """A file as `FileObject`."""
    return {
        "id": file.id,
        "object": "file",
        "bytes": file.size_bytes,
        "created_at": int(file.created_at.timestamp()),
        "filename": file.filename,
        "purpose": file.purpose,
        "status": "processed",
        "status_details": None,
        "expires_at": None,
    }


async def _take_in(request: Request, arrival: Arrival) -> None:
    """Write the file of a form to the disk as it arrives, then read it as training will."""
    with arrival.path.open("wb") as sink:
        form = FileForm(request.headers.get("content-type", ""), sink)
        piece = bytearray()
        async for chunk in request.stream():
            piece += chunk
            if len(piece) >= _PIECE_BYTES:
                await anyio.to_thread.run_sync(form.feed, bytes(piece))
                piece.clear()
        await anyio.to_thread.run_sync(form.feed, bytes(piece))
    filename = form.finish()
    _check_fields(form.fields)
    try:
        summary = await asyncio.get_running_loop().run_in_executor(
            _CHECKS, check_jsonl, arrival.path, filename, FORMATS
        )
    except DataError as error:
        raise Refusal(400, f"The file cannot be trained on. {error}", "invalid_file", param="file") from None
    arrival.finish(filename=filename, format=summary.format, num_examples=summary.num_examples)


def _check_fields(fields: dict[str, str]) -> None:
    unknown = sorted(set(fields) - {"purpose"})
    if unknown:
        raise Refusal(
            400,
            f"{unknown[0][:100]}: there is no such parameter here; files stay until they are deleted. Leave it out.",
            "unknown_parameter",
            param=unknown[0][:100],
        )
    purpose = fields.get("purpose")
    if purpose is None:
        raise Refusal(400, f"purpose is missing. Send {PURPOSE!r}.", "missing_required_parameter", param="purpose")
    if purpose != PURPOSE:
        message = f"purpose is {purpose[:100]!r}, and this server takes files to train on: send {PURPOSE!r}."
        raise Refusal(400, message, "invalid_value", param="purpose")


def _store(service: Service, principal: Principal) -> FileStore:
    return FileStore(home_of_service(service), principal.tenant)
