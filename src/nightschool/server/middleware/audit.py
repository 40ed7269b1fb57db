"""The room that writes into the audit log what was done, as the table of routes names it."""

from __future__ import annotations

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from nightschool.server.access_store import AccessStore
from nightschool.server.middleware.route_rules import rule_of


class Audit:
    """Notes every request that changed something, once it is known that it did, and before its answer goes out.

    What it changed are the parameters of its path, unless its handler says more in `request.state.target`. Where the handler says that
    it changed nothing, in `request.state.changed`, it is not noted.
    """

    def __init__(self, app: ASGIApp, *, access: AccessStore) -> None:
        self._app = app
        self._access = access

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        action = rule_of(scope["method"], scope["state"]["template"]).action if scope["type"] == "http" else None
        if action is None:
            await self._app(scope, receive, send)
            return

        async def noted(message: Message) -> None:
            state = scope["state"]
            if message["type"] == "http.response.start" and message["status"] < 400 and state.get("changed", True):
                named = "/".join(str(value) for value in scope.get("path_params", {}).values())
                await self._access.audit(action, state.get("target", named), state["principal"], state["request_id"])
            await send(message)

        await self._app(scope, receive, noted)
