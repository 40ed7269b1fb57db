"""What people think of answers, so that the next night can study it."""

from __future__ import annotations

from typing import Annotated, Literal

from fastapi import APIRouter, Query
from fastapi.responses import JSONResponse, Response
from pydantic import BaseModel, Field

from nightschool.server.bodies import Body
from nightschool.server.body_route import BodyRoute
from nightschool.server.error_schemas import problems
from nightschool.server.middleware.auth import check_scope
from nightschool.server.middleware.route_rules import Rule
from nightschool.server.service import OwnerOf, PrincipalOf, ServiceOf

router = APIRouter(prefix="/api", tags=["Feedback"], route_class=BodyRoute)


class Feedback(Body):
    """A rating of an answer, what it should have been, or both."""

    request_id: str = Field(
        ..., min_length=1, max_length=200, description="`id` of a completion, or the header x-request-id."
    )
    rating: Literal["good", "bad"] | None = Field(
        None, description="Was the answer good? Not needed beside a correction."
    )
    correction: str | None = Field(
        None, min_length=1, max_length=100_000, description="The right answer, which a later night learns."
    )


class FeedbackKept(BaseModel):
    """The feedback was written."""

    request_id: str
    status: Literal["kept"]


class Traces(BaseModel):
    """Where an exchange went."""

    request_id: str
    runs: list[str] = Field(..., description="Runs whose data hold a copy.")
    jobs: list[str] = Field(..., description="Jobs whose data, or what they hold out, hold a copy.")
    files: list[str] = Field(..., description="Uploaded files that hold a copy.")
    memories: list[str] = Field(..., description="Entries of memories that came from it, as `facts/m12`.")
    versions: list[str] = Field(..., description="Versions that learned it, or grew from one that did.")


class Forgotten(Traces):
    """The exchange is gone, with its feedback and its copies; the versions are marked as tainted."""

    status: Literal["forgotten"]
    retrainings: dict[str, str] = Field(
        default_factory=dict, description="With `retrain`: the job that trains each marked name anew."
    )
    not_retrained: dict[str, str] = Field(
        default_factory=dict, description="With `retrain`: why a marked name has no such job."
    )


@router.post("/feedback", response_model=FeedbackKept, responses=problems(400, 404, 408, 409, 413, 422))
async def feedback(body: Feedback, service: ServiceOf, owner: OwnerOf) -> Response:
    """Rate or correct an answer.

    409 if this server keeps no conversations; 404 if it does not know the answer. With keys, only the key that asked
    may say what it thinks of the answer; of the others' it is told 404.
    """
    await service.recorder.feedback(body.request_id, body.rating, body.correction, owner)
    return JSONResponse({"request_id": body.request_id, "status": "kept"})


@router.get("/conversations/{request_id}/traces", response_model=Traces, responses=problems(404, 409))
async def traces(request_id: str, service: ServiceOf, principal: PrincipalOf) -> Response:
    """Which runs, jobs, files, memories and versions contain an exchange: what deleting it would cut and mark."""
    return JSONResponse((await service.recorder.traces(request_id, principal)).to_json())


@router.delete("/conversations/{request_id}", response_model=Forgotten, responses=problems(403, 404, 409, 422))
async def forget(
    request_id: str,
    service: ServiceOf,
    principal: PrincipalOf,
    *,
    retrain: Annotated[
        bool, Query(description="Queue a job for each marked name that trains it without the exchange.")
    ] = False,
) -> Response:
    """Forget one exchange, its feedback, its copies in the data of runs, jobs and files, and the entries of memories that came from it.
    Versions that may know it are tainted.

    With keys, the key that asked may, and one of its tenant with the scope `admin`; with `retrain` it needs the scope `train`,
    too. A copy was selected by the id, or has the same turns one after the other; the latter are found for keys with the scope
    `train` or `admin`. 409 while a run or a job is learning it.
    """
    if retrain:
        check_scope(principal, Rule("train"))
    found, anew = await service.recorder.forget(request_id, principal, anew=retrain)
    return JSONResponse(found.to_json() | {"status": "forgotten"} | (anew.to_json() if anew is not None else {}))
