"""Whose an `org_id` is, and which of its models a `model_id` means."""

from __future__ import annotations

from dataclasses import replace
from pathlib import PurePath
from typing import Any

from nightschool.errors import NameRefused, NotFound
from nightschool.server.errors import Refusal
from nightschool.server.service import published_at, shown_path
from nightschool.server.training_service.parts import TrainingService
from nightschool.store.names import check_name, full_name
from nightschool.store.principal import Principal
from nightschool.store.versions import Version

MODEL_NAME = "assistant"
"""Every organisation has one model; its full name is `org/assistant`."""
LATEST = "latest"


def asker_for(org_id: str, principal: Principal) -> Principal:
    """Who asks for an organisation. Without keys whoever asks may name any; a key is one organisation's.

    Raises:
        NameRefused: If the id may not become a tenant.
        Refusal: 403 if the key is another organisation's. It says nothing about whether the other one exists.
    """
    check_name(org_id, what="org_id")
    if principal.key is not None and org_id != principal.tenant:
        raise Refusal(
            403,
            f"This API key belongs to the organisation {principal.tenant!r}, and the request names {org_id!r}. "
            "Name your own, or send its key.",
            "other_organisation",
            param="org_id",
        )
    return replace(principal, tenant=org_id)


def name_of(org_id: str) -> str:
    """The name under which an organisation's versions are published and served."""
    return full_name(org_id, MODEL_NAME)


def version_of(training: TrainingService, org_id: str, model_id: str) -> Version:
    """The version that `latest`, a training id or the id of a version means.

    Raises:
        NotFound: If the organisation has no such model.
    """
    registry, name = training.registry, name_of(org_id)
    if model_id == LATEST:
        return registry.resolve(name)
    if model_id.startswith("train_"):
        candidate = training.queue.get(model_id, tenant=org_id).candidate
        if candidate is None:
            raise NotFound(f"The job {model_id} has made no model.")
        return registry.resolve(candidate)
    try:
        return registry.resolve(f"{name}@{model_id}")
    except NameRefused as error:
        raise NotFound(str(error)) from None


def metadata_of(version: Version, training_id: str | None = None) -> dict[str, Any]:
    """What is told about a version: where it comes from, and the job that made it."""
    facts = version.facts.model_dump(
        mode="json", exclude={"name", "probes", "source_digest", "recipe_digest", "data_fingerprint"}
    )
    parent = facts.pop("parent")
    return {
        "base_model": shown_base(facts.pop("base")),
        **facts,
        "parent": parent and shown_base(parent),
        "training_id": training_id,
    }


def shown_base(base: str) -> str:
    """A base without the folders above it: where they lie on this machine is nobody's business over HTTP."""
    return PurePath(base).name if PurePath(base).is_absolute() else base


def described(version: Version, org_id: str, *, training_id: str | None, loaded: bool) -> dict[str, Any]:
    """`ModelDescription` of a version."""
    return {
        "org_id": org_id,
        "model_path": shown_path(version),
        "metadata": metadata_of(version, training_id),
        "loaded": loaded,
    }


def training_ids(training: TrainingService, org_id: str) -> dict[str, str]:
    """The job that made each version of an organisation, by the version's reference."""
    return {job.candidate: job.id for job in training.queue.ls(tenant=org_id) if job.candidate is not None}


def created_at(version: Version) -> float:
    """When a version was published, in seconds since 1970."""
    return published_at(version).timestamp()
