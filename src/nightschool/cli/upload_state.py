"""What the journal of uploads says, for whoever only looks: nothing is made, and a journal in trouble is no error."""

from __future__ import annotations

import os
from typing import Any

from nightschool import uploads
from nightschool.errors import NightschoolError
from nightschool.store.home import Home
from nightschool.store.runs import Run

# An upload that is under way waits, to whoever asks whether it has arrived.
_WORDS = {"done": "uploaded", "failed": "failed", "queued": "waiting", "running": "waiting"}
_WORST = ("failed", "waiting", "uploaded")


def upload_states(home: Home, run: Run) -> dict[str, str]:
    """`uploaded`, `waiting` or `failed` by the name of a checkpoint of this run; the worst of several places."""
    states: dict[str, set[str]] = {}
    for row in _rows(home):
        if row.run_id == run.id:
            states.setdefault(row.name, set()).add(_WORDS[row.state])
    return {name: next(word for word in _WORST if word in words) for name, words in states.items()}


def upload_summary(home: Home) -> dict[str, Any] | None:
    """How many uploads wait and failed, and the bytes that are left; None where nothing was ever uploaded."""
    rows = _rows(home)
    if not rows:
        return None
    left = [row for row in rows if row.state != "done"]
    failed = [row for row in left if row.state == "failed"]
    return {
        "pending": len(left) - len(failed),
        "failed": len(failed),
        "pending_bytes": sum(max(0, row.size_bytes - row.sent_bytes) for row in left),
        "done": len(rows) - len(left),
        "error": failed[0].error if failed else None,
    }


def _rows(home: Home) -> list[uploads.Upload]:
    if not home.state_db.exists() and not os.environ.get("DATABASE_URL"):
        return []
    try:
        return uploads.ls(home)
    except NightschoolError:
        return []
