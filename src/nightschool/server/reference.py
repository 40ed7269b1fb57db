"""Writes the HTTP reference: `python -m nightschool.server.reference > docs/http.md`."""

from __future__ import annotations

import sys
from collections.abc import Callable

from nightschool.errors import NotLoaded
from nightschool.server.app import create_app
from nightschool.server.reference_page import render
from nightschool.server.settings import ServerSettings


def main() -> None:
    """Write the reference to stdout."""
    sys.stdout.write(render(create_app([NoSlot()], ServerSettings()).openapi()))


class NoSlot:
    """A slot that never serves anything; enough for the reference."""

    name = "default"
    current = None

    def refresh(self) -> bool:
        return False

    def swap(self, ref: str, *, commit: Callable[[], object]) -> object:
        raise NotLoaded(f"Nothing serves {ref} here, and {commit} was not called.")

    def close(self) -> None:
        return None


if __name__ == "__main__":
    main()
