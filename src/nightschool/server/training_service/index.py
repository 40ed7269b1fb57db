"""What this server is and whether it answers (row 001-29)."""

from __future__ import annotations

import torch
from fastapi import APIRouter
from fastapi.responses import JSONResponse, Response

from nightschool import __version__
from nightschool.server.error_schemas import refusals
from nightschool.server.service import ServiceOf
from nightschool.server.training_service.schemas import Health, Index

router = APIRouter(tags=["Training service"])

_ENDPOINTS = {
    "health": "/api/v1/health",
    "training": "/api/v1/training",
    "generate": "/api/v1/generate",
    "models": "/api/v1/models",
    "openai": "/v1",
    "docs": "/docs",
}


@router.get("/api/v1/health", response_model=Health)
async def health(service: ServiceOf) -> Response:
    """Whether the process answers, what it could compute on, and how many models are loaded. Needs no key."""
    loaded = sum(slot.current is not None for slot in service.names)
    count = torch.cuda.device_count()
    return JSONResponse(
        {"status": "healthy", "cuda_available": count > 0, "cuda_device_count": count, "loaded_models": loaded}
    )


@router.get("/", response_model=Index, responses=refusals())
async def index() -> Response:
    """What this server is, and where things are."""
    return JSONResponse({"service": "nightschool", "version": __version__, "endpoints": _ENDPOINTS})
