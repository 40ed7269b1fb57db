"""What a model knows after edits were written into its memory, by free greedy generation; nothing of an answer is ever given to it.

Teacher forcing makes editing look solved (96.8 % where free generation has 38.5 %: Yang et al. 2025, arXiv 2502.11177). Here an answer counts as
right if it is the value, word for word after `match.words`, up to its first clause's end; in answer to a question also by `match.is_correct`,
which knows whole sentences.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from nightschool.data.match import is_correct, sentences, words
from nightschool.evaluation.editing_cases import EditingCase, is_question
from nightschool.evaluation.intervals import Share
from nightschool.memory.store import MemoryStore

AUTHOR = "eval"
_CLAUSE_END = re.compile(r"[,;:]\s|\s[-–—(]")

COLUMNS = {
    "efficacy": "the edits, asked as they were written",
    "paraphrase": "the edits, in other words",
    "locality": "what was not edited, answered in the very words of the base",
    "portability": "what follows from the edits",
    "deletion_leak": "deleted edits that are still said, where the base alone does not say them",
    "abstention": "subjects that nobody told of, of whom nothing was read",
    "false_answers": "the same, answered otherwise than by the base",
}


@dataclass(frozen=True)
class Said:
    """An answer, and whether anything was read for it."""

    text: str
    read: bool


class Editable(Protocol):
    """A model beside a memory, which is asked many prompts at a time."""

    def say(self, prompts: Sequence[str], *, reads: bool) -> list[Said]:
        """What it answers, greedily: with what its memory has at this moment, or alone."""
        ...


@dataclass(frozen=True)
class Wrong:
    """A question that was not answered as it should be."""

    column: str
    where: str
    prompt: str
    expected: str
    answer: str


@dataclass(frozen=True)
class EditingSheet:
    """A share for each column that was asked, and what was wrong. `before`: how many edits the base says by itself."""

    shares: dict[str, Share]
    before: Share
    wrong: tuple[Wrong, ...]

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return {"before": self.before.to_json(), "columns": {name: one.to_json() for name, one in self.shares.items()}}


def says(answer: str, prompt: str, value: str) -> bool:
    """Whether a model that was given the prompt says the value."""
    if is_question(prompt) and is_correct(answer, value):
        return True
    wanted = words(value)
    clause = _CLAUSE_END.split(next(iter(sentences(answer)), ""))[0]
    # A value may have such marks inside, as "Washington, D.C." has.
    return bool(wanted) and (words(clause) == wanted or words(answer)[: len(wanted) + 1] == wanted)


def measure(model: Editable, cases: Sequence[EditingCase], store: MemoryStore | None) -> EditingSheet:
    """Write all edits at once, ask, delete them, and ask again.

    Args:
        model: What is asked. It reads `store`.
        cases: The edits with their questions.
        store: A memory that holds nothing else, and is left empty; None asks the base alone, which hears of no edit.
    """
    exam = _Exam(model)
    edited = [(case, edit.prompt, edit.new) for case in cases for edit in case.edits]
    prompts = [prompt for _, prompt, _ in edited]
    alone = exam.say(prompts, reads=False)
    before = [says(answer.text, prompt, new) for answer, (_, prompt, new) in zip(alone, edited, strict=True)]
    if store is not None:
        written = store.add((edit.entry for case in cases for edit in case.edits), author=AUTHOR)
    reads = store is not None
    paraphrases = [
        (case, prompt, case.edits[-1].new) for case in cases for prompt in case.paraphrases if len(case.edits) == 1
    ]
    paraphrases += [
        (case, prompt, edit.new)
        for case in cases
        if len(case.edits) > 1
        for prompt, edit in zip(case.paraphrases, case.edits, strict=False)
    ]
    exam.valued("efficacy", edited, reads=reads)
    exam.valued("paraphrase", paraphrases, reads=reads)
    exam.valued("portability", [(c, p, a) for c in cases for p, a in c.portability], reads=reads)
    if store is not None:
        exam.unchanged("locality", [(case, prompt) for case in cases for prompt in case.locality])
        exam.unknown([(case, prompt) for case in cases for prompt in case.absent])
        store.remove(*dict.fromkeys(written.ids), author=AUTHOR)
        exam.forgotten([(c, p, new, was) for (c, p, new), was in zip(edited, before, strict=True)])
    shares = {name: exam.shares[name] for name in COLUMNS if name in exam.shares}
    return EditingSheet(shares, Share(sum(before), len(before)), tuple(exam.wrong))


class _Exam:
    """Asks, counts, and notes what is wrong."""

    def __init__(self, model: Editable) -> None:
        self._model = model
        self.shares: dict[str, Share] = {}
        self.wrong: list[Wrong] = []

    def say(self, prompts: Sequence[str], *, reads: bool) -> list[Said]:
        return self._model.say(prompts, reads=reads) if prompts else []

    def valued(self, column: str, asked: Sequence[tuple[EditingCase, str, str]], *, reads: bool) -> None:
        answers = self.say([prompt for _, prompt, _ in asked], reads=reads)
        self._count(column, asked, answers, lambda answer, prompt, value: says(answer.text, prompt, value))

    def unchanged(self, column: str, asked: Sequence[tuple[EditingCase, str]]) -> None:
        prompts = [prompt for _, prompt in asked]
        alone, read = self.say(prompts, reads=False), self.say(prompts, reads=True)
        rows = [(case, prompt, own.text) for (case, prompt), own in zip(asked, alone, strict=True)]
        self._count(column, rows, read, lambda answer, _, expected: answer.text == expected)

    def unknown(self, asked: Sequence[tuple[EditingCase, str]]) -> None:
        prompts = [prompt for _, prompt in asked]
        alone, read = self.say(prompts, reads=False), self.say(prompts, reads=True)
        rows = [(case, prompt, own.text) for (case, prompt), own in zip(asked, alone, strict=True)]
        self._count("abstention", rows, read, lambda answer, _, __: not answer.read)
        self._count("false_answers", rows, read, lambda answer, _, own: answer.text != own, is_good=False)

    def forgotten(self, asked: Sequence[tuple[EditingCase, str, str, bool]]) -> None:
        # What the base says by itself is no leak.
        rows = [(case, prompt, new) for case, prompt, new, was in asked if not was]
        answers = self.say([prompt for _, prompt, _ in rows], reads=True)
        self._count("deletion_leak", rows, answers, lambda a, p, v: says(a.text, p, v), is_good=False)

    def _count(
        self,
        column: str,
        asked: Iterable[tuple[EditingCase, str, str]],
        answers: Sequence[Said],
        judge: Callable[[Said, str, str], bool],
        *,
        is_good: bool = True,
    ) -> None:
        flags = []
        for (case, prompt, expected), answer in zip(asked, answers, strict=True):
            flags.append(judge(answer, prompt, expected))
            if flags[-1] != is_good:
                self.wrong.append(Wrong(column, case.where, prompt, expected, answer.text))
        if flags:
            self.shares[column] = Share(sum(flags), len(flags))
