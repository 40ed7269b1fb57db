"""Ask a candidate and the champion the same questions, let the gate decide, and save its report.

    python -m nightschool.engine.compare --home H --run RUN_ID --candidate name@version [--champion name@version]

A process of its own, so that a server is not disturbed and its bytes are given back. The report goes into the registry;
the last line on standard output is one JSON object with the decision. Exit code 0 whenever there is one, refused or not.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from nightschool.config.recipe import Recipe
from nightschool.engine.local_model import local_model
from nightschool.errors import NightschoolError
from nightschool.evaluation.eval_set import EvalSet, eval_set_of_run
from nightschool.evaluation.examiner import examine
from nightschool.evaluation.gate import GateReport, decide
from nightschool.evaluation.scores import ScoreSheet
from nightschool.store.home import Home
from nightschool.store.registry import Registry
from nightschool.store.runs import RunStore

NUM_ROWS = 16


def compare(home: Home, run_id: str, candidate_ref: str, champion_ref: str | None) -> GateReport:
    """Examine both, decide, and save the report.

    Raises:
        NotFound: If the run or a version does not exist.
        Damaged: If a version was altered.
        ModelError: If a version cannot be loaded or served.
    """
    registry = Registry(home)
    run = RunStore(home).get(run_id)
    candidate = registry.resolve(candidate_ref)
    champion = registry.resolve(champion_ref) if champion_ref else None
    for version in (candidate, champion):
        if version is not None:
            version.verify(digests=True)
    eval_set: EvalSet | None = None
    sheets: list[ScoreSheet] = []
    for version in (candidate, champion):
        if version is None:
            continue
        with local_model(home, version.ref, num_rows=NUM_ROWS) as model:  # one model at a time
            if eval_set is None:
                eval_set = eval_set_of_run(home, candidate.name, run, model.count_tokens, candidate=candidate.id)
            sheets.append(examine(model, eval_set))
    rules = Recipe.model_validate(run.recipe()).gate
    report = decide(sheets[0], sheets[1] if champion is not None else None, rules)
    # With all the answers, so that `nightschool models diff` can compare versions without asking again.
    saved = {"candidate": sheets[0].to_json(), "champion": sheets[1].to_json() if champion is not None else None}
    registry.save_report(candidate.name, candidate.id, report.to_json() | {"sheets": saved})
    return report


def main(argv: Sequence[str] | None = None) -> int:
    """Compare what the command line names. Returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m nightschool.engine.compare", description="Examine a candidate.")
    parser.add_argument("--home", type=Path, required=True, help="the nightschool home")
    parser.add_argument("--run", required=True, help="the run that made the candidate")
    parser.add_argument("--candidate", required=True, help="name@version")
    parser.add_argument("--champion", help="name@version; left out, there is none")
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
