"""Lists that are read page by page, as OpenAI's clients turn the pages."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Annotated, Any, TypeVar

from fastapi import Query
from fastapi.responses import JSONResponse

from nightschool.server.errors import Refusal

T = TypeVar("T")
MOST_ON_A_PAGE = 100

After = Annotated[str | None, Query(max_length=200, description="The id of the last one of the page before.")]


def page(rows: Sequence[T], shown: Callable[[T], dict[str, Any]], *, after: str | None, limit: int) -> JSONResponse:
    """The `limit` rows behind the row whose id is `after`, or the first ones without it.

    Raises:
        Refusal: 400 if `after` is none of them.
    """
    objects = [shown(row) for row in rows]
    start = 0
    if after is not None:
        ids = [one["id"] for one in objects]
        if after not in ids:
            raise Refusal(400, f"The list has no {after[:100]!r} to go on after.", "invalid_value", param="after")
        start = ids.index(after) + 1
    return page_of(objects[start : start + limit], has_more=len(objects) > start + limit)


def page_of(objects: Sequence[dict[str, Any]], *, has_more: bool) -> JSONResponse:
    """One page in OpenAI's spelling."""
    ends = (
        {"first_id": objects[0]["id"], "last_id": objects[-1]["id"]} if objects else {"first_id": None, "last_id": None}
    )
    return JSONResponse({"object": "list", "data": list(objects), **ends, "has_more": has_more})
