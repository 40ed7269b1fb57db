"""What a model is worth: its perplexity and its answers beside those of its base and of the version before (row 001-22)."""

from __future__ import annotations

import anyio.to_thread
from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response

from nightschool.errors import NotFound
from nightschool.server.body_route import BodyRoute
from nightschool.server.error_schemas import refusals
from nightschool.server.errors import Refusal
from nightschool.server.generation import while_connected
from nightschool.server.service import PrincipalOf, shown_path
from nightschool.server.training_service.organisation import asker_for, shown_base, version_of
from nightschool.server.training_service.parts import TrainingOf
from nightschool.server.training_service.schemas import Evaluated, EvaluateRequest
from nightschool.server.training_service.status import gate_of

router = APIRouter(prefix="/api/v1/training", tags=["Training service"], route_class=BodyRoute)


@router.post("/evaluate", response_model=Evaluated, responses=refusals(400, 404, 408, 413, 422, 429, 500))
async def evaluate(body: EvaluateRequest, training: TrainingOf, principal: PrincipalOf, request: Request) -> Response:
    """Take the perplexity of a model on what its job held out, and ask it the test prompts, greedily.

    The same is asked of its base and of the version that was served before it. The gate's verdict stands beside it.
    """
    asker_for(body.org_id, principal)
    try:
        version = await anyio.to_thread.run_sync(version_of, training, body.org_id, body.model_id)
    except NotFound:
        raise Refusal(404, "No models found", "not_found", param="model_id") from None
    told = {
        "prompts": [prompt.model_dump(exclude_none=True) for prompt in body.test_prompts or ()],
        "max_new_tokens": training.settings.max_new_tokens,
    }
    gate = await anyio.to_thread.run_sync(gate_of, training, version)
    previous = gate["compared_with"] if gate is not None and not gate["is_base"] else None
    arguments = ["--home", str(training.home.path), "--version", version.ref]
    arguments += ["--previous", previous] if previous else []
    working = training.children.run("evaluate", *arguments, home=training.home, told=told, cwd=training.home.path)
    metrics = await while_connected(request.receive, working)
    for other in metrics["compared_with"].values():
        other["model"] = shown_base(other["model"])
    return JSONResponse({"model_path": shown_path(version), "metrics": {**metrics, "gate": gate}})
