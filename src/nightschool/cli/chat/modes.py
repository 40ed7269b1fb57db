"""What a typed line becomes before the model gets it."""

from __future__ import annotations

from collections.abc import Callable


def _as_it_is(text: str) -> str:
    return text


def code_task(text: str) -> str:
    """A request for code, put as `prompt_style: headings` puts those of data sets; models begin with the code itself then."""
    return f"### Code Task:\n{text}\n\n### Solution:"


MODES: dict[str, Callable[[str], str]] = {"chat": _as_it_is, "code": code_task}
