"""Writes the HTTP reference: `python -m nightschool.server.reference > docs/http.md`."""

from __future__ import annotations

import sys
from pathlib import Path

from nightschool.engine.pool import EnginePool
from nightschool.engine.slot import Slot
from nightschool.server.app import create_app
from nightschool.server.reference_page import render
from nightschool.server.settings import ServerSettings
from nightschool.store.home import Home


def main() -> None:
    """Write the reference to stdout; nothing is served."""
    slot = Slot("default", EnginePool(Home(Path())))
    sys.stdout.write(render(create_app([slot], ServerSettings()).openapi()))


if __name__ == "__main__":
    main()
