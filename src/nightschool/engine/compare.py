"""Ask a candidate and the champion the same questions, let the gate decide, and save its report.

    python -m nightschool.engine.compare --home H --run RUN_ID --candidate name@version [--champion name@version]
    python -m nightschool.engine.compare --home H --run RUN_ID [--champion name@version] --ahead

In the first night of a name, the base takes the champion's place. A process of its own, so that a server is not disturbed
and its bytes are given back. The report goes into the registry; the last line on standard output is one JSON object with
the decision. Exit code 0 whenever there is one, refused or not.

With `--ahead` it begins before there is a candidate: it asks the champion, and waits for a line on its standard input,
`{"candidate": "name@version", "champion": "name@version" or null}`. If the input ends without one, it ends as well.
"""

from __future__ import annotations

import argparse
import json
import os
import queue
import sys
import threading
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType

from transformers import PreTrainedTokenizerBase

from nightschool.config.recipe import ADAPTER_METHODS, Recipe
from nightschool.engine.capacity import free_bytes
from nightschool.engine.local_model import LocalModel, local_model, local_pool
from nightschool.errors import Damaged, ModelError, NightschoolError, NotFound
from nightschool.evaluation.drift import ChampionAnswers, champion_answers, drift
from nightschool.evaluation.eval_set import EvalSet, eval_set_of_run
from nightschool.evaluation.examiner import examine
from nightschool.evaluation.gate import GateReport, decide
from nightschool.evaluation.general import general_prompts
from nightschool.evaluation.scores import ScoreSheet
from nightschool.models.load import load_tokenizer, locate
from nightschool.models.stored import stored_weights
from nightschool.store.home import Home
from nightschool.store.registry import Registry, Version
from nightschool.store.runs import RunStore
from nightschool.work.processes import leave

NUM_ROWS = 32
NO_CANDIDATE = ""
"""The id of a candidate that is not there yet: nothing was accepted from it."""
# So many times the base must be free for a gate that begins beside the training, which holds it as well, and more.
_ROOM_AHEAD = 6


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
        Conflict: If the candidate does not answer what it was published with.
    """
    with Comparison(home, run_id, root=root) as comparison:
        return comparison.of(candidate_ref, champion_ref)


class Comparison:
    """The comparison of a run's candidate, whose champion may be asked ahead. A context manager.

    One base is in memory at a time: the champion's is kept only while a candidate may stand on the same one.
    """

    def __init__(self, home: Home, run_id: str, *, root: Path | None = None) -> None:
        self._home = home
        self._root = root or Path.cwd()
        self._registry = Registry(home)
        self._run = RunStore(home).get(run_id)
        self._recipe = Recipe.model_validate(self._run.recipe())
        self._pool = local_pool(home, num_rows=NUM_ROWS)
        self._asked: tuple[str | None, EvalSet, Champion] | None = None
        self._kept: LocalModel | None = None

    def ask_ahead(self, champion_ref: str | None) -> None:
        """Ask the champion what it will be asked beside a candidate that is not there yet, if there is room beside others.

        Raises:
            NotFound, Damaged, ModelError: As `compare`. Nothing is known beforehand then.
        """
        champion = self._registry.resolve(champion_ref) if champion_ref else None
        if champion is None and self._recipe.base.startswith("new:"):
            return
        base = champion.ref if champion is not None else self._recipe.base
        stored = stored_weights(base, self._home, self._root)
        if free_bytes(self._pool.device) < _ROOM_AHEAD * stored.loaded_bytes(self._pool.dtype):
            return
        folder = locate(base, self._home, self._root).folder
        self._ask(champion, self._eval_set(load_tokenizer(folder, base), NO_CANDIDATE))

    def of(self, candidate_ref: str, champion_ref: str | None) -> GateReport:
        """Compare, decide, and save the report. See `compare`."""
        candidate = self._registry.resolve(candidate_ref)
        champion = self._registry.resolve(champion_ref) if champion_ref else None
        candidate.verify(digests=True)
        # Of an adapter version, the tokenizer lies beside the adapter, too.
        eval_set = self._eval_set(load_tokenizer(candidate.path, candidate.ref), candidate.id)
        # The champion first: to what it answers, the candidate is held.
        if self._asked is None or self._asked[:2] != (champion_ref, eval_set):
            self._ask(champion, eval_set)
        assert self._asked is not None, "it was just asked"
        _, _, compared = self._asked
        if self._pool.needed_bytes(candidate):
            self._let_go()
        with local_model(self._home, candidate.ref, pool=self._pool) as model:
            self._let_go()
            model.prove(candidate)
            sheet = examine(model, eval_set if compared.sheet is not None else eval_set.without_general())
            if compared.answers is not None:
                drifted, tokens = drift(model, compared.answers)
                sheet = replace(sheet, drift=drifted, drift_tokens=tokens)
        report = decide(sheet, compared.sheet, self._recipe.gate, [compared.note] if compared.note else ())
        # With all the answers, so that `nightschool models diff` can compare versions without asking again.
        sheets = {"candidate": sheet.to_json(), "champion": compared.sheet.to_json() if compared.sheet else None}
        self._registry.save_report(candidate.name, candidate.id, report.to_json() | {"sheets": sheets})
        return report

    def _eval_set(self, tokenizer: PreTrainedTokenizerBase, candidate: str) -> EvalSet:
        return eval_set_of_run(
            self._home,
            self._run.name,
            self._run,
            lambda text: len(tokenizer(text, add_special_tokens=False)["input_ids"]),
            candidate=candidate,
            general=general_prompts(self._recipe.gate.general, self._root),
        )

    def _ask(self, champion: Version | None, eval_set: EvalSet) -> None:
        self._asked = None
        self._let_go()
        if champion is not None:
            champion.verify(digests=True)
            found = self._examined(champion.ref, eval_set)
        elif self._recipe.base.startswith("new:"):
            note = f"The base {self._recipe.base} is random weights, which answer nothing: nothing could be lost."
            found = Champion(note=note)
        else:
            found = self._base(eval_set)
        self._asked = champion.ref if champion is not None else None, eval_set, found

    def _base(self, eval_set: EvalSet) -> Champion:
        base = self._recipe.base
        try:
            of_base = self._examined(base, eval_set)
        except (ModelError, NotFound, Damaged) as error:
            return Champion(note=f"The base {base} could not be asked what it knows: {error}")
        assert of_base.sheet is not None, "it was just made"
        return replace(of_base, sheet=replace(of_base.sheet, version=base, is_base=True))

    def _examined(self, ref: str, eval_set: EvalSet) -> Champion:
        self._kept = model = LocalModel(self._home, ref, root=self._root, pool=self._pool)
        found = Champion(examine(model, eval_set), champion_answers(model, eval_set.drift_prompts))
        if self._recipe.method not in ADAPTER_METHODS:
            self._let_go()
        return found

    def _let_go(self) -> None:
        kept, self._kept = self._kept, None
        if kept is not None:
            kept.close()

    def __enter__(self) -> Comparison:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._let_go()


def main(argv: Sequence[str] | None = None) -> int:
    """Compare what the command line names. Returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m nightschool.engine.compare", description="Examine a candidate.")
    parser.add_argument("--home", type=Path, required=True, help="the nightschool home")
    parser.add_argument("--run", required=True, help="the run that made the candidate")
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--candidate", help="name@version")
    which.add_argument("--ahead", action="store_true", help="ask the champion, and wait for the candidate's name")
    parser.add_argument("--champion", help="name@version; left out, there is none yet, and the base takes its place")
    arguments = parser.parse_args(argv)
    home = Home(arguments.home)
    try:
        with Comparison(home, arguments.run) as comparison:
            named = arguments.candidate, arguments.champion
            if arguments.ahead:
                named = _candidate_told(comparison, arguments.champion)
            report = comparison.of(*named)
    except NightschoolError as error:
        sys.stderr.write(f"{error}\n")
        return error.exit_code
    candidate = Registry(home).resolve(report.candidate)
    last = {
        "decision": report.decision,
        "candidate": report.candidate,
        "champion": report.champion,
        "report": str(Registry(home).report_path(candidate.name, candidate.id)),
    }
    sys.stdout.write(f"{json.dumps(last)}\n")
    return 0


def _candidate_told(comparison: Comparison, champion: str | None) -> tuple[str, str | None]:
    """Ask the champion, and return the names of both once somebody says them; ends this process if nobody ever will."""
    lines: queue.SimpleQueue[str] = queue.SimpleQueue()

    def listen() -> None:
        line = sys.stdin.readline()
        if not line:
            os._exit(0)  # nothing was written that would have to be put away
        lines.put(line)

    threading.Thread(target=listen, daemon=True).start()
    try:
        comparison.ask_ahead(champion)
    except NightschoolError as error:  # what is wrong then as well fails the gate
        sys.stderr.write(f"The champion was not asked ahead: {error}\n")
    told = json.loads(lines.get())
    return told["candidate"], told["champion"]


if __name__ == "__main__":
    leave(main())
