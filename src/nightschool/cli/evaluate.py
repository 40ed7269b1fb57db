"""`nightschool eval`: ask a model questions and count the right answers."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nightschool.cli.formatting import figure
from nightschool.cli.output import answer, bold, note
from nightschool.data.example import Example, Message
from nightschool.data.sources.load import read_file
from nightschool.errors import NameRefused, NightschoolError, NotFound, NothingToTrain, PromptTooLong, UsageError
from nightschool.evaluation.diff import shortened
from nightschool.events import read_events
from nightschool.feedback.pins import Pin, Pins
from nightschool.feedback.replay_pool import AcceptedExamples
from nightschool.store.atomic import write_text
from nightschool.store.database import open_database
from nightschool.store.home import Home
from nightschool.store.names import parse_ref
from nightschool.store.registry import Registry, Version
from nightschool.store.runs import RunStore

SUITES = ("new", "old", "pins")
NUM_ROWS = 16
HELD_OUT_TOKENS_PER_BATCH = 4096


@dataclass(frozen=True)
class Suite:
    """What is asked, by kind, and on which examples the loss is taken."""

    new: Sequence[Example] = ()
    old: Sequence[Example] = ()
    pins: Sequence[Pin] = ()
    held_out: Sequence[Example] = ()


def evaluate(
    model: str = "default",
    /,
    *,
    suite: str | None = None,
    sample: int = 200,
    max_new_tokens: int = 64,
    max_seq_len: int = 1024,
    show_examples: int = 0,
    output_file: Path | None = None,
) -> None:
    """Ask a model questions, greedily, and take its loss on what it was never trained on.

    Without --suite, all that is known of the model is asked: what its run taught (new), what was accepted before
    (old), what is pinned (pins); the loss is that of its run's held-out examples. A question that is longer than the
    model's context is listed as not asked and counts neither as right nor as wrong.

    Args:
        model: NAME (its champion), NAME@VERSION, a folder or a hub id.
        suite: A data file with questions and answers, or one of new, old and pins.
        sample: At most this many questions of a kind.
        max_new_tokens: Longest answer in tokens.
        max_seq_len: Longest held-out example in tokens; the rest of it is cut.
        show_examples: Print this many answers, wrong ones first.
        output_file: Write every question and answer there, one JSON object a line.
    """
    from nightschool.cli.local_model import local_model
    from nightschool.evaluation.questions import make_questions
    from nightschool.evaluation.scores import figure_to_json

    home = Home.find()
    asked = _suite(home, model, suite)
    questions = make_questions(asked.new, asked.old, asked.pins, sample, seed=0, max_answer_tokens=max_new_tokens)
    if not questions and not asked.held_out:
        raise NothingToTrain(
            f"There is nothing to ask {model}: no question of the suite {suite or 'new, old, pins'} and no held-out "
            "example. Name a file: --suite questions.jsonl."
        )
    with local_model(home, model, num_rows=NUM_ROWS) as local:
        answers, not_asked = _ask(local, questions, max_new_tokens)
        loss, tokens = _loss(local, asked.held_out, max_seq_len)
        ref = local.ref
    counts = {
        kind: {"asked": len(of_kind), "correct": sum(one.correct for one in of_kind)}
        for kind in ("new", "old", "pin")
        if (of_kind := [one for one in answers if one.kind == kind])
    }
    perplexity = None if loss is None else math.exp(min(loss, 700.0))
    data: dict[str, Any] = {
        "model": ref,
        "questions": counts,
        "accuracy": sum(one.correct for one in answers) / len(answers) if answers else None,
        "not_asked": not_asked,
        "heldout_loss": figure_to_json(loss),
        "perplexity": figure_to_json(perplexity),
        "heldout_tokens": tokens,
    }
    wrong_first = sorted(answers, key=lambda one: one.correct)[: max(0, show_examples)]
    if output_file is not None:
        write_text(output_file, "".join(json.dumps(one.to_json(), ensure_ascii=False) + "\n" for one in answers))
        note(f"Wrote {len(answers)} answers to {output_file}.")
    if show_examples:
        data["examples"] = [one.to_json() for one in wrong_first]

    def text() -> str:
        lines = [bold(ref)]
        lines += [
            f"{kind:<10} {count['correct']} of {count['asked']} correct ({count['correct'] / count['asked']:.1%})"
            for kind, count in counts.items()
        ]
        if loss is not None:
            lines.append(
                f"{'held-out':<10} {loss:.4f} nats a token over {tokens} tokens, perplexity {figure(perplexity)}"
            )
        if not_asked:
            lines.append(f"{'not asked':<10} {len(not_asked)}, too long for the model's context")
            lines += [
                f"  {one['tokens']} of {one['context_tokens']} tokens  {shortened(one['question'])}"
                for one in not_asked
            ]
        for one in wrong_first:
            lines += ["", f"{'✓' if one.correct else '✗'} {bold(one.question)}"]
            lines += [f"  expected {one.expected}", f"  answered {one.answer}"]
        return "\n".join(lines)

    answer(data, text, quiet=figure(data["accuracy"] if answers else loss) or "")


def _suite(home: Home, model: str, wanted: str | None) -> Suite:
    version = _version(home, model)
    if wanted is not None and wanted not in SUITES:
        path = Path(wanted)
        if not path.exists():
            raise NotFound(f"--suite {wanted!r} is no file, and none of {', '.join(SUITES)}.")
        examples = read_file(path, root=Path.cwd()).examples
        return Suite(new=examples, held_out=examples)
    if version is None:
        raise UsageError(f"{model!r} is no version of ours, so nothing is known of it. Name a file: --suite FILE.")
    kinds = SUITES if wanted is None else (wanted,)
    database = open_database(home)
    return Suite(
        new=_of_run(home, version, "new_examples.jsonl") if "new" in kinds else (),
        old=[Example.from_json(row) for row in AcceptedExamples(database).all(version.name)] if "old" in kinds else (),
        pins=Pins(database).ls(version.name) if "pins" in kinds else (),
        held_out=_of_run(home, version, "heldout.jsonl") if wanted is None else (),
    )


def _version(home: Home, model: str) -> Version | None:
    """The version of the registry that `model` names; None for folders and hub ids."""
    try:
        name = parse_ref(model).name
    except NameRefused:
        return None
    registry = Registry(home)
    return registry.resolve(model) if "@" in model or name in registry.names() else None


def _of_run(home: Home, version: Version, file: str) -> list[Example]:
    if version.facts.run_id is None:
        return []
    try:
        run = RunStore(home).get(version.facts.run_id)
    except NotFound:
        return []
    return [Example.from_json(row) for row in read_events(run.path / file)]


def _ask(local: Any, questions: Sequence[Any], max_new_tokens: int) -> tuple[list[Any], list[dict[str, Any]]]:
    """The answers, and the questions that do not fit the context.

    Raises:
        NightschoolError: If an answer could not be generated.
    """
    answered: list[Any] = []
    not_asked: list[dict[str, Any]] = []
    # As many at a time as the engine has room to queue.
    for start in range(0, len(questions), 128):
        handles = []
        for one in questions[start : start + 128]:
            try:
                handles.append((one, _submit(local, one, max_new_tokens)))
            except PromptTooLong as error:
                facts = {"tokens": error.prompt_tokens, "context_tokens": error.context_tokens}
                not_asked.append({"id": one.id, "kind": one.kind, "question": one.question, **facts})
        for one, handle in handles:
            generated = handle.result()
            if generated.finish_reason == "error":
                raise NightschoolError(
                    f"{local.ref} failed at the question {shortened(one.question)!r}: {generated.error}. Nothing was "
                    "counted; try again."
                )
            answered.append(one.answered(generated.text))
    return answered, not_asked


def _submit(local: Any, question: Any, max_new_tokens: int) -> Any:
    """Queue a question; where the context is nearly full, its answer has what room there is.

    Raises:
        PromptTooLong: If there is none.
    """
    from nightschool.engine.request import SamplingParams

    turns = [Message(turn["role"], turn["content"]) for turn in question.messages]
    try:
        return local.ask(question.id, turns, SamplingParams(max_new_tokens=max_new_tokens, temperature=0))
    except PromptTooLong as error:
        room = error.context_tokens - error.prompt_tokens
        if room < 1:
            raise
        return local.ask(question.id, turns, SamplingParams(max_new_tokens=room, temperature=0))


def _loss(local: Any, held_out: Sequence[Example], max_seq_len: int) -> tuple[float | None, int]:
    """Nats per token, and tokens; None if nothing is held out."""
    from nightschool.data.batches import Batches
    from nightschool.data.chat.render_examples import render_examples
    from nightschool.evaluation.heldout import heldout_loss

    rendered = render_examples(local.loaded.tokenizer, held_out, min(max_seq_len, local.loaded.context_tokens))
    rendered = [one for one in rendered if one.trained_tokens]
    if not rendered:
        return None, 0
    batches = Batches(rendered, tokens_per_batch=HELD_OUT_TOKENS_PER_BATCH, seed=0)
    return heldout_loss(local.loaded.model, (batches.get(0, index) for index in range(batches.num_batches(0))))
