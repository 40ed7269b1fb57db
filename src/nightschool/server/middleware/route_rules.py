"""What each route asks of a key, and what the audit log calls it: one table, read by the rooms before the app."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from starlette.routing import Match, Route
from starlette.types import Scope

from nightschool.store.principal import Scope as Permission

OTHER = "other"
"""The template of a path that no route has."""


@dataclass(frozen=True)
class Rule:
    """`scope` is what a key must have, None where every key will do. `action` goes to the audit log; None is not noted.

    `operator`: only keys of the default tenant will do, because the answer is about everybody's.
    """

    scope: Permission | None = None
    action: str | None = None
    operator: bool = False


_PERMISSIONS = "/v1/fine_tuning/checkpoints/{fine_tuned_model_checkpoint}/permissions"

# Plain reading needs no row; whatever else has none needs the scope `admin`, and a test asks for its row.
RULES: dict[tuple[str, str], Rule] = {
    ("POST", "/generate"): Rule("infer"),
    ("POST", "/v1/chat/completions"): Rule("infer"),
    ("POST", "/v1/completions"): Rule("infer"),
    ("POST", "/api/feedback"): Rule("feedback"),
    ("GET", "/api/conversations/{request_id}/traces"): Rule("feedback"),
    ("DELETE", "/api/conversations/{request_id}"): Rule("feedback", "conversation.delete"),
    ("GET", "/metrics"): Rule(operator=True),
    ("GET", "/refresh_model"): Rule("admin", "model.refresh"),
    ("POST", "/refresh_model"): Rule("admin", "model.refresh"),
    ("POST", "/api/models/{name}/promote"): Rule("admin", "model.promote"),
    ("POST", "/api/models/{name}/rollback"): Rule("admin", "model.rollback"),
    ("POST", "/api/models/{name}/merge"): Rule("admin", "model.merge"),
    ("GET", "/api/memories"): Rule("memory"),
    ("GET", "/api/memories/{name}"): Rule("memory"),
    ("GET", "/api/memories/{name}/entries"): Rule("memory"),
    ("GET", "/api/memories/{name}/search"): Rule("memory"),
    ("GET", "/api/memories/{name}/entries/{entry}"): Rule("memory"),
    ("GET", "/api/memories/{name}/entries/{entry}/history"): Rule("memory"),
    ("GET", "/api/memories/{name}/revisions"): Rule("memory"),
    ("GET", "/api/memories/{name}/versions"): Rule("memory"),
    ("GET", "/api/memories/{name}/diff"): Rule("memory"),
    ("GET", "/api/memories/{name}/conflicts"): Rule("memory"),
    ("GET", "/api/memories/{name}/relations"): Rule("memory"),
    ("POST", "/api/memories/{name}/check"): Rule("memory"),
    ("POST", "/api/memories"): Rule("memory", "memory.create"),
    ("POST", "/api/memories/{name}/undo"): Rule("memory", "memory.undo"),
    ("POST", "/api/memories/{name}/rollback"): Rule("memory", "memory.rollback"),
    ("POST", "/api/memories/{name}/versions"): Rule("memory", "memory.name_version"),
    ("DELETE", "/api/memories/{name}/versions/{version}"): Rule("memory", "memory.remove_version"),
    ("POST", "/api/memories/{name}/conflicts/resolve"): Rule("memory", "memory.resolve"),
    ("POST", "/api/memories/{name}/relations"): Rule("memory", "memory.set_relation"),
    ("POST", "/api/memories/{name}/entries"): Rule("memory", "memory.add"),
    ("PATCH", "/api/memories/{name}/entries/{entry}"): Rule("memory", "memory.edit"),
    ("DELETE", "/api/memories/{name}/entries/{entry}"): Rule("memory", "memory.remove"),
    ("POST", "/mcp/{name}"): Rule("memory", "memory.mcp"),
    ("GET", "/mem0/{name}/v1/ping/"): Rule("memory"),
    ("POST", "/mem0/{name}/v3/memories/"): Rule("memory"),
    ("POST", "/mem0/{name}/v3/memories/search/"): Rule("memory"),
    ("GET", "/mem0/{name}/v1/memories/{memory_id}/"): Rule("memory"),
    ("GET", "/mem0/{name}/v1/memories/{memory_id}/history/"): Rule("memory"),
    ("POST", "/mem0/{name}/v3/memories/add/"): Rule("memory", "memory.add"),
    ("PUT", "/mem0/{name}/v1/memories/{memory_id}/"): Rule("memory", "memory.edit"),
    ("DELETE", "/mem0/{name}/v1/memories/{memory_id}/"): Rule("memory", "memory.remove"),
    ("DELETE", "/mem0/{name}/v1/memories/"): Rule("memory", "memory.remove"),
    ("POST", "/api/v1/generate"): Rule("infer"),
    ("POST", "/api/v1/models/load"): Rule("infer", "model.load"),
    ("POST", "/api/v1/models/unload"): Rule("infer", "model.unload"),
    ("POST", "/api/v1/training/start"): Rule("train", "job.start"),
    ("POST", "/api/v1/training/preview"): Rule("train"),
    ("POST", "/api/v1/training/evaluate"): Rule("train"),
    ("DELETE", "/api/v1/training/jobs/{training_id}"): Rule("train", "job.cancel"),
    ("POST", "/v1/files"): Rule("train", "file.upload"),
    ("GET", "/v1/files"): Rule("train"),
    ("GET", "/v1/files/{file_id}"): Rule("train"),
    ("GET", "/v1/files/{file_id}/content"): Rule("train"),
    ("DELETE", "/v1/files/{file_id}"): Rule("train", "file.delete"),
    ("GET", "/v1/webhook_endpoints"): Rule("admin"),
    ("POST", "/v1/webhook_endpoints"): Rule("admin", "webhook.create"),
    ("GET", "/v1/webhook_endpoints/{endpoint_id}"): Rule("admin"),
    ("POST", "/v1/webhook_endpoints/{endpoint_id}"): Rule("admin", "webhook.change"),
    ("DELETE", "/v1/webhook_endpoints/{endpoint_id}"): Rule("admin", "webhook.delete"),
    ("POST", "/v1/webhook_endpoints/{endpoint_id}/rotate_secret"): Rule("admin", "webhook.rotate_secret"),
    ("POST", "/v1/webhook_endpoints/{endpoint_id}/test"): Rule("admin", "webhook.test"),
    ("GET", _PERMISSIONS): Rule("admin"),
    ("POST", _PERMISSIONS): Rule("admin", "permission.create"),
    ("DELETE", f"{_PERMISSIONS}/{{permission_id}}"): Rule("admin", "permission.delete"),
    ("POST", "/v1/fine_tuning/jobs"): Rule("train", "job.start"),
    ("GET", "/v1/fine_tuning/jobs"): Rule("train"),
    ("GET", "/v1/fine_tuning/jobs/{job_id}"): Rule("train"),
    ("GET", "/v1/fine_tuning/jobs/{job_id}/events"): Rule("train"),
    ("GET", "/v1/fine_tuning/jobs/{job_id}/checkpoints"): Rule("train"),
    ("POST", "/v1/fine_tuning/jobs/{job_id}/cancel"): Rule("train", "job.cancel"),
    ("POST", "/v1/fine_tuning/jobs/{job_id}/pause"): Rule("train", "job.pause"),
    ("POST", "/v1/fine_tuning/jobs/{job_id}/resume"): Rule("train", "job.resume"),
}


def rule_of(method: str, template: str) -> Rule:
    """The rule of a route. What changes something and has no row of its own is for administrators."""
    found = RULES.get((method, template))
    return found or Rule("admin" if is_change(method, template) else None)


def is_change(method: str, template: str) -> bool:
    """Whether a request may change something, or tell what not every key is told: all but plain reading."""
    return method not in ("GET", "HEAD", "OPTIONS") or (method, template) in RULES


class RouteTable:
    """Finds the route of a request as the app will, so that no spelling of a path is one route here and another there."""

    def __init__(self, routes: Sequence[Route]) -> None:
        self._routes = routes

    def template_of(self, scope: Scope) -> str:
        """Such as `/api/models/{name}`; `OTHER` where no route has the path. Of two, that which takes the method."""
        found = OTHER
        for route in self._routes:
            match, _ = route.matches(scope)
            if match is Match.FULL:
                return route.path
            if match is Match.PARTIAL and found is OTHER:
                found = route.path
        return found
