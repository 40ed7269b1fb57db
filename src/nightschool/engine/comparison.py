"""The comparison of a candidate with the champion: both are asked the same, the gate decides, the report is saved.

Most of it can be done before there is a candidate, or before it is published: see `Comparison`.
"""

from __future__ import annotations

from contextlib import ExitStack, closing
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType

from transformers import PreTrainedTokenizerBase

from nightschool.config.recipe import ADAPTER_METHODS, Recipe
from nightschool.engine.capacity import free_bytes
from nightschool.engine.local_model import LocalModel, local_model, local_pool
from nightschool.engine.pool import BoundEngine, EnginePool
from nightschool.errors import Damaged, ModelError, NotFound
from nightschool.evaluation.drift import ChampionAnswers, champion_answers, drift_by_prompt, mean_drift, open_answers
from nightschool.evaluation.eval_set import EvalSet, eval_set_of_run
from nightschool.evaluation.examiner import examine
from nightschool.evaluation.gate import GateReport, decide
from nightschool.evaluation.general import general_prompts
from nightschool.evaluation.model_judge import judge_sheets
from nightschool.evaluation.run_effort import effort_of
from nightschool.evaluation.scores import ScoreSheet
from nightschool.feedback.contradictions import notes_on
from nightschool.feedback.selection_files import read_contradictions
from nightschool.feedback.written_forms import read_written
from nightschool.models.load import Located, load_tokenizer, locate
from nightschool.models.stored import stored_weights
from nightschool.models.unmerged import base_under, why_merged
from nightschool.store.candidate_files import CandidateFiles, are_published
from nightschool.store.home import Home
from nightschool.store.manifest import Manifest
from nightschool.store.registry import Registry, Version
from nightschool.store.runs import RunStore

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


@dataclass(frozen=True)
class _Ahead:
    """A candidate that was examined before it was published: the digests of its files, itself, and what it answered."""

    digests: dict[str, str]
    model: LocalModel
    sheet: ScoreSheet


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

    Args:
        home: Where the run and the versions are.
        run_id: The run that makes the candidate.
        root: Where relative paths of the recipe begin; the working directory without it.
        pool: What else stands on the bases of this process; one of its own without it, and where the run streams its experts, which
            are streamed here, too.
    """

    def __init__(self, home: Home, run_id: str, *, root: Path | None = None, pool: EnginePool | None = None) -> None:
        self._home = home
        self._root = root or Path.cwd()
        self._registry = Registry(home)
        self._run = RunStore(home).get(run_id)
        self._recipe = Recipe.model_validate(self._run.recipe())
        # What was trained with few experts in memory may fit in no other way.
        experts = self._recipe.experts
        self._experts_resident = None if experts.tier == "device" else experts.resident
        shared = pool if self._experts_resident is None else None
        self._pool = shared or local_pool(home, num_rows=NUM_ROWS, experts_resident=self._experts_resident)
        self._asked: tuple[str | None, EvalSet, Champion] | None = None
        self._kept: BoundEngine | None = None
        self._ahead: _Ahead | None = None

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
        if free_bytes(self._pool.device) < _ROOM_AHEAD * stored.loaded_bytes(self._pool.dtype, self._experts_resident):
            return
        folder = locate(base, self._home, self._root).folder
        self._ask(champion, self._eval_set(load_tokenizer(folder, base), NO_CANDIDATE))

    def of(self, candidate_ref: str, champion_ref: str | None) -> GateReport:
        """Compare, decide, and save the report. See `compare`."""
        candidate = self._registry.resolve(candidate_ref)
        champion = self._registry.resolve(champion_ref) if champion_ref else None
        manifest = candidate.verify(digests=True)
        # Of an adapter version, the tokenizer lies beside the adapter, too.
        eval_set = self._eval_set(load_tokenizer(candidate.path, candidate.ref), candidate.id)
        # The champion first: to what it answers, the candidate is held.
        if self._asked is None or self._asked[:2] != (champion_ref, eval_set):
            self._ask(champion, eval_set)
        assert self._asked is not None, "it was just asked"
        _, _, compared = self._asked
        sheet = self._sheet_ahead(candidate, manifest) or self._sheet(candidate, eval_set, compared)
        theirs, judged = compared.sheet, None
        if self._recipe.gate.judge.url is not None:
            judged = judge_sheets(self._recipe.gate.judge, sheet, theirs)
            sheet, theirs = judged.candidate, judged.champion
        report = decide(sheet, theirs, self._recipe.gate, self._notes(compared), judged, effort_of(self._run))
        # With all the answers, so that `nightschool models diff` can compare versions without asking again.
        sheets = {"candidate": sheet.to_json(), "champion": theirs.to_json() if theirs else None}
        self._registry.save_report(candidate.name, candidate.id, report.to_json() | {"sheets": sheets})
        return report

    def examine_ahead(self) -> bool:
        """Examine the candidate's files, if they are there, before it is published. Returns whether to stop looking for them.

        Only an adapter that can stay apart, on the base that the champion was asked on: nothing else is loaded for it.

        Raises:
            NightschoolError, OSError, ValueError: As files may that are not published. Nothing is known beforehand then.
        """
        announced = CandidateFiles.announced(self._run)
        if announced is None:
            return False
        with ExitStack() as unless_examined:
            with announced.held() as files:
                found = Located(files.folder, files.ref, files.base)
                stands_there = self._kept is not None and self._kept.engine.base == base_under(found, self._home)
                if self._asked is None or not stands_there or why_merged(files.folder) is not None:
                    return True
                digests = files.digests()
                model = unless_examined.enter_context(closing(LocalModel(self._home, found, pool=self._pool)))
                model.read()
            _, eval_set, compared = self._asked
            self._ahead = _Ahead(digests, model, _examined(model, eval_set, compared))
            unless_examined.pop_all()
        return True

    def _notes(self, compared: Champion) -> list[str]:
        """What the report says besides: why there is nobody to compare with, and what of the data was not trained."""
        said = [compared.note] if compared.note else []
        written = read_written(self._run.path)
        return [*said, *notes_on(read_contradictions(self._run.path)), *([written.text] if written else [])]

    def _sheet_ahead(self, candidate: Version, manifest: Manifest) -> ScoreSheet | None:
        """What was found beforehand, if the candidate is what was examined, and answers as it was published."""
        ahead, self._ahead = self._ahead, None
        if ahead is None:
            return None
        with closing(ahead.model):
            if ahead.sheet.version != candidate.ref or not are_published(ahead.digests, manifest):
                return None
            ahead.model.prove(candidate)
            return ahead.sheet

    def _sheet(self, candidate: Version, eval_set: EvalSet, compared: Champion) -> ScoreSheet:
        if self._pool.needed_bytes(candidate):
            self._let_go()
        with local_model(self._home, candidate.ref, pool=self._pool) as model:
            self._let_go()
            model.prove(candidate)
            return _examined(model, eval_set, compared)

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
        self._forget_ahead()  # it was examined beside another one
        self._let_go()
        if champion is not None:
            champion.verify(digests=True)
            found = self._asked_all(champion.ref, eval_set)
        elif self._recipe.base.startswith("new:"):
            note = f"The base {self._recipe.base} is random weights, which answer nothing: nothing could be lost."
            found = Champion(note=note)
        else:
            found = self._base(eval_set)
        self._asked = champion.ref if champion is not None else None, eval_set, found

    def _base(self, eval_set: EvalSet) -> Champion:
        base = self._recipe.base
        try:
            of_base = self._asked_all(base, eval_set)
        except (ModelError, NotFound, Damaged) as error:
            return Champion(note=f"The base {base} could not be asked what it knows: {error}")
        assert of_base.sheet is not None, "it was just made"
        return replace(of_base, sheet=replace(of_base.sheet, version=base, is_base=True))

    def _asked_all(self, ref: str, eval_set: EvalSet) -> Champion:
        with local_model(self._home, ref, root=self._root, pool=self._pool) as model:
            found = Champion(examine(model, eval_set), champion_answers(model, eval_set.drift_prompts))
            if self._recipe.method in ADAPTER_METHODS:
                self._kept = self._pool.hold(model.engine)
        return found

    def _let_go(self) -> None:
        kept, self._kept = self._kept, None
        if kept is not None:
            self._pool.close(kept)

    def _forget_ahead(self) -> None:
        ahead, self._ahead = self._ahead, None
        if ahead is not None:
            ahead.model.close()

    def __enter__(self) -> Comparison:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._forget_ahead()
        self._let_go()


def _examined(model: LocalModel, eval_set: EvalSet, compared: Champion) -> ScoreSheet:
    """What a candidate answers beside the champion, and how far it drifted from it."""
    sheet = examine(model, eval_set if compared.sheet is not None else eval_set.without_general())
    if compared.answers is None:
        return sheet
    drifts = drift_by_prompt(model, compared.answers)
    drifted, tokens = mean_drift(compared.answers, drifts)
    pairs = open_answers(model, compared.answers, drifts)
    return replace(sheet, drift=drifted, drift_tokens=tokens, open=tuple(pairs))
