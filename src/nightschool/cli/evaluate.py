"""`nightschool eval`: ask a model questions and count the right answers."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from nightschool.cli.eval_data_sets import Programs, evaluate_data_sets
from nightschool.cli.eval_editing import evaluate_editing
from nightschool.cli.eval_judge import judge_named, judged_lines, judged_to_json
from nightschool.cli.eval_tasks import evaluate_tasks
from nightschool.cli.formatting import figure
from nightschool.cli.output import answer, bold, note
from nightschool.config.data_sets import PromptStyle
from nightschool.config.judge import Judge
from nightschool.data.example import Example
from nightschool.data.sources.load import read_file
from nightschool.errors import NameRefused, NotFound, NothingToTrain, UsageError
from nightschool.jobs.outcome import root_of
from nightschool.store.atomic import write_text
from nightschool.store.home import Home
from nightschool.store.names import parse_ref
from nightschool.store.registry import Registry, Version
from nightschool.store.runs import Run, RunStore

if TYPE_CHECKING:
    from nightschool.config.recipe import Recipe
    from nightschool.engine.local_model import LocalModel
    from nightschool.evaluation.eval_set import EvalSet, Limits
    from nightschool.evaluation.model_judge import Judged
    from nightschool.evaluation.scores import Kind, ScoreSheet

# What --suite calls the kinds of questions.
SUITES: Mapping[str, Kind] = {"new": "new", "old": "old", "pins": "pin", "general": "general"}
# Suites that bring questions, figures and a table of their own.
EXAMS = {"editing": evaluate_editing}
NUM_ROWS = 16


def evaluate(
    model: str = "default",
    /,
    *,
    suite: str | None = None,
    dataset: str | None = None,
    data_dir: Path | None = None,
    tasks: str | None = None,
    task_dir: Path | None = None,
    num_fewshot: int | None = None,
    max_samples: int | None = None,
    prompt_style: PromptStyle = "plain",
    programs: Programs = "confined",
    sample: int | None = None,
    max_new_tokens: int | None = None,
    max_seq_len: int | None = None,
    show_examples: int = 0,
    output_file: Path | None = None,
    cases: Path | None = None,
    memory: str | None = None,
    memory_read: Literal["layers", "prompt", "off"] | None = None,
    experts_resident: int | None = None,
    judge: str | None = None,
    judge_model: str | None = None,
) -> int:
    """Ask a model questions, greedily, and take its loss on what it was never trained on.

    Without --suite, a version is asked what the gate asks of it: what its run taught (new), what was accepted before
    (old), what is pinned (pins), what nobody taught (general); the loss is that of its run's held-out examples. A question that is longer than the
    model's context is listed as not asked, and counts as wrong.

    --suite editing writes facts into a memory beside the model, asks for them, for what follows from them and for what is to stay, deletes them and
    asks again. No memory of yours is written to.

    --dataset takes loss, perplexity and token accuracy on what data sets hold out, and judges answers: the last number of GSM8K's, the
    programs of MBPP's and HumanEval's by their tests. Programs run confined: no network, no other process, no file but their own.

    --tasks asks tasks of lm-eval by its own harness (pip install 'nightschool[lm-eval]'), whose data come from the Hub or from files of yours.

    Args:
        model: NAME (its champion), NAME@VERSION, a folder, a GGUF file or a hub id.
        suite: A data file with questions and answers, or one of new, old, pins, general and editing.
        dataset: Data sets with commas, as chat,code,reasoning or all, or single ones as gsm8k,humaneval (docs/evaluation.md).
        data_dir: Of data sets: the folder where they lie; without it datasets/ of the home, else the Hub.
        tasks: Tasks or groups of lm-eval with commas, as arc_easy,hellaswag, or those of --task-dir.
        task_dir: Of tasks: a folder with task files of yours. Python that they hold runs here.
        num_fewshot: Of tasks: solved examples before each question; by default as the task says.
        max_samples: Of data sets and tasks: at most this many held-out rows of each, the first ones.
        prompt_style: Of data sets: how questions are put, as a person would or under headings.
        programs: Of data sets: how programs that a model wrote are run; off asks for none.
        sample: At most this many questions of a kind, or of a data set; by default as its run's recipe says, else 200.
        max_new_tokens: Longest answer in tokens; by default as its run's recipe says, else 64; of data sets 256.
        max_seq_len: Longest held-out example in tokens, by default as its run's recipe says, else 1024; the rest is cut.
        show_examples: Print this many answers, wrong ones first.
        output_file: Write every question and answer there, one JSON object a line; of editing, what is not as it should be; of data sets,
            all figures as one JSON object.
        cases: Of editing: the file with edits and their questions (docs/memory.md); CounterFact, zsRE and MQuAKE, too.
        memory: Of editing: the memory that the edits lie over; without it they stand alone.
        memory_read: Of editing: how the model reads, through its layers or in its prompt, or off; without it as it can.
        experts_resident: So many experts of a mixture are in memory at a time, those that are used most. All of them without it.
        judge: Where the API of a model begins that judges what was taught in place of the rules, as http://127.0.0.1:8001/v1, or off; by
            default as its run's recipe says (gate.judge). What it changed is told; if it cannot be asked, the rules' verdicts are
            told and the command fails.
        judge_model: The name of the model there.
    """
    from nightschool.config.recipe import Recipe
    from nightschool.engine.local_model import local_model
    from nightschool.evaluation.examiner import examine
    from nightschool.evaluation.model_judge import judge_sheets

    if sum(one is not None for one in (suite, dataset, tasks)) > 1:
        raise UsageError("--suite, --dataset and --tasks each say what is asked. Name one of them.")
    if tasks is None and (task_dir is not None or num_fewshot is not None):
        raise UsageError("--task-dir and --num-fewshot belong to --tasks. Name it, or leave them out.")
    if (judge or judge_model) and (tasks or dataset or suite in EXAMS):
        raise UsageError("--judge and --judge-model are for questions with an answer. Leave them out.")
    if tasks is not None:
        _refuse_others(data_dir=data_dir, sample=sample, max_new_tokens=max_new_tokens, cases=cases, memory=memory)
        evaluate_tasks(
            model, tasks, task_dir=task_dir, num_fewshot=num_fewshot, max_samples=max_samples, max_seq_len=max_seq_len,
            output_file=output_file,
        )  # fmt: skip
        return 0
    if dataset is not None:
        evaluate_data_sets(
            model, dataset, data_dir=data_dir, max_samples=max_samples, sample=sample, prompt_style=prompt_style, programs=programs,
            max_new_tokens=max_new_tokens, max_seq_len=max_seq_len, show_examples=show_examples, output_file=output_file,
            experts_resident=experts_resident,
        )  # fmt: skip
        return 0
    if data_dir is not None or max_samples is not None or prompt_style != "plain" or programs != "confined":
        raise UsageError(
            "--data-dir, --max-samples, --prompt-style and --programs belong to --dataset. Name it, or leave them out."
        )
    if suite in EXAMS:
        EXAMS[suite](
            model, cases=cases, memory=memory, memory_read=memory_read, sample=sample, max_new_tokens=max_new_tokens,
            show_examples=show_examples, output_file=output_file, experts_resident=experts_resident,
        )  # fmt: skip
        return 0
    if cases is not None or memory is not None or memory_read is not None:
        raise UsageError("--cases, --memory and --memory-read belong to --suite editing. Name it, or leave them out.")
    home = Home.find()
    version = _version(home, model)
    examples = _examples_of(model, version, suite)
    run = None if version is None else RunStore(home).which_made(version)
    recipe = None if run is None else Recipe.model_validate(run.recipe())
    of_recipe = Judge() if recipe is None else recipe.gate.judge
    asked = judge_named(of_recipe, judge, judge_model)
    given = {"sample": sample, "max_new_tokens": max_new_tokens, "max_seq_len": max_seq_len}
    with local_model(home, model, num_rows=NUM_ROWS, experts_resident=experts_resident) as local:
        eval_set = _eval_set(
            home, local, version, run, recipe, suite, examples, {k: v for k, v in given.items() if v is not None}
        )
        if eval_set.is_empty:
            raise NothingToTrain(
                f"There is nothing to ask {model}: no question of the suite {suite or ', '.join(SUITES)} and no held-out "
                "example. Name a file: --suite questions.jsonl."
            )
        sheet = examine(local, eval_set)
        context_tokens = local.context_tokens
    judged = None if asked is None else judge_sheets(asked, sheet, None)
    if judged is not None:
        sheet = judged.candidate
    if output_file is not None:
        write_text(output_file, "".join(json.dumps(one.to_json(), ensure_ascii=False) + "\n" for one in sheet.answers))
        note(f"Wrote {len(sheet.answers)} answers to {output_file}.")
    _show(sheet, context_tokens, show_examples, judged)
    return 1 if judged is not None and judged.failure else 0


def _refuse_others(**given: object) -> None:
    """Raise UsageError for an option that has no meaning for tasks."""
    for name, value in given.items():
        if value is not None:
            raise UsageError(f"--{name.replace('_', '-')} does not belong to --tasks. Leave it out.")


def _show(sheet: ScoreSheet, context_tokens: int, show_examples: int, judged: Judged | None) -> None:
    from nightschool.evaluation.diff import shortened
    from nightschool.evaluation.scores import figure_to_json

    counts = {
        kind: {"asked": len(of_kind), "correct": sum(one.correct for one in of_kind)}
        for kind in SUITES.values()
        if (of_kind := sheet.of_kind(kind))
    }
    not_asked = [
        {"id": one.id, "kind": one.kind, "question": one.question}
        | {"tokens": one.overlong_tokens, "context_tokens": context_tokens}
        for one in sheet.answers
        if one.overlong_tokens is not None
    ]
    loss, num_asked = sheet.heldout_loss, len(sheet.answers)
    perplexity = None if loss is None else math.exp(min(loss, 700.0))
    data: dict[str, Any] = {
        "model": sheet.version,
        "questions": counts,
        "accuracy": sum(one.correct for one in sheet.answers) / num_asked if num_asked else None,
        "not_asked": not_asked,
        "heldout_loss": figure_to_json(loss),
        "perplexity": figure_to_json(perplexity),
        "heldout_tokens": sheet.heldout_tokens,
    }
    if judged is not None:
        data["judge"] = judged_to_json(judged)
    if sheet.margins:
        data["pairs"] = {"held_out": len(sheet.margins), "right": sum(pair.right for pair in sheet.margins)}
    wrong_first = sorted(sheet.answers, key=lambda one: one.correct)[: max(0, show_examples)]
    if show_examples:
        data["examples"] = [one.to_json() for one in wrong_first]

    def text() -> str:
        lines = [bold(sheet.version)]
        lines += [
            f"{kind:<10} {count['correct']} of {count['asked']} correct ({count['correct'] / count['asked']:.1%})"
            for kind, count in counts.items()
        ]
        lines += [] if judged is None else judged_lines(judged)
        if loss is not None:
            lines.append(
                f"{'held-out':<10} {loss:.4f} nats a token over {sheet.heldout_tokens} tokens, "
                f"perplexity {figure(perplexity)}"
            )
        if sheet.margins:
            pairs = data["pairs"]
            lines.append(
                f"{'pairs':<10} the better answer is the likelier one in {pairs['right']} of {pairs['held_out']}"
            )
        if not_asked:
            lines.append(f"{'not asked':<10} {len(not_asked)}, too long for the model's context, counted as wrong")
            lines += [
                f"  {one['tokens']} of {context_tokens} tokens  {shortened(str(one['question']))}" for one in not_asked
            ]
        for one in wrong_first:
            lines += ["", f"{'✓' if one.correct else '✗'} {bold(one.question)}"]
            lines += [f"  expected {one.expected}", f"  answered {one.answer}"]
        return "\n".join(lines)

    answer(data, text, quiet=figure(data["accuracy"] if num_asked else loss) or "")


def _examples_of(model: str, version: Version | None, suite: str | None) -> list[Example] | None:
    """What the file that --suite names holds; None where a version's own questions are meant."""
    if suite is not None and suite not in SUITES:
        if not Path(suite).exists():
            raise NotFound(f"--suite {suite!r} is neither a file nor one of {', '.join([*SUITES, *EXAMS])}.")
        return read_file(Path(suite), root=Path.cwd()).examples
    if version is None and suite != "general":
        raise UsageError(
            f"{model!r} is not a version of ours, so nothing is known of it. Name a file: --suite FILE, or --suite general."
        )
    return None


def _eval_set(
    home: Home,
    local: LocalModel,
    version: Version | None,
    run: Run | None,
    recipe: Recipe | None,
    suite: str | None,
    examples: list[Example] | None,
    given: dict[str, int],
) -> EvalSet:
    from nightschool.config.recipe import GENERAL_OF_NIGHTSCHOOL
    from nightschool.evaluation.eval_set import Limits, eval_set_of_file, eval_set_of_general, eval_set_of_run
    from nightschool.evaluation.general import general_prompts

    if examples is not None:
        return eval_set_of_file(examples, Limits(**given), local.count_tokens)
    if version is None:
        return eval_set_of_general(general_prompts(GENERAL_OF_NIGHTSCHOOL, Path.cwd()), Limits(**given))
    began_in = Path.cwd() if run is None else root_of(run)
    general = general_prompts(GENERAL_OF_NIGHTSCHOOL if recipe is None else recipe.gate.general, began_in)
    limits: Limits = replace(Limits() if recipe is None else Limits.of(recipe), **given)
    eval_set = eval_set_of_run(
        home, version.name, run, local.count_tokens, candidate=version.id, general=general, limits=limits
    )
    return eval_set if suite is None else eval_set.only(SUITES[suite])


def _version(home: Home, model: str) -> Version | None:
    """The version of the registry that `model` names; None for folders and hub ids."""
    try:
        name = parse_ref(model).name
    except NameRefused:
        return None
    registry = Registry(home)
    return registry.resolve(model) if "@" in model or name in registry.names() else None
