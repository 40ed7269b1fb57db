"""Every command that the README, the pages and the recipes show is one that exists, with options that exist."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
from cyclopts import CycloptsError

from nightschool.cli.main import NOUNS, build_app, split_global_options

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md")), *sorted((ROOT / "recipes").glob("*.yaml"))]
GENERATED = "cli.md"  # from the commands themselves

_FENCE = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)
_INLINE = re.compile(r"`(nightschool [^`]+)`")
_END = {"|", "&", "&&", ";", ">", ">>"}


def commands(page: Path) -> list[str]:
    """What somebody could type: lines of blocks, words between backticks, and comments of recipes."""
    text = page.read_text("utf-8")
    if page.suffix == ".yaml":
        lines = [line.removeprefix("#") for line in text.splitlines() if line.startswith("#")]
        # After two spaces comes what the line says of the command.
        found = [
            re.split(r"(?<=\S) {4,}(?=\S)", line.strip().replace("nightschool train        ", "nightschool train "))[0]
            for line in lines
            if line.strip().startswith("nightschool ")
        ]
        return found + _INLINE.findall(text)
    blocks = "\n".join(body.replace("\\\n", " ") for language, body in _FENCE.findall(text) if language != "python")
    lines = [line.strip() for line in blocks.splitlines() if line.strip().startswith("nightschool ")]
    prose = _FENCE.sub("", text)
    return lines + [" ".join(command.split()) for command in _INLINE.findall(prose)]


def check(command: str) -> None:
    """Parse a command as `nightschool` does, without running it.

    Raises:
        CycloptsError: If a verb or an option does not exist.
    """
    words = shlex.split(command, comments=True)[1:]
    words = words[: next((index for index, word in enumerate(words) if word in _END), len(words))]
    words = [word for word in words if word not in ("…", "...")]
    words, _, _ = split_global_options([word for word in words if word not in ("-C", "DIR")])
    app = build_app(words)
    if not words or words == ["--help"] or words == ["--version"]:
        return
    if any(word.startswith("-") for word in words) or len(words) > 2:
        app.parse_args(words, exit_on_error=False, print_error=False)
        return
    # `nightschool runs rm` in prose names a verb; what it needs is left out.
    chain, _, rest = app.parse_commands(words)
    assert chain, f"{command}: no such verb"
    assert not (chain[0] in NOUNS and len(chain) == 1 and rest), f"{command}: no such verb"


@pytest.mark.parametrize("page", [page for page in PAGES if page.name != GENERATED], ids=lambda page: page.name)
def test_every_command_that_is_shown_can_be_parsed(page: Path) -> None:
    wrong = []
    for command in commands(page):
        try:
            check(command)
        except (CycloptsError, AssertionError) as error:
            wrong.append(f"{command}: {error}")
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize(
    "command",
    [
        "nightschool trian recipes/tiny.yaml",
        "nightschool runs delete",
        "nightschool serve tiny --prot 8001",
        "nightschool models promote tiny@latest --force",
        "nightschool checkpoints draw",
    ],
)
def test_a_command_that_does_not_exist_is_noticed(command: str, tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(f"Type `{command}`.\n\n```\n{command}\n```\n")
    assert commands(page) == [command, command]
    with pytest.raises((CycloptsError, AssertionError)):
        check(command)


def test_commands_are_found_on_the_pages_at_all() -> None:
    assert sum(len(commands(page)) for page in PAGES) > 50
