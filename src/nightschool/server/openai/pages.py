"""Lists that are read page by page, as OpenAI's clients turn the pages."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from operator import attrgetter
from typing import Annotated, Any, TypeVar

from fastapi import Query
from fastapi.responses import JSONResponse

from nightschool.server.errors import Refusal

T = TypeVar("T")
MOST_ON_A_PAGE = 1000

After = Annotated[str | None, Query(max_length=200, description="The id of the last one of the page before.")]


def page(
    rows: Sequence[T],
    shown: Callable[[T], dict[str, Any]],
    *,
    after: str | None,
    limit: int,
    id_of: Callable[[T], str] = attrgetter("id"),
) -> JSONResponse:
    """The `limit` rows behind the row whose id is `after`, or the first ones without it.

    Raises:
        Refusal: 400 if `after` is none of them.
    """
    start = 0
    if after is not None:
        start = next((index for index, row in enumerate(rows, start=1) if id_of(row) == after), 0)
        if not start:
            raise Refusal(400, f"The list has no {after[:100]!r} to go on after.", "invalid_value", param="after")
    objects = [shown(row) for row in rows[start : start + limit]]
    return page_of(objects, has_more=len(rows) > start + limit)


def page_of(objects: Sequence[dict[str, Any]], *, has_more: bool) -> JSONResponse:
    """One page in OpenAI's spelling."""
    ends = (
        {"first_id": objects[0]["id"], "last_id": objects[-1]["id"]} if objects else {"first_id": None, "last_id": None}
    )
    return JSONResponse({"object": "list", "data": list(objects), **ends, "has_more": has_more})
