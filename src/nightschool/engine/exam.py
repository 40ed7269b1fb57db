"""The exam: a candidate and the champion answer the same questions, and the gate decides.

    python -m nightschool.engine.exam --home H --run RUN_ID --candidate name@version [--champion name@version]

A process of its own, so that a server is not disturbed and memory is given back. The report goes into the registry; the
last line on standard output is one JSON object with the decision. Exit code 0 whenever there is one, refused or not.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from nightschool.config.load import load_recipe
from nightschool.config.recipe import Recipe
from nightschool.data.batches import Batches
from nightschool.data.chat.render import render_prompt
from nightschool.data.chat.render_examples import render_examples
from nightschool.data.example import Example, Message
from nightschool.engine.engine import Engine
from nightschool.engine.handle import Handle
from nightschool.engine.request import GenerationRequest, SamplingParams
from nightschool.errors import DataError, NightschoolError, PromptTooLong
from nightschool.evaluation.gate import GateReport, decide
from nightschool.evaluation.heldout import heldout_loss
from nightschool.evaluation.questions import make_questions
from nightschool.evaluation.scores import ProbeAnswer, ProbeQuestion, ScoreSheet
from nightschool.events import read_events
from nightschool.feedback.novelty import learned_by
from nightschool.feedback.pins import Pins
from nightschool.feedback.replay_pool import AcceptedExamples
from nightschool.models.dtype import probe_dtype, resolve_device
from nightschool.models.load import LoadedModel, load_version
from nightschool.models.quiet import quiet_libraries
from nightschool.store.database import open_database
from nightschool.store.home import Home
from nightschool.store.registry import Registry
from nightschool.store.runs import RunStore

_NUM_ROWS = 16
_HELD_OUT_TOKENS_PER_BATCH = 2048
# Some old examples are left out as questions, because a new one or a pin asks the same; so more are drawn than asked.
_OLD_PER_QUESTION = 4
# The seed of the run orders what is replayed. In the same order, exactly that would be asked.
_SEED_APART = 1_000_003


@dataclass(frozen=True)
class EvalSet:
    """What both versions are examined on."""

    questions: list[ProbeQuestion]
    held_out: list[Example]
    max_new_tokens: int
    max_seq_len: int


def examine(home: Home, run_id: str, candidate_ref: str, champion_ref: str | None) -> GateReport:
    """Examine both, decide, and save the report.

    Raises:
        NotFound: If the run or a version does not exist.
        Damaged: If a version was altered.
        ModelError: If a version cannot be loaded or served.
    """
    registry = Registry(home)
    run = RunStore(home).get(run_id)
    recipe = load_recipe(run.recipe_path, env={}).recipe
    candidate = registry.resolve(candidate_ref)
    champion = registry.resolve(champion_ref) if champion_ref else None
    for version in (candidate, champion):
        if version is not None:
            version.verify(digests=True)
    papers: EvalSet | None = None
    sheets: list[ScoreSheet] = []
    for version in (candidate, champion):
        if version is None:
            continue
        device = resolve_device()
        dtype = probe_dtype(device) if device.type == "cuda" else torch.float32
        with quiet_libraries():
            loaded = load_version(version, home, dtype=dtype, device=device, merge=True)
        if papers is None:
            papers = _papers(home, recipe, run.path, loaded.tokenizer)
        sheets.append(_score(version.ref, loaded, papers))
        del loaded  # one model at a time
    report = decide(sheets[0], sheets[1] if champion is not None else None, recipe.gate)
    # With all the answers, so that `nightschool models diff` can compare versions without asking again.
    kept = {"candidate": sheets[0].to_json(), "champion": sheets[1].to_json() if champion is not None else None}
    registry.save_report(candidate.name, candidate.id, report.to_json() | {"sheets": kept})
    return report


def _papers(home: Home, recipe: Recipe, folder: Path, tokenizer: Any) -> EvalSet:
    database = open_database(home)
    accepted = AcceptedExamples(database)
    replayed = {example.digest for example in _read(folder / "replayed.jsonl")}
    old = accepted.sample(
        recipe.name, _OLD_PER_QUESTION * recipe.gate.sample + len(replayed), recipe.train.seed + _SEED_APART
    )
    questions = make_questions(
        _not_accepted(home, recipe, accepted, _read(folder / "new_examples.jsonl")),
        [Example.from_json(row) for row in old],
        Pins(database).ls(recipe.name),
        recipe.gate.sample,
        recipe.train.seed,
        max_answer_tokens=recipe.gate.max_new_tokens,
        count_tokens=lambda text: len(tokenizer(text, add_special_tokens=False)["input_ids"]),
        replayed=replayed,
    )
    return EvalSet(questions, _read(folder / "heldout.jsonl"), recipe.gate.max_new_tokens, recipe.train.max_seq_len)


def _not_accepted(home: Home, recipe: Recipe, accepted: AcceptedExamples, examples: list[Example]) -> list[Example]:
    """The examples of a run without those that are new to its base alone.

    A run that starts anew is taught what the champion knows, too: that is asked as old, so that losing it counts.
    """
    pool = accepted.digests(recipe.name)
    if not any(example.digest in pool for example in examples):
        return examples
    learned = learned_by(home, recipe.name, recipe.base)
    of_base = {row.digest for row in accepted.rows(recipe.name) if learned(row.version)}
    return [example for example in examples if example.digest not in pool or example.digest in of_base]


def _read(path: Path) -> list[Example]:
    return [Example.from_json(row) for row in read_events(path)]


def _score(ref: str, loaded: LoadedModel, papers: EvalSet) -> ScoreSheet:
    """The score sheet of one version: its answers, likeliest token by token, and its held-out loss."""
    engine = Engine(loaded, ref, num_rows=_NUM_ROWS, queue_limit=max(1, len(papers.questions)))
    try:
        answers = _ask(engine, papers)
    finally:
        engine.close()
    loss, tokens = _held_out_loss(loaded, papers)
    return ScoreSheet(ref, loss, tokens, tuple(answers))


def _ask(engine: Engine, papers: EvalSet) -> list[ProbeAnswer]:
    handles = [_submit(engine, question, papers.max_new_tokens) for question in papers.questions]
    answers = []
    for question, handle in zip(papers.questions, handles, strict=True):
        if handle is None:
            answers.append(question.answered(""))
            continue
        generated = handle.result()
        if generated.finish_reason == "error":
            raise NightschoolError(
                f"{engine.base} failed at the question {question.question!r}: {generated.error}. Run the exam again."
            )
        answers.append(question.answered(generated.text))
    return answers


def _submit(engine: Engine, question: ProbeQuestion, max_new_tokens: int) -> Handle | None:
    """Queue a question; None if not even its first word of an answer fits the context, which is a wrong answer."""
    messages = [Message(message["role"], message["content"]) for message in question.messages]  # type: ignore[arg-type]
    prompt_ids = render_prompt(engine.loaded.tokenizer, messages)
    room = engine.context_tokens - len(prompt_ids)
    params = SamplingParams(max_new_tokens=max(1, min(max_new_tokens, room)), temperature=0)
    try:
        return engine.submit(GenerationRequest(question.id, engine.binding, prompt_ids, params))
    except PromptTooLong:
        return None


def _held_out_loss(loaded: LoadedModel, papers: EvalSet) -> tuple[float | None, int]:
    """Nats per token and how many tokens; None where nothing was held out that carries loss."""
    try:
        rendered = render_examples(loaded.tokenizer, papers.held_out, papers.max_seq_len)
        rendered = [document for document in rendered if document.trained_tokens]
    except DataError as error:
        # They were chosen for a model with another chat template; this one cannot be compared by its loss.
        sys.stdout.write(f"No held-out loss for {loaded.ref}: {error}\n")
        return None, 0
    if not rendered:
        return None, 0
    batches = Batches(rendered, tokens_per_batch=_HELD_OUT_TOKENS_PER_BATCH, seed=0)
    with quiet_libraries():
        return heldout_loss(loaded.model, (batches.get(0, index) for index in range(batches.num_batches(0))))


def main(argv: Sequence[str] | None = None) -> int:
    """Run the exam from the command line. Returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m nightschool.engine.exam", description="Examine a candidate.")
    parser.add_argument("--home", type=Path, required=True, help="the nightschool home")
    parser.add_argument("--run", required=True, help="the run that made the candidate")
    parser.add_argument("--candidate", required=True, help="name@version")
    parser.add_argument("--champion", help="name@version; left out, there is none")
    arguments = parser.parse_args(argv)
    home = Home(arguments.home)
    try:
        report = examine(home, arguments.run, arguments.candidate, arguments.champion)
    except NightschoolError as error:
        sys.stderr.write(f"{error}\n")
        return error.exit_code
    candidate = Registry(home).resolve(arguments.candidate)
    last = {
        "decision": report.decision,
        "candidate": report.candidate,
        "champion": report.champion,
        "report": str(Registry(home).report_path(candidate.name, candidate.id)),
    }
    sys.stdout.write(f"{json.dumps(last)}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
