"""What a model is worth on a data set: loss and accuracy on what is held out, and its answers judged."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from nightschool.config.data_sets import DATA_SETS, PromptStyle
from nightschool.data.example import Example
from nightschool.data.sources.data_sets import NamedRows
from nightschool.data.sources.problems import Problems
from nightschool.data.sources.rows import Row
from nightschool.errors import NightschoolError, PromptTooLong
from nightschool.evaluation.diff import shortened
from nightschool.evaluation.examiner import Examinee, PendingAnswer
from nightschool.evaluation.intervals import Share
from nightschool.evaluation.judges import JUDGES, Judge
from nightschool.evaluation.programs.sandbox import Confinement, run_program
from nightschool.evaluation.scores import figure_to_json
from nightschool.evaluation.token_figures import TokenFigures, token_figures

_ASKED_AT_ONCE = 128


@dataclass(frozen=True)
class Asked:
    """One question of a data set with the model's answer. `why` says what was wrong with it, where that is known."""

    id: str
    data_set: str
    question: str
    expected: str
    answer: str = ""
    correct: bool = False
    why: str = ""


@dataclass(frozen=True)
class DataSetFigures:
    """All figures of one data set. Without a judge, or where none was asked, `answers` is empty."""

    name: str
    tokens: TokenFigures | None
    answers: list[Asked] = field(default_factory=list)

    @property
    def share(self) -> Share:
        """How many of the questions were answered rightly."""
        return Share(sum(one.correct for one in self.answers), len(self.answers))

    def to_json(self) -> dict[str, Any]:
        """Plain values, those of the tokens under the names of Pragnosia's results."""
        plain: dict[str, Any] = {"task": DATA_SETS[self.name].task}
        if self.tokens is not None:
            plain |= {
                "loss": figure_to_json(self.tokens.loss),
                "perplexity": figure_to_json(self.tokens.perplexity),
                "perplexity_uncapped": figure_to_json(self.tokens.perplexity_uncapped),
                "token_accuracy": self.tokens.accuracy,
                "total_samples": self.tokens.samples,
                "total_tokens": self.tokens.tokens,
                "correct_tokens": self.tokens.correct,
                "cut_tokens": self.tokens.cut_tokens,
            }
        if self.answers:
            plain[JUDGES[self.name].measure] = self.share.to_json()
        return plain


def summary(figures: Sequence[DataSetFigures]) -> dict[str, Any]:
    """Means over the data sets, each counting the same."""
    taken = [one.tokens for one in figures if one.tokens is not None]
    if not taken:
        return {}
    return {
        "avg_loss": figure_to_json(sum(one.loss for one in taken) / len(taken)),
        "avg_perplexity": figure_to_json(sum(one.perplexity for one in taken) / len(taken)),
        "avg_token_accuracy": sum(one.accuracy for one in taken) / len(taken),
    }


def examine_data_set(
    model: Examinee,
    rows: NamedRows,
    *,
    style: PromptStyle = "plain",
    max_seq_len: int,
    num_questions: int | None,
    max_new_tokens: int,
    confinement: Confinement | None = "confined",
) -> DataSetFigures:
    """Take the loss on all held-out rows, and ask the first of them.

    Args:
        model: Who is examined.
        rows: What is held out of the data set.
        style: How questions are put.
        max_seq_len: Longest example in tokens; the rest is cut.
        num_questions: At most so many are asked; None asks all.
        max_new_tokens: Longest answer.
        confinement: How programs are run; None asks no questions whose answers are programs.

    Raises:
        DataError: If a row is malformed.
        NotInstalled: If programs cannot be held here.
        NightschoolError: If an answer could not be generated.
    """
    problems = Problems()
    examples = rows.examples(rows.held_out, style, problems)
    problems.check()
    judge = JUDGES.get(rows.name)
    answers: list[Asked] = []
    if judge is not None and (judge.program is None or confinement is not None):
        asked = list(zip(examples, (row for _, row in rows.held_out), strict=True))[:num_questions]
        for start in range(0, len(asked), _ASKED_AT_ONCE):
            part = asked[start : start + _ASKED_AT_ONCE]
            answers += _ask(model, rows.name, judge, part, max_new_tokens, confinement or "confined")
    return DataSetFigures(rows.name, token_figures(model.loaded, examples, max_seq_len), answers)


def _ask(
    model: Examinee,
    name: str,
    judge: Judge,
    asked: Sequence[tuple[Example, Row]],
    max_new_tokens: int,
    confinement: Confinement,
) -> Iterator[Asked]:
    pending: list[PendingAnswer | PromptTooLong] = []
    for example, _ in asked:
        try:
            pending.append(model.ask_greedily(example.id, example.messages[:-1], max_new_tokens))
        except PromptTooLong as error:
            pending.append(error)
    for (example, row), one in zip(asked, pending, strict=True):
        question = Asked(example.id, name, example.question or "", example.answer or "")
        if isinstance(one, PromptTooLong):
            yield replace(question, why=f"not asked: its {one.prompt_tokens} tokens are more than the context holds")
            continue
        answer = one.result()
        if answer.finish_reason == "error":
            raise NightschoolError(
                f"{model.ref} failed at the question {shortened(str(example.question))!r}: {answer.error}. "
                "Nothing was counted; try again."
            )
        correct, why = _judged(judge, row, answer.text, confinement)
        yield replace(question, answer=answer.text, correct=correct, why=why)


def _judged(judge: Judge, row: Row, answer: str, confinement: Confinement) -> tuple[bool, str]:
    if judge.right is not None:
        return judge.right(row.fields, answer), ""
    assert judge.program is not None
    ended = run_program(judge.program(row.fields, answer), confinement=confinement)
    return ended.passed, "" if ended.passed else f"{ended.outcome}: {ended.why}"
