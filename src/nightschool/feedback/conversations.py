"""What the server recorded by day: conversations, and what people said of the answers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Literal

import sqlalchemy as sa
from sqlalchemy.exc import IntegrityError

from nightschool.errors import Conflict, NotFound, UsageError
from nightschool.events import now
from nightschool.store.database import Database
from nightschool.store.home import Home
from nightschool.store.names import full_name, split_name
from nightschool.store.tables import accepted_examples, conversations, feedback, forgotten

Rating = Literal["good", "bad"]
RATINGS: tuple[Rating, ...] = ("good", "bad")


@dataclass(frozen=True)
class Conversation:
    """One answered request. `messages` are what the model was given; `answer` is what it said.

    `rating` and `correction` are the newest that people gave, or None. `touched_at` is the last time that any of
    it came or changed: the answer itself, a rating, or a correction.
    """

    request_id: str
    time: datetime
    model: str
    version: str
    messages: list[dict[str, Any]]
    answer: str
    rating: Rating | None = None
    correction: str | None = None
    owner: str | None = None
    touched_at: datetime | None = None


class ConversationStore:
    """The conversations of a home."""

    def __init__(self, db: Database) -> None:
        self._db = db

    def record(
        self,
        request_id: str,
        model: str,
        version: str,
        messages: Sequence[dict[str, Any]],
        answer: str,
        owner: str | None = None,
        *,
        time: datetime | None = None,
    ) -> None:
        """Keep one answer.

        Args:
            request_id: What feedback will name it by.
            model: The served name; with its tenant, whose conversation it then is.
            version: The version that answered.
            messages: The turns before the answer, as `{"role", "content"}`.
            answer: What the model said.
            owner: Who asked, as only that one may rate it or have it forgotten; None where everybody may.
            time: When it was answered; now when it is None.

        Raises:
            Conflict: If this request id was recorded before, or was forgotten.
        """
        tenant, bare = split_name(model)
        row = {
            "request_id": request_id,
            "recorded_at": time or now(),
            "tenant": tenant,
            "model": bare,
            "version": version,
            "messages": list(messages),
            "answer": answer,
            "owner": owner,
        }
        try:
            with self._db.write() as connection:
                if connection.execute(sa.select(forgotten).where(forgotten.c.request_id == request_id)).first():
                    raise Conflict(
                        f"The request {request_id!r} was forgotten, and what was forgotten does not come back. "
                        f"Use a new request id."
                    )
                connection.execute(conversations.insert().values(row))
        except IntegrityError as error:
            raise Conflict(
                f"The request {request_id!r} was recorded before, and an answer is recorded once. Use a new request id."
            ) from error

    def feedback(
        self,
        request_id: str,
        rating: Rating | None = None,
        correction: str | None = None,
        *,
        time: datetime | None = None,
        owner: str | None = None,
    ) -> None:
        """Say whether an answer was good, and what it should have been; the newest of each counts.

        Args:
            request_id: Of the answer.
            rating: Good or bad.
            correction: The right answer.
            time: When it was said; now when it is None.
            owner: Who says it: a conversation of anybody else is not found. None is the operator, who may rate all.

        Raises:
            UsageError: If there is neither a rating nor a correction, or the rating is none of good and bad.
            NotFound: If no conversation has this request id.
        """
        if rating is None and correction is None:
            raise UsageError(
                "The feedback holds neither a rating nor a correction. Give rating good or bad, or a correction."
            )
        if rating is not None and rating not in RATINGS:
            raise UsageError(f"The rating {rating!r} is unknown. Write good or bad.")
        if correction is not None and not correction.strip():
            raise UsageError("The correction is blank, and a blank answer would be learned. Write the right answer.")
        with self._db.write() as connection:
            self._require(connection, request_id, owner)
            row = {"request_id": request_id, "recorded_at": time or now(), "rating": rating, "correction": correction}
            connection.execute(feedback.insert().values(row))

    @property
    def home(self) -> Home:
        """Where they are kept."""
        return self._db.home

    def get(self, request_id: str, *, owner: str | None = None, tenant: str | None = None) -> Conversation:
        """One conversation; with `owner` or `tenant`, only if it is that one's. Raises NotFound if there is none."""
        conditions = [conversations.c.request_id == request_id]
        if owner is not None:
            conditions.append(conversations.c.owner == owner)
        if tenant is not None:
            conditions.append(conversations.c.tenant == tenant)
        with self._db.read() as connection:
            found = _load(connection, *conditions)
        if not found:
            raise _unknown(request_id)
        return found[0]

    def select(
        self,
        rating: Literal["good", "bad", "any"] | None = None,
        corrected: bool | None = None,  # noqa: FBT001  mirrors the recipe's filter
        model: str | None = None,
        since: datetime | None = None,
        *,
        tenant: str | None = None,
    ) -> list[Conversation]:
        """The conversations that a filter keeps, oldest first.

        Args:
            rating: Only answers with this newest rating; `any` and None keep rated and unrated ones.
            corrected: True: only answers with a correction; False: only those without.
            model: Only answers of this served name, of its tenant.
            since: Only what came, or got feedback, at this moment or later: a correction that comes after the
                promotion of a champion is new, however old the answer is.
            tenant: Only this tenant's, whatever served name answered; not needed beside `model`.
        """
        conditions: list[sa.ColumnElement[bool]] = []
        if model is not None:
            tenant, bare = split_name(model)
            conditions.append(conversations.c.model == bare)
        if tenant is not None:
            conditions.append(conversations.c.tenant == tenant)
        if since is not None:
            with_news = sa.select(feedback.c.request_id).where(feedback.c.recorded_at >= since)
            conditions.append(sa.or_(conversations.c.recorded_at >= since, conversations.c.request_id.in_(with_news)))
        with self._db.read() as connection:
            found = _load(connection, *conditions)
        if rating in RATINGS:
            found = [conversation for conversation in found if conversation.rating == rating]
        elif rating not in (None, "any"):
            raise UsageError(f"The rating {rating!r} is unknown. Write good, bad or any.")
        if corrected is not None:
            found = [conversation for conversation in found if (conversation.correction is not None) == corrected]
        return found

    def forget(self, request_id: str, *, owner: str | None = None) -> int:
        """Delete a conversation, its feedback, and the accepted examples that were made of it, for good.

        Its examples cannot be accepted again, from whatever file they come. Versions that learned them keep what
        they learned, and the folders of runs keep their copies.

        Args:
            request_id: Of the answer.
            owner: Who asks; see `feedback`.

        Returns:
            How many accepted examples were deleted.

        Raises:
            NotFound: If no conversation has this request id.
        """
        with self._db.write() as connection:
            self._require(connection, request_id, owner)
            deleted = connection.execute(accepted_examples.delete().where(accepted_examples.c.origin == request_id))
            connection.execute(conversations.delete().where(conversations.c.request_id == request_id))
            connection.execute(forgotten.insert().values(request_id=request_id, forgotten_at=now()))
        self._db.clear_log()
        return deleted.rowcount

    @staticmethod
    def _require(connection: sa.Connection, request_id: str, owner: str | None) -> None:
        query = sa.select(conversations.c.request_id).where(conversations.c.request_id == request_id)
        if owner is not None:
            query = query.where(conversations.c.owner == owner)
        if connection.execute(query).first() is None:
            raise _unknown(request_id)


def _unknown(request_id: str) -> NotFound:
    return NotFound(
        f"No conversation with the request id {request_id!r} was recorded. "
        f"Check the id, and that the server keeps conversations (serve.record_conversations)."
    )


def _load(connection: sa.Connection, *conditions: sa.ColumnElement[bool]) -> list[Conversation]:
    query = (
        sa.select(conversations).where(*conditions).order_by(conversations.c.recorded_at, conversations.c.request_id)
    )
    rows = connection.execute(query).all()
    if not rows:
        return []
    said: dict[str, list[sa.Row[Any]]] = {}
    # Feedback by the same conditions, in the order in which it came: ids grow.
    joined = sa.select(feedback).join(conversations).where(*conditions).order_by(feedback.c.id)
    for row in connection.execute(joined):
        said.setdefault(row.request_id, []).append(row)
    return [_conversation(row, said.get(row.request_id, [])) for row in rows]


def _conversation(row: sa.Row[Any], said: list[sa.Row[Any]]) -> Conversation:
    ratings = [item.rating for item in said if item.rating is not None]
    corrections = [item.correction for item in said if item.correction is not None]
    return Conversation(
        request_id=row.request_id,
        time=row.recorded_at,
        model=full_name(row.tenant, row.model),
        version=row.version,
        messages=row.messages,
        answer=row.answer,
        rating=ratings[-1] if ratings else None,
        correction=corrections[-1] if corrections else None,
        owner=row.owner,
        touched_at=max([row.recorded_at, *(item.recorded_at for item in said)]),
    )
