"""`python -m nightschool.cli.reference` writes docs/cli.md: every help page, as the command prints it.

With `--check` it writes nothing and exits 1 if the file is not what it would write.
"""

from __future__ import annotations

import io
import sys
from collections.abc import Iterator, Sequence
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
    return "\n".join(_stripped(out.getvalue()))


def _stripped(text: str) -> Iterator[str]:
    return (line.rstrip() for line in text.strip().splitlines())


def main(arguments: Sequence[str]) -> int:
    """Write the page, or with `--check` compare it."""
    options = [word for word in arguments if word.startswith("-")]
    target = Path(next((word for word in arguments if not word.startswith("-")), "docs/cli.md"))
    wanted = reference()
    if options == ["--check"]:
        if target.exists() and target.read_text("utf-8") == wanted:
            return 0
        print(f"{target} is out of date. Write it with python -m nightschool.cli.reference.", file=sys.stderr)
        return 1
    if options:
        print("usage: python -m nightschool.cli.reference [--check] [docs/cli.md]", file=sys.stderr)
        return 2
    target.write_text(wanted, "utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
