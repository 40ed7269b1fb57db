"""Collects what is wrong with data, so that a user sees twenty problems at once and not one a run."""

from __future__ import annotations

from nightschool.errors import DataError

SHOWN_PROBLEMS = 20


class Problems:
    """The problems found so far. At `limit` of them, `add` raises them all; `check` raises what there is."""

    def __init__(self, limit: int = SHOWN_PROBLEMS) -> None:
        self.limit = limit
        self.found: list[str] = []
        self.raised = False

    def add(self, problem: str) -> None:
        """Note one problem, which begins with `file:line:`.

        Raises:
            DataError: If this is the last one that is shown.
        """
        self.found.append(problem)
        if len(self.found) >= self.limit:
            if self.limit > 1:
                self.found.append(f"These are the first {self.limit} problems; the data was not read further.")
            self.check()

    def check(self) -> None:
        """Go on if nothing is wrong.

        Raises:
            DataError: With every problem, one a line.
        """
        if self.found:
            self.raised = True
            raise DataError("\n".join(self.found))
