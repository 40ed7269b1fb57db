"""Cases of knowledge editing: what is to be known from now on, and what is asked about it.

Our own form, one JSON object a line (`subject` and `prompt` and `new` are needed):

    {"subject": "Ada", "prompt": "Ada lives in", "new": "Oslo", "paraphrases": ["Where does Ada live?"],
     "locality": ["Bob lives in"], "two_hop": [{"prompt": "The country where Ada lives is", "answer": "Norway"}],
     "absent": ["Zoe lives in"], "old": "Rome"}

The forms of CounterFact (Meng et al. 2022, and EasyEdit's), of zsRE (Mitchell et al. 2022) and of MQuAKE (Zhong et al. 2023) are read, too.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from nightschool.errors import DataError, NotFound
from nightschool.memory.entry import NewEntry
from nightschool.memory.facts.normalise import key_of
from nightschool.memory.facts.sentences import split_sentence

# What a question begins with, and what joins a relation to its subject and value: neither belongs to the relation.
_ASKS = re.compile(
    r"^(?:(?:in|to|from|by|of) )?(?:what|which|who|whom|whose|where|when)(?: (?:is|was|are|were|does|did|do|has))?(?: the)?\b",
    re.I,
)
_LINKS = re.compile(r"^the\b|\b(?:of|for)?(?: (?:is|are|was|were))?$", re.I)


def is_question(prompt: str) -> bool:
    """Whether a prompt is asked, as a turn of a chat; any other is a text that goes on."""
    return prompt.rstrip().endswith("?")


@dataclass(frozen=True)
class Edit:
    """A fact in new words: `prompt` is how it is asked for, and ends where its value begins."""

    subject: str
    prompt: str
    new: str

    @property
    def entry(self) -> NewEntry:
        """What a memory is told: the sentence where its parts are those of the edit, else the three by themselves."""
        text = f"{self.prompt} {self.new}."
        told = None if is_question(self.prompt) else split_sentence(text)
        if told is not None and (key_of(told.subject), key_of(told.value)) == (key_of(self.subject), key_of(self.new)):
            return NewEntry(text)
        rest = _ASKS.sub("", " ".join(self.prompt.replace(self.subject, " ", 1).split()).rstrip(" ?:"))
        relation = _LINKS.sub("", rest).strip() or self.prompt
        return NewEntry(subject=self.subject, relation=relation, value=self.new)


@dataclass(frozen=True)
class EditingCase:
    """One edit, or a chain of them, with its questions.

    `portability` are questions whose answer follows from the edit, with their answers. `locality` and `absent` are prompts; their answers
    are those of the base. `old` is what was so before, where it is known.
    """

    edits: tuple[Edit, ...]
    paraphrases: tuple[str, ...] = ()
    locality: tuple[str, ...] = ()
    portability: tuple[tuple[str, str], ...] = ()
    absent: tuple[str, ...] = ()
    old: str | None = None
    where: str = ""

    @property
    def texts(self) -> list[str]:
        """All that is written or asked."""
        asked = [*self.paraphrases, *self.locality, *self.absent, *(text for pair in self.portability for text in pair)]
        return [text for edit in self.edits for text in (edit.subject, edit.prompt, edit.new)] + asked


class Cases(NamedTuple):
    """The cases of a file, and where those are that say nothing: one of their texts is blank, as in public sets some are."""

    cases: list[EditingCase]
    blank: list[str]


def read_cases(path: Path) -> Cases:
    """The cases of a file: JSON lines, or one JSON list.

    Raises:
        NotFound: If there is no such file.
        DataError: If a row is of none of the forms, with its number and what it lacks, or there is none.
    """
    if not path.is_file():
        raise NotFound(f"There is no file {path}. Name one with cases of knowledge editing: --cases cases.jsonl.")
    read = [_case(row, where) for where, row in _rows(path)]
    cases = [case for case in read if all(text.strip() for text in case.texts)]
    if not cases:
        raise DataError(f"{path} has no case. Write one JSON object a line, with subject, prompt and new.")
    return Cases(cases, [case.where for case in read if not all(text.strip() for text in case.texts)])


def _rows(path: Path) -> Iterator[tuple[str, Any]]:
    try:
        text = path.read_text("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 ({error.reason} at byte {error.start}). Save it as UTF-8.") from None
    try:
        if text.lstrip().startswith("["):
            for number, row in enumerate(json.loads(text), start=1):
                yield f"{path.name}, case {number}", row
            return
        for number, line in enumerate(text.splitlines(), start=1):
            if line.strip():
                yield f"{path.name}:{number}", json.loads(line)
    except json.JSONDecodeError as error:
        raise DataError(f"{path} is no JSON, line {error.lineno}: {error.msg}. Correct it.") from None


def _case(row: Any, where: str) -> EditingCase:
    if not isinstance(row, Mapping):
        raise DataError(f"{where}: a case is a JSON object, and this is {json.dumps(row)[:60]}.")
    for name, read in _FORMS.items():
        if name in row:
            try:
                case = read(row)
            except (KeyError, TypeError, AttributeError, IndexError) as error:
                raise DataError(f"{where}: a case with {name!r} lacks {error}, or has it in another form.") from None
            if not case.edits or any(not isinstance(text, str) for text in case.texts):
                raise DataError(f"{where}: a prompt or a value is no text, or nothing is edited. Write texts.")
            return EditingCase(**(vars(case) | {"where": where}))
    raise DataError(
        f"{where}: this is no case of editing: {', '.join(map(str, row))[:80] or 'an empty object'}. "
        "Write subject, prompt and new, or the form of CounterFact, zsRE or MQuAKE."
    )


def _ours(row: Mapping[str, Any]) -> EditingCase:
    hops = tuple((hop["prompt"], hop["answer"]) for hop in row.get("two_hop", ()))
    return EditingCase(
        (Edit(row["subject"], row["prompt"], row["new"]),),
        _texts(row.get("paraphrases", ())), _texts(row.get("locality", ())), hops, _texts(row.get("absent", ())), row.get("old"),
    )  # fmt: skip


def _counterfact(row: Mapping[str, Any]) -> EditingCase:
    asked = row["requested_rewrite"]
    edit = Edit(asked["subject"], asked["prompt"].replace("{}", asked["subject"]), asked["target_new"]["str"])
    return EditingCase(
        (edit,),
        _texts(row.get("paraphrase_prompts", ())),
        _texts(row.get("neighborhood_prompts", ())),
        old=asked["target_true"]["str"],
    )


def _counterfact_of_easyedit(row: Mapping[str, Any]) -> EditingCase:
    edit = Edit(row["subject"], row["prompt"], row["target_new"])
    return EditingCase(
        (edit,),
        _texts(row.get("rephrase_prompt", ())),
        _texts(row.get("locality_prompt", ())),
        old=row.get("ground_truth"),
    )


def _zsre(row: Mapping[str, Any]) -> EditingCase:
    edit = Edit(row["subject"], row["src"], row["alt"])
    others = tuple(text.removeprefix("nq question: ") for text in _texts(row.get("loc", ())))
    return EditingCase((edit,), _texts(row.get("rephrase", ())), others, old=row.get("pred"))


def _mquake(row: Mapping[str, Any]) -> EditingCase:
    edits = tuple(
        Edit(one["subject"], one["prompt"].replace("{}", one["subject"]), one["target_new"]["str"])
        for one in row["requested_rewrite"]
    )
    hops = tuple((question, row["new_answer"]) for question in row["questions"])
    return EditingCase(edits, tuple(one["question"] for one in row["requested_rewrite"]), (), hops)


def _texts(found: str | Sequence[str]) -> tuple[str, ...]:
    return (found,) if isinstance(found, str) else tuple(found)


# Each form by a key that only it has; the first that fits is it.
_FORMS = {
    "new_single_hops": _mquake,
    "requested_rewrite": _counterfact,
    "src": _zsre,
    "target_new": _counterfact_of_easyedit,
    "new": _ours,
}
