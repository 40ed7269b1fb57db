"""Look at one version beside its base and the version before it: perplexity on what its run held out, answers to prompts.

    python -m nightschool.engine.evaluate --home H --version name@version [--previous name@version] < prompts.json

A process of its own, so that a server is not disturbed and its bytes are given back. It reads one JSON object with
`prompts`, each with an `instruction` and perhaps an `expected_response`, and `max_new_tokens`; it prints one JSON object.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from nightschool.config.recipe import Recipe
from nightschool.engine.local_model import local_model
from nightschool.errors import Damaged, ModelError, NightschoolError, NotFound
from nightschool.evaluation.eval_set import EvalSet, Limits
from nightschool.evaluation.examiner import examine
from nightschool.evaluation.scores import ProbeQuestion, ScoreSheet, figure_to_json
from nightschool.feedback.selection_files import read_selection
from nightschool.models.cost import count_parameters
from nightschool.store.home import Home
from nightschool.store.registry import Registry, Version
from nightschool.store.runs import RunStore
from nightschool.work.processes import live

NUM_ROWS = 16
# A loss above this has no perplexity that a float could hold.
_LARGEST_LOSS = 700.0


@dataclass(frozen=True)
class Looked:
    """What one model scored, and its size: parameters, those of them that a run of its kind trains, bytes of all."""

    sheet: ScoreSheet
    total_parameters: int
    trainable_parameters: int
    weight_bytes: int


def evaluate_version(
    home: Home, ref: str, previous: str | None, prompts: Sequence[Mapping[str, str]], max_new_tokens: int
) -> dict[str, Any]:
    """The figures of a version, and of what it is compared with, as plain JSON.

    Args:
        home: Where the version and its run are.
        ref: `name@version`.
        previous: What was served before it, if anything was.
        prompts: What is asked, each by itself.
        max_new_tokens: Longest answer.

    Raises:
        NotFound, Damaged, ModelError: If the version is not there or cannot be loaded. Of the others, `notes` says so.
    """
    version = Registry(home).resolve(ref)
    eval_set = _eval_set(home, version, prompts, max_new_tokens)
    looked = _look(home, version.ref, eval_set)
    others: dict[str, ScoreSheet] = {}
    notes = []
    for what, other in (("base", version.facts.base or None), ("previous", previous)):
        if other is None or other.startswith("new:"):
            continue
        try:
            others[what] = replace(_look(home, other, eval_set).sheet, version=other)
        except (NotFound, Damaged, ModelError) as error:
            notes.append(f"The {what} {other} could not be asked: {error}")
    if not eval_set.held_out:
        notes.append("Nothing was held out, so there is no perplexity.")
    return {
        **_loss_of(looked.sheet),
        "test_responses": [_responses(index, prompt, looked.sheet, others) for index, prompt in enumerate(prompts)],
        "total_parameters": looked.total_parameters,
        "trainable_parameters": looked.trainable_parameters,
        "model_size_mb": round(looked.weight_bytes / 2**20, 2),
        "compared_with": {what: {"model": sheet.version, **_loss_of(sheet)} for what, sheet in others.items()},
        "notes": notes,
    }


def _eval_set(home: Home, version: Version, prompts: Sequence[Mapping[str, str]], max_new_tokens: int) -> EvalSet:
    run = RunStore(home).which_made(version)
    limits, selection = Limits(), None
    if run is not None:
        limits, selection = Limits.of(Recipe.model_validate(run.recipe())), read_selection(run.path)
    questions = [
        ProbeQuestion(
            id=str(index),
            kind="new",
            question=prompt["instruction"],
            expected=prompt.get("expected_response", ""),
            messages=[{"role": "user", "content": prompt["instruction"]}],
        )
        for index, prompt in enumerate(prompts)
    ]
    held_out = [] if selection is None else selection.held_out
    return EvalSet(questions, held_out, replace(limits, max_new_tokens=max_new_tokens))


def _look(home: Home, ref: str, eval_set: EvalSet) -> Looked:
    with local_model(home, ref, num_rows=NUM_ROWS) as model:
        loaded = model.loaded.model
        count = count_parameters(loaded)
        weight_bytes = sum(parameter.numel() * parameter.element_size() for parameter in loaded.parameters())
        return Looked(examine(model, eval_set), count.total, count.adapters or count.total, weight_bytes)


def _loss_of(sheet: ScoreSheet) -> dict[str, Any]:
    """Perplexity and loss; nothing where nothing was held out."""
    if sheet.heldout_loss is None:
        return {}
    loss = sheet.heldout_loss
    perplexity = loss if math.isnan(loss) else math.exp(min(loss, _LARGEST_LOSS))
    return {
        "perplexity": figure_to_json(perplexity),
        "heldout_loss": figure_to_json(loss),
        "heldout_tokens": sheet.heldout_tokens,
    }


def _responses(
    index: int, prompt: Mapping[str, str], sheet: ScoreSheet, others: Mapping[str, ScoreSheet]
) -> dict[str, Any]:
    """What each model answers to one prompt."""
    answer = sheet.answers[index]
    row = {"instruction": prompt["instruction"], "generated_response": answer.answer}
    if answer.overlong_tokens is not None:
        row["error"] = f"The prompt has {answer.overlong_tokens} tokens, more than the context holds."
    if "expected_response" in prompt:
        row["expected_response"] = prompt["expected_response"]
    return row | {f"{what}_response": other.answers[index].answer for what, other in others.items()}


def main(argv: Sequence[str] | None = None) -> int:
    """Evaluate what the command line names. Returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m nightschool.engine.evaluate", description="Look at a version.")
    parser.add_argument("--home", type=Path, required=True, help="the nightschool home")
    parser.add_argument("--version", required=True, help="name@version")
    parser.add_argument("--previous", help="name@version of what was served before; left out, nothing was")
    arguments = parser.parse_args(argv)
    told = json.loads(sys.stdin.read())
    try:
        found = evaluate_version(
            Home(arguments.home), arguments.version, arguments.previous, told["prompts"], told["max_new_tokens"]
        )
    except NightschoolError as error:
        sys.stdout.write(json.dumps({"error": {"code": error.code, "message": str(error)}}) + "\n")
        return error.exit_code
    sys.stdout.write(json.dumps(found, ensure_ascii=False) + "\n")
    return 0


if __name__ == "__main__":
    live(main)
