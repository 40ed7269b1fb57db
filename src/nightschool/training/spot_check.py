"""Spot checks: between two steps, the model in training is asked what it shall learn, and how far it drifted.

The questions are those of the gate, in wordings that are not trained where there are any; the open prompts are the gate's, too,
and are never rehearsed. All is answered greedily and in batches; nothing is drawn at random, and the model is left as it was found.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import torch

from nightschool.config.recipe import Recipe
from nightschool.data.chat.render import render_prompt, stop_token_ids
from nightschool.data.example import Example, Message
from nightschool.data.study.forms import with_wordings_kept_aside
from nightschool.errors import PromptTooLong
from nightschool.evaluation.drift import ChampionAnswers, champion_answers, drift
from nightschool.evaluation.eval_set import EvalSet, Limits
from nightschool.evaluation.examiner import examine
from nightschool.evaluation.general import general_prompts
from nightschool.evaluation.heldout import as_found, autocast
from nightschool.evaluation.questions import make_questions
from nightschool.evaluation.scores import ProbeQuestion
from nightschool.evaluation.spot_check import SpotCheck
from nightschool.feedback.selection import Selection
from nightschool.models.load import LoadedModel
from nightschool.models.quiet import quiet_libraries
from nightschool.training.continuation import greedy_answers
from nightschool.training.distributed.world import World
from nightschool.training.planning.asking import seconds_to_answer

MOST_QUESTIONS = 64
MOST_PROMPTS = 16
# What an answer may be longer than the longest that is expected.
_SPARE_TOKENS = 16
_ANSWERED_AT_ONCE = 32


@dataclass(frozen=True)
class SpotCheckSet:
    """What is asked at each spot check: questions with answers of at most `max_new_tokens`, and open prompts."""

    questions: Sequence[ProbeQuestion]
    prompts: Sequence[str]
    max_new_tokens: int

    @classmethod
    def of(cls, recipe: Recipe, selection: Selection, root: Path, tokenizer: Any) -> Self | None:
        """None where the gate could ask nothing of what is new.

        Raises:
            NotFound, DataError: If `gate.general` cannot be read.
        """

        def count_tokens(text: str) -> int:
            return len(tokenizer(text, add_special_tokens=False)["input_ids"])

        longest = recipe.gate.max_new_tokens
        taught: list[Example] = with_wordings_kept_aside(selection.new, selection.forms)
        questions = make_questions(
            taught, (), (), min(MOST_QUESTIONS, recipe.gate.sample), recipe.train.seed,
            max_answer_tokens=longest, count_tokens=count_tokens,
        )  # fmt: skip
        if not questions:
            return None
        needed = max(count_tokens(question.expected) for question in questions) + _SPARE_TOKENS
        # Random weights say nothing from which one could drift.
        is_new = recipe.base.startswith("new:")
        prompts = (
            [] if is_new else [one.question for one in general_prompts(recipe.gate.general, root) if not one.answer]
        )
        return cls(questions, prompts[:MOST_PROMPTS], min(longest, needed))

    def seconds(self, loaded: LoadedModel) -> float:
        """About how long the questions of one spot check take, where no answer ends early."""
        conversations = [[Message(**turn) for turn in question.messages] for question in self.questions]  # type: ignore[arg-type]
        prompts = [render_prompt(loaded.tokenizer, turns) for turns in conversations]
        return seconds_to_answer(loaded.model, loaded.tokenizer, prompts, self.max_new_tokens, _ANSWERED_AT_ONCE)


class SpotChecks:
    """Asks a model in training. Several processes take a part of the questions and prompts each, and find the same.

    It is made before the first step, also of a run that goes on: then the model is what the run began with.
    """

    def __init__(self, asked: SpotCheckSet, loaded: LoadedModel, compute_dtype: torch.dtype, world: World) -> None:
        self._model = ModelInTraining(loaded)
        self._device = next(loaded.model.parameters()).device
        self._dtype, self._world = compute_dtype, world
        mine = slice(world.rank, None, world.size)
        self._questions = EvalSet(asked.questions[mine], (), Limits(max_new_tokens=asked.max_new_tokens))
        with self._answering():
            self._before: ChampionAnswers = champion_answers(self._model, asked.prompts[mine])

    def __call__(self, step: int) -> SpotCheck:
        """What the model has learned by this step, and its drift. All processes call it."""
        with self._answering():
            answers = examine(self._model, self._questions).answers
            mean, tokens = drift(self._model, self._before)
        right, asked, total, of_tokens = self._world.float_sums(
            sum(answer.correct for answer in answers), len(answers), (mean or 0.0) * tokens, tokens
        )
        return SpotCheck(step, right / asked, total / of_tokens if of_tokens else None)

    def _answering(self) -> AbstractContextManager[object]:
        return autocast(self._device, self._dtype)


@dataclass
class _Asked:
    """A prompt, and its answer once it is there."""

    prompt_ids: list[int]
    max_new_tokens: int
    answer_ids: tuple[int, ...] | None = None


@dataclass(frozen=True)
class _Answer:
    text: str
    token_ids: tuple[int, ...]
    finish_reason: str = "stop"
    error: str | None = None


@dataclass
class ModelInTraining:
    """A model between two steps, as the examiner asks one: questions wait until an answer is wanted, and are then answered together."""

    loaded: LoadedModel
    _waiting: list[_Asked] = field(default_factory=list)

    @property
    def ref(self) -> str:
        return self.loaded.ref

    def ask_greedily(self, request_id: str, messages: Sequence[Message], max_new_tokens: int) -> _Pending:  # noqa: ARG002
        """Queue a conversation. Raises PromptTooLong if the context has no room for one token of an answer."""
        prompt_ids = render_prompt(self.loaded.tokenizer, messages)
        free_tokens = self.loaded.context_tokens - len(prompt_ids)
        if free_tokens < 1:
            raise PromptTooLong(len(prompt_ids), 1, self.loaded.context_tokens)
        asked = _Asked(prompt_ids, min(max_new_tokens, free_tokens))
        self._waiting.append(asked)
        return _Pending(self, asked)

    def answer_all(self) -> None:
        """Answer what waits, prompts of about one length together."""
        waiting, self._waiting = sorted(self._waiting, key=lambda one: len(one.prompt_ids)), []
        model, tokenizer = self.loaded.model, self.loaded.tokenizer
        with quiet_libraries(), as_found(model), torch.no_grad():
            for start in range(0, len(waiting), _ANSWERED_AT_ONCE):
                some = waiting[start : start + _ANSWERED_AT_ONCE]
                longest = max(one.max_new_tokens for one in some)
                found = greedy_answers(model, tokenizer, [one.prompt_ids for one in some], longest)
                for one, answer_ids in zip(some, found, strict=True):
                    one.answer_ids = answer_ids[: one.max_new_tokens]


@dataclass(frozen=True)
class _Pending:
    """The answer to one question."""

    model: ModelInTraining
    asked: _Asked

    def result(self) -> _Answer:
        if self.asked.answer_ids is None:
            self.model.answer_all()
        ids, tokenizer = self.asked.answer_ids or (), self.model.loaded.tokenizer
        if ids and ids[-1] in stop_token_ids(tokenizer):
            ids = ids[:-1]
        text = tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return _Answer(str(text), ids)
