"""`python -m nightschool.cli.reference docs/cli.md` writes that file: every help page, as the command prints it."""

from __future__ import annotations

import io
import sys
from collections.abc import Sequence
from pathlib import Path

from cyclopts import App
from rich.console import Console

from nightschool.cli.main import NOUNS, VERBS, build_app

COLUMNS = 100
HEAD = """\
# Command line

<!-- Made by `python -m nightschool.cli.reference` from the help pages; a test fails when it is out of date. -->
"""


def reference() -> str:
    """The whole page."""
    parts = [HEAD, _section(2, [])]
    parts += [_section(2, [verb]) for verb in VERBS]
    for noun, (_, verbs) in NOUNS.items():
        parts.append(_section(2, [noun]))
        parts += [_section(3, [noun, verb]) for verb in verbs]
    return "\n".join(parts)


def _section(level: int, words: Sequence[str]) -> str:
    title = " ".join(["nightschool", *words])
    return f"{'#' * level} {title}\n\n```text\n{help_page(build_app(words), words)}\n```\n"


def help_page(app: App, words: Sequence[str]) -> str:
    """One help page as plain text, the same in every terminal."""
    out = io.StringIO()
    console = Console(file=out, width=COLUMNS, color_system=None, force_terminal=False, legacy_windows=False)
    app.help_print(list(words), console=console)
    return "\n".join(line.rstrip() for line in out.getvalue().strip().splitlines())


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(reference(), "utf-8")
