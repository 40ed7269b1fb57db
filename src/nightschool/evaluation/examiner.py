"""The examiner: asks a version the questions of an `EvalSet` and takes its loss. Whatever answers is handed in."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from typing import Protocol

from nightschool.data.batches import Batches
from nightschool.data.chat.render_examples import render_examples
from nightschool.data.example import Message
from nightschool.data.match import RULES
from nightschool.errors import DataError, NightschoolError, PromptTooLong
from nightschool.evaluation.diff import shortened
from nightschool.evaluation.eval_set import EvalSet
from nightschool.evaluation.heldout import heldout_loss
from nightschool.evaluation.preferences import pair_margins
from nightschool.evaluation.scores import PairMargin, ProbeAnswer, ProbeQuestion, ScoreSheet
from nightschool.models.load import LoadedModel
from nightschool.models.quiet import quiet_libraries

# As many wait at a time as every engine has room for.
_ASKED_AT_ONCE = 128
_HELD_OUT_TOKENS_PER_BATCH = 2048
# The answers to general questions are a few words, and how a model goes on after them decides nothing.
_GENERAL_ANSWER_TOKENS = 32


class Answer(Protocol):
    """A finished answer; where `finish_reason` is `error`, `error` says why."""

    @property
    def text(self) -> str: ...
    @property
    def token_ids(self) -> Sequence[int]: ...
    @property
    def finish_reason(self) -> str: ...
    @property
    def error(self) -> str | None: ...


class PendingAnswer(Protocol):
    """An answer in the making."""

    def result(self) -> Answer: ...


class Examinee(Protocol):
    """What the examiner needs: a loaded model, and an engine that answers with it several questions at once."""

    @property
    def ref(self) -> str: ...
    @property
    def loaded(self) -> LoadedModel: ...

    def ask_greedily(self, request_id: str, messages: Sequence[Message], max_new_tokens: int) -> PendingAnswer:
        """Queue a conversation, answered by the likeliest tokens, fewer where the context is nearly full.

        Raises:
            PromptTooLong: If the context has no room for one token of an answer.
        """
        ...


def examine(model: Examinee, eval_set: EvalSet) -> ScoreSheet:
    """The score sheet of one model: what it answers, its held-out loss, and how it takes held-out preference pairs.

    A question that is longer than the model's context is answered wrongly: served, it would be refused.

    Raises:
        NightschoolError: If an answer could not be generated.
    """
    answers: list[ProbeAnswer] = []
    questions = eval_set.questions
    for start in range(0, len(questions), _ASKED_AT_ONCE):
        answers += _ask(model, questions[start : start + _ASKED_AT_ONCE], eval_set.limits.max_new_tokens)
    try:
        loss, tokens = _heldout_loss(model, eval_set)
        margins = _margins(model, eval_set)
    except DataError as error:
        # They were chosen for a model with another chat template; this one cannot be compared by its loss.
        sys.stderr.write(f"No held-out loss for {model.ref}: {error}\n")
        loss, tokens, margins = None, 0, ()
    return ScoreSheet(model.ref, loss, tokens, tuple(answers), margins=margins, rules=RULES)


def _ask(model: Examinee, questions: Sequence[ProbeQuestion], max_new_tokens: int) -> Iterator[ProbeAnswer]:
    pending: list[PendingAnswer | PromptTooLong] = []
    for question in questions:
        turns = [Message(turn["role"], turn["content"]) for turn in question.messages]  # type: ignore[arg-type]
        try:
            tokens = min(max_new_tokens, _GENERAL_ANSWER_TOKENS) if question.kind == "general" else max_new_tokens
            pending.append(model.ask_greedily(question.id, turns, tokens))
        except PromptTooLong as error:
            pending.append(error)
    for question, one in zip(questions, pending, strict=True):
        if isinstance(one, PromptTooLong):
            yield question.unanswered(one.prompt_tokens)
            continue
        answer = one.result()
        if answer.finish_reason == "error":
            raise NightschoolError(
                f"{model.ref} failed at the question {shortened(question.question)!r}: {answer.error}. "
                "Nothing was counted; try again."
            )
        yield question.answered(answer.text)


def _heldout_loss(model: Examinee, eval_set: EvalSet) -> tuple[float | None, int]:
    """Nats per token and how many tokens; None where nothing was held out that carries loss."""
    loaded = model.loaded
    examples = [one.chosen for one in eval_set.held_out]
    rendered = render_examples(loaded.tokenizer, examples, _longest(model, eval_set))
    rendered = [document for document in rendered if document.trained_tokens]
    if not rendered:
        return None, 0
    batches = Batches(rendered, tokens_per_batch=_HELD_OUT_TOKENS_PER_BATCH, seed=0)
    with quiet_libraries():
        return heldout_loss(loaded.model, (batches.get(0, index) for index in range(batches.num_batches(0))))


def _margins(model: Examinee, eval_set: EvalSet) -> tuple[PairMargin, ...]:
    pairs = [one for one in eval_set.held_out if one.rejected]
    with quiet_libraries():
        return pair_margins(model.loaded, pairs, _longest(model, eval_set))


def _longest(model: Examinee, eval_set: EvalSet) -> int:
    """Tokens of a held-out example; the rest is cut."""
    return min(eval_set.limits.max_seq_len, model.loaded.context_tokens)
