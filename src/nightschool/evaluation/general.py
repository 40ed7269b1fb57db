"""General prompts: what nobody taught. Some are asked in the exam, so that a night's losses are seen; others are rehearsed."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from nightschool.config.recipe import GENERAL_OF_NIGHTSCHOOL
from nightschool.data.sources.rows import expand, read_rows
from nightschool.data.study.rewordings import wording
from nightschool.errors import DataError

OWN_FILE = Path(__file__).with_name("general.jsonl")
REHEARSED_FILE = Path(__file__).with_name("rehearsed.jsonl")


@dataclass(frozen=True)
class GeneralPrompt:
    """A question with its `answer`, or an open one, without: on that, only the drift of the answers is measured."""

    question: str
    answer: str | None = None


def general_prompts(place: str | None, root: Path) -> list[GeneralPrompt]:
    """The prompts of `place`, which is what `gate.general` says, in their order; none where it is off.

    Raises:
        NotFound: If the file is not there.
        DataError: If a row has no question, or is malformed.
    """
    return _read(place, OWN_FILE, root, "gate.general")


def rehearsed_prompts(place: str | None, exam: str | None, root: Path) -> list[str]:
    """The prompts of `place`, of which `rehearse.prompts` may name several, without those that the exam asks (`gate.general`).

    Raises:
        NotFound, DataError: As `general_prompts`.
    """
    asked = {wording(prompt.question) for prompt in general_prompts(exam, root)}
    prompts = _read(place, REHEARSED_FILE, root, "rehearse.prompts")
    return list(dict.fromkeys(p.question for p in prompts if wording(p.question) not in asked))


def _read(place: str | None, own: Path, root: Path, key: str) -> list[GeneralPrompt]:
    if place is None:
        return []
    paths = [own] if place == GENERAL_OF_NIGHTSCHOOL else expand(place, root, key)
    prompts: list[GeneralPrompt] = []
    for path in paths:
        for row in read_rows(path):
            question, answer = row.fields.get("question"), row.fields.get("answer")
            if not isinstance(question, str) or not question.strip() or not isinstance(answer, str | None):
                raise DataError(
                    f'{row.where}: a general prompt is {{"question": "…"}} or {{"question": "…", "answer": "…"}}, both '
                    f"text, and this row has {', '.join(sorted(row.fields)) or 'nothing'}. See docs/gate.md."
                )
            prompts.append(GeneralPrompt(question, answer if answer and answer.strip() else None))
    return prompts
