"""Ask a candidate and the champion the same questions, let the gate decide, and save its report.

    python -m nightschool.engine.compare --home H --run RUN_ID --candidate name@version [--champion name@version]

In the first night of a name, the base takes the champion's place. A process of its own, so that a server is not disturbed and its bytes are given back. The report goes into the registry;
the last line on standard output is one JSON object with the decision. Exit code 0 whenever there is one, refused or not.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from nightschool.config.recipe import Recipe
from nightschool.engine.local_model import LocalModel, local_model
from nightschool.errors import Damaged, ModelError, NightschoolError, NotFound
from nightschool.evaluation.drift import ChampionAnswers, champion_answers, drift
from nightschool.evaluation.eval_set import EvalSet, eval_set_of_run
from nightschool.evaluation.examiner import examine
from nightschool.evaluation.gate import GateReport, decide
from nightschool.evaluation.general import general_prompts
from nightschool.evaluation.scores import ScoreSheet
from nightschool.models.load import load_tokenizer
from nightschool.store.home import Home
from nightschool.store.registry import Registry, Version
from nightschool.store.runs import Run, RunStore

NUM_ROWS = 16


@dataclass(frozen=True)
class Champion:
    """What the candidate is compared with. `note` says why it is nobody, or nothing."""

    sheet: ScoreSheet | None = None
    answers: ChampionAnswers | None = None
    note: str = ""


def compare(
    home: Home, run_id: str, candidate_ref: str, champion_ref: str | None, *, root: Path | None = None
) -> GateReport:
    """Examine both, decide, and save the report.

    Without a champion it is the base of the run that the candidate is compared with, as it would be served.

    Args:
        home: Where the run and the versions are.
        run_id: The run that made the candidate.
        candidate_ref: `name@version`.
        champion_ref: `name@version`, or None if there is none yet.
        root: Where relative paths of the recipe begin; the working directory without it.

    Raises:
        NotFound: If the run or a version does not exist.
        Damaged: If a version was altered.
        ModelError: If a version cannot be loaded or served.
    """
    registry, root = Registry(home), root or Path.cwd()
    run = RunStore(home).get(run_id)
    recipe = Recipe.model_validate(run.recipe())
    candidate = registry.resolve(candidate_ref)
    champion = registry.resolve(champion_ref) if champion_ref else None
    for version in (candidate, champion):
        if version is not None:
            version.verify(digests=True)
    eval_set = _eval_set(home, run, recipe, candidate, root)
    # One model at a time, and the champion first: to what it answers, the candidate is held.
    compared = _champion(home, recipe, champion, eval_set, root)
    with local_model(home, candidate.ref, num_rows=NUM_ROWS) as model:
        sheet = examine(model, eval_set if compared.sheet is not None else eval_set.without_general())
        if compared.answers is not None:
            drifted, tokens = drift(model, compared.answers)
            sheet = replace(sheet, drift=drifted, drift_tokens=tokens)
    report = decide(sheet, compared.sheet, recipe.gate, [compared.note] if compared.note else ())
    # With all the answers, so that `nightschool models diff` can compare versions without asking again.
    saved = {"candidate": sheet.to_json(), "champion": compared.sheet.to_json() if compared.sheet is not None else None}
    registry.save_report(candidate.name, candidate.id, report.to_json() | {"sheets": saved})
    return report


def _eval_set(home: Home, run: Run, recipe: Recipe, candidate: Version, root: Path) -> EvalSet:
    # Of an adapter version, the tokenizer lies beside the adapter, too.
    tokenizer = load_tokenizer(candidate.path, candidate.ref)
    return eval_set_of_run(
        home,
        candidate.name,
        run,
        lambda text: len(tokenizer(text, add_special_tokens=False)["input_ids"]),
        candidate=candidate.id,
        general=general_prompts(recipe.gate.general, root),
    )


def _champion(home: Home, recipe: Recipe, champion: Version | None, eval_set: EvalSet, root: Path) -> Champion:
    if champion is not None:
        with local_model(home, champion.ref, num_rows=NUM_ROWS) as model:
            return _examined(model, eval_set)
    if recipe.base.startswith("new:"):
        return Champion(note=f"The base {recipe.base} is random weights, which answer nothing: nothing could be lost.")
    try:
        with local_model(home, recipe.base, num_rows=NUM_ROWS, root=root) as model:
            of_base = _examined(model, eval_set)
    except (ModelError, NotFound, Damaged) as error:
        return Champion(note=f"The base {recipe.base} could not be asked what it knows: {error}")
    assert of_base.sheet is not None, "it was just made"
    return replace(of_base, sheet=replace(of_base.sheet, version=recipe.base, is_base=True))


def _examined(model: LocalModel, eval_set: EvalSet) -> Champion:
    return Champion(examine(model, eval_set), champion_answers(model, eval_set.drift_prompts))


def main(argv: Sequence[str] | None = None) -> int:
    """Compare what the command line names. Returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m nightschool.engine.compare", description="Examine a candidate.")
    parser.add_argument("--home", type=Path, required=True, help="the nightschool home")
    parser.add_argument("--run", required=True, help="the run that made the candidate")
    parser.add_argument("--candidate", required=True, help="name@version")
    parser.add_argument("--champion", help="name@version; left out, there is none yet, and the base takes its place")
    arguments = parser.parse_args(argv)
    home = Home(arguments.home)
    try:
        report = compare(home, arguments.run, arguments.candidate, arguments.champion)
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
