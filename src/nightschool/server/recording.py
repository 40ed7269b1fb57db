"""Keeping conversations for the next night: off the event loop, in order, and only if it was asked for."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

from nightschool.engine.memory_lookup import forget_entries
from nightschool.feedback.conversations import ConversationStore, Rating
from nightschool.feedback.erasure import Traces
from nightschool.feedback.retraining import Retraining, retrain
from nightschool.memory.forgetting import forget_conversation, traces_with_entries
from nightschool.server.errors import Refusal
from nightschool.server.memories.access import author_of
from nightschool.server.metrics import Metrics
from nightschool.store.principal import Principal

log = logging.getLogger("nightschool.server.recording")
Result = TypeVar("Result")
_MOST_PENDING = 1000


@dataclass(frozen=True)
class Exchange:
    """One answered request: what was asked, by whom (`owner`, None without keys), by which version it was answered."""

    request_id: str
    model: str
    version: str
    messages: Sequence[dict[str, str]]
    answer: str
    owner: str | None


class Recorder:
    """One thread writes, so that feedback on an answer always finds the answer written before it."""

    def __init__(self, conversations: ConversationStore | None, metrics: Metrics) -> None:
        self._conversations = conversations
        self._metrics = metrics
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="recording")
        self._room = threading.BoundedSemaphore(_MOST_PENDING)

    @property
    def on(self) -> bool:
        """Whether conversations are kept."""
        return self._conversations is not None

    def keep(self, exchange: Exchange) -> None:
        """Write an exchange soon. A full disk or a slow one costs the recording, never the answer."""
        if self._conversations is None:
            return
        if not self._room.acquire(blocking=False):
            self._lost(exchange.request_id, f"{_MOST_PENDING} exchanges wait to be written")
            return
        self._thread.submit(self._write, self._conversations, exchange)

    def _write(self, conversations: ConversationStore, exchange: Exchange) -> None:
        try:
            conversations.record(
                exchange.request_id,
                exchange.model,
                exchange.version,
                list(exchange.messages),
                exchange.answer,
                exchange.owner,
            )
            self._metrics.recordings.labels("kept").inc()
        except Exception as error:  # the answer is out; what is lost is counted and logged
            self._lost(exchange.request_id, str(error))
        finally:
            self._room.release()

    def _lost(self, request_id: str, why: str) -> None:
        self._metrics.recordings.labels("lost").inc()
        log.error("a conversation was not kept", extra={"facts": {"conversation": request_id, "error": why}})

    async def feedback(self, request_id: str, rating: Rating | None, correction: str | None, owner: str | None) -> None:
        """Mark an answer.

        Raises:
            NotFound: If no answer with that request id was kept, or another owner has it.
            Refusal: If conversations are not kept at all.
        """
        await self._run(lambda conversations: conversations.feedback(request_id, rating, correction, owner=owner))

    async def traces(self, request_id: str, principal: Principal) -> Traces:
        """Where an exchange went; the errors are those of `feedback`."""
        return await self._run(
            lambda kept: traces_with_entries(
                kept.home, kept.get(request_id, **_whose(principal)), by_content=_sees_data(principal)
            )
        )

    async def forget(
        self, request_id: str, principal: Principal, *, anew: bool = False
    ) -> tuple[Traces, Retraining | None]:
        """Remove an exchange, its feedback and its copies, and mark the versions that may know it.

        Returns where it was, and with `anew` what was queued to train the marked names without it.

        Raises:
            NotFound, Refusal: As `feedback`.
            Conflict: If a run that holds it is at work.
        """

        def work(kept: ConversationStore) -> tuple[Traces, Retraining | None]:
            found, _ = forget_conversation(
                kept.home,
                request_id,
                author=author_of(principal),
                **_whose(principal),
                by_content=_sees_data(principal),
            )
            if found.memories:  # what engines have read of them may still be kept
                forget_entries()
            return found, retrain(kept.home, found, source="api", created_by=principal.key) if anew else None

        return await self._run(work)

    async def _run(self, what: Callable[[ConversationStore], Result]) -> Result:
        if self._conversations is None:
            raise Refusal(
                409, "This server keeps no conversations. Start it with record_conversations on.", "recording_is_off"
            )
        return await asyncio.get_running_loop().run_in_executor(self._thread, partial(what, self._conversations))

    async def close(self) -> None:
        """Write what is pending."""
        await asyncio.to_thread(self._thread.shutdown)


def _sees_data(principal: Principal) -> bool:
    """Whether one may change the data of its tenant's jobs. Whoever may not could else cut them by asking for their words."""
    return principal.key is None or bool(principal.scopes & {"train", "admin"})


def _whose(principal: Principal) -> dict[str, str | None]:
    """Whose exchanges one may see and remove: its own; with the scope `admin` its tenant's; without keys all."""
    if principal.key is None:
        return {}
    return {"tenant": principal.tenant, "owner": None if "admin" in principal.scopes else principal.key}
