"""What a version is asked, and on which examples its loss is taken; the same for the gate and for `nightschool eval`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from nightschool.config.recipe import Gate, Recipe
from nightschool.data.example import Example
from nightschool.data.study.forms import with_wordings_kept_aside
from nightschool.evaluation.general import GeneralPrompt
from nightschool.evaluation.questions import make_questions
from nightschool.evaluation.scores import Kind, ProbeQuestion
from nightschool.events import read_events
from nightschool.feedback.novelty import learned_by
from nightschool.feedback.pins import Pins
from nightschool.feedback.replay_pool import AcceptedExamples
from nightschool.feedback.selection_files import read_forms
from nightschool.feedback.written_forms import forms_written
from nightschool.memory.adopted import in_memories
from nightschool.store.home import Home
from nightschool.store.runs import Run

DEFAULT_MAX_SEQ_LEN = 1024

# Some old examples are left out as questions, because a new one or a pin asks the same; so more are drawn than asked.
_OLD_PER_QUESTION = 4
# The seed of the run orders what is replayed. In the same order, exactly that would be asked.
_SEED_APART = 1_000_003


@dataclass(frozen=True)
class Limits:
    """At most `sample` questions of a kind, answers of `max_new_tokens`, held-out examples of `max_seq_len` tokens."""

    sample: int = Gate().sample
    max_new_tokens: int = Gate().max_new_tokens
    max_seq_len: int = DEFAULT_MAX_SEQ_LEN

    @classmethod
    def of(cls, recipe: Recipe) -> Limits:
        """The limits by which the gate goes."""
        return cls(recipe.gate.sample, recipe.gate.max_new_tokens, recipe.train.max_seq_len)


@dataclass(frozen=True)
class EvalSet:
    """Questions to ask and examples to take the loss on. Versions that are compared are given the same one.

    To `drift_prompts`, the champion's answers are compared token by token instead of judged.
    """

    questions: Sequence[ProbeQuestion]
    held_out: Sequence[Example]
    limits: Limits = Limits()
    drift_prompts: Sequence[str] = ()

    def without_general(self) -> EvalSet:
        """What is asked where nobody is there to be compared with."""
        return replace(self, questions=[one for one in self.questions if one.kind != "general"], drift_prompts=())

    def only(self, kind: Kind) -> EvalSet:
        """The questions of one kind, without a loss."""
        return replace(self, questions=[one for one in self.questions if one.kind == kind], held_out=())

    @property
    def is_empty(self) -> bool:
        return not self.questions and not self.held_out


def eval_set_of_file(examples: Sequence[Example], limits: Limits, count_tokens: Callable[[str], int]) -> EvalSet:
    """Ask what a data file answers, and take the loss on all of it."""
    questions = make_questions(
        examples, (), (), limits.sample, 0, max_answer_tokens=limits.max_new_tokens, count_tokens=count_tokens
    )
    return EvalSet(questions, examples, limits)


def eval_set_of_general(general: Sequence[GeneralPrompt], limits: Limits) -> EvalSet:
    """Ask what nobody taught."""
    return EvalSet(make_questions((), (), (), limits.sample, 0, general=_answered(general)), (), limits)


def eval_set_of_run(
    home: Home,
    name: str,
    run: Run | None,
    count_tokens: Callable[[str], int],
    *,
    candidate: str,
    general: Sequence[GeneralPrompt] = (),
    limits: Limits | None = None,
) -> EvalSet:
    """Ask what a run taught, what was accepted without it, what is pinned, and what nobody taught.

    The loss is that of the run's held-out examples.

    Args:
        home: Where pins and accepted examples are.
        name: The name that they belong to.
        run: The run which made the candidate; without one there is nothing new.
        count_tokens: The length of a text in the model's tokens.
        candidate: The id of the version that the run made. What it taught is asked as new, also once it was accepted.
        general: What nobody taught.
        limits: How much is asked; by default as much as the run's recipe says.
    """
    recipe = None if run is None else Recipe.model_validate(run.recipe())
    limits = limits or (Limits() if recipe is None else Limits.of(recipe))
    seed = 0 if recipe is None else recipe.train.seed
    taught, replayed, held_out = (
        [] if run is None else _examples(run.path / file)
        for file in ("new_examples.jsonl", "replayed.jsonl", "heldout.jsonl")
    )
    if run is not None:
        taught = with_wordings_kept_aside(taught, [*read_forms(run.path), *forms_written(run.path)])
    accepted = AcceptedExamples(home.database)
    if recipe is not None:
        taught = _without_old(home, recipe, accepted, taught, candidate)
    old = accepted.shuffled(name, seed + _SEED_APART, without=candidate, but=in_memories(home, name).held)
    questions = make_questions(
        taught,
        [Example.from_json(row) for row in old[: _OLD_PER_QUESTION * limits.sample + len(replayed)]],
        Pins(home.database).ls(name),
        limits.sample,
        seed,
        max_answer_tokens=limits.max_new_tokens,
        count_tokens=count_tokens,
        replayed={example.digest for example in replayed},
        general=_answered(general),
    )
    return EvalSet(questions, held_out, limits, [one.question for one in general if one.answer is None])


def _answered(general: Sequence[GeneralPrompt]) -> list[tuple[str, str]]:
    return [(one.question, one.answer) for one in general if one.answer is not None]


def _without_old(
    home: Home, recipe: Recipe, accepted: AcceptedExamples, examples: list[Example], candidate: str
) -> list[Example]:
    """The examples of a run without those that are new to its base alone.

    A run that starts anew is taught what the champion knows, too: that is asked as old, so that losing it counts.
    """
    pool = accepted.digests(recipe.name, without=candidate)
    if not any(example.digest in pool for example in examples):
        return examples
    learned = learned_by(home, recipe.name, recipe.base)
    of_base = {row.digest for row in accepted.rows(recipe.name) if learned(row.version)}
    return [example for example in examples if example.digest not in pool or example.digest in of_base]


def _examples(path: Path) -> list[Example]:
    return [Example.from_json(row) for row in read_events(path)]
