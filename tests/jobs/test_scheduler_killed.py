"""A scheduler that is killed, at each stage of a cycle and again while it goes on: nothing finished is done twice."""

import os
import signal
import sys
import traceback
from datetime import timedelta

import pytest

from nightschool.jobs import cycle as cycles
from nightschool.jobs.outcome import CycleRecord
from nightschool.jobs.scheduler import Scheduler
from nightschool.store.database import Database
from nightschool.store.ledger import Ledger
from nightschool.store.registry import Registry
from nightschool.store.runs import Run, RunStore
from tests.jobs.test_cycle import School
from tests.jobs.test_scheduler import START, FakeClock

# Where the scheduler dies: before or after it called this.
STAGES = {
    "before the cycle was entered": (Ledger, "begin", "before"),
    "before the run was created": (RunStore, "create", "before"),
    "before training": (cycles, "run_training", "before"),
    "after training": (cycles, "run_training", "after"),
    "before the gate": (cycles, "run_gate", "before"),
    "after the gate": (cycles, "run_gate", "after"),
    "before the champion moved": (Registry, "promote", "before"),
    "after the champion moved": (Registry, "promote", "after"),
    "before the end was entered": (Ledger, "finish", "before"),
    "after the end was entered": (Ledger, "finish", "after"),
}
TRAINED = list(STAGES)[list(STAGES).index("after training") :]


class Nights:
    """A school, and schedulers that are started one after the other at one home."""

    def __init__(self, tmp_path):
        self.school = School(tmp_path)
        self.starts = 0

    def start(self, kill_at=None, *, decision="promote"):
        """Let a scheduler do what is due at once, in a process of its own; it dies at a stage, or stops by itself."""
        self.starts += 1
        child = os.fork()
        if child == 0:
            try:
                os._exit(self._serve(kill_at, decision))
            except BaseException:
                traceback.print_exc()
                sys.stderr.flush()
            finally:
                os._exit(99)
        status = os.waitpid(child, 0)[1]
        if kill_at is None:
            assert os.WEXITSTATUS(status) == 0
        return os.WIFSIGNALED(status)

    def _serve(self, kill_at, decision):
        self.school.decision = decision
        cycles.run_training, cycles.run_gate = (
            self._noted("trained", self.school.train),
            self._noted("examined", self.school.examine),
        )
        if kill_at is not None:
            owner, name, when = STAGES[kill_at]
            setattr(owner, name, _killing(getattr(owner, name), when))
        clock = FakeClock(START + timedelta(hours=self.starts + 1))
        clock.moment = START + timedelta(hours=self.starts)
        recipe = self.school.recipe()
        with Database(self.school.home).connect() as db:
            return Scheduler(
                self.school.home,
                lambda: recipe,
                ledger=Ledger(db),
                root=self.school.root,
                stop=clock,
                clock=clock.now,
                say=lambda _: None,
            ).serve()

    def _noted(self, what, work):
        def noted(run, around, **more):
            code = work(run, around, **more)
            with (self.school.root / f"{what}.txt").open("a") as file:
                file.write(f"{run.id}\n")
            return code

        return noted

    def done(self, what):
        path = self.school.root / f"{what}.txt"
        return path.read_text().split() if path.exists() else []

    @property
    def entries(self):
        with Database(self.school.home).connect() as database:
            return [(cycle.trigger, cycle.outcome) for cycle in reversed(Ledger(database).ls("bot"))]


def _killing(whole, when):
    def killing(*arguments, **more):
        result = None if when == "before" else whole(*arguments, **more)
        os.kill(os.getpid(), signal.SIGKILL)
        return result

    return killing


@pytest.fixture
def nights(tmp_path):
    return Nights(tmp_path)


@pytest.mark.parametrize("stage", STAGES)
def test_a_cycle_goes_on_where_its_scheduler_was_killed(nights, stage):
    assert nights.start(stage)
    nights.start()
    assert len(nights.done("trained")) == 1, "what was trained is not trained again"
    run = RunStore(nights.school.home).get(nights.done("trained")[0])
    assert run.status.candidate == f"bot@{nights.school.champion}"
    assert run.id in nights.done("examined")
    assert all(outcome is not None for _, outcome in nights.entries)


@pytest.mark.parametrize("again", TRAINED)
@pytest.mark.parametrize("stage", ["before training", "after training"])
def test_a_cycle_goes_on_when_it_was_killed_while_it_went_on(nights, stage, again):
    assert nights.start(stage)
    if nights.start(again):
        nights.start()
    assert len(set(nights.done("trained"))) == 1
    assert nights.school.champion is not None
    nights.start()
    assert len(set(nights.done("trained"))) == 1, "nothing is new, so nothing begins"
    assert len(nights.done("examined")) <= 3


@pytest.mark.parametrize("stage", ["before the end was entered", "after the end was entered"])
def test_a_candidate_that_was_refused_is_not_trained_again_because_the_ledger_lacks_it(nights, stage):
    assert nights.start(stage, decision="refuse")
    nights.start(decision="refuse")
    assert len(nights.done("trained")) == len(nights.done("examined")) == 1
    assert nights.entries == [("start", "refused"), ("start", "skipped")]


def test_cycles_that_were_skipped_since_do_not_hide_the_one_that_is_undone(nights):
    assert nights.start("after training")
    with Database(nights.school.home).connect() as database:
        ledger = Ledger(database)
        ledger.finish(ledger.ls("bot")[0].id, "interrupted")
        ledger.finish(ledger.begin("bot", START + timedelta(hours=1, minutes=1), "due"), "skipped", "paused")
    nights.start()
    assert len(nights.done("trained")) == len(nights.done("examined")) == 1
    assert nights.school.champion is not None


@pytest.mark.parametrize(("published", "trained"), [(False, 1), (True, 0)])
def test_what_was_begun_by_hand_is_examined_if_it_is_trained_and_else_left_to_whoever_began_it(
    nights, published, trained
):
    school = nights.school
    run: Run = RunStore(school.home).create(school.recipe().as_plain(), name="bot")
    CycleRecord("manual", str(school.root), "new:tiny", None, "data", 3).write(run)
    if published:
        school.train(run, None)
    nights.start()
    assert len(nights.done("trained")) == trained
    assert school.champion is not None
    assert (run.status.candidate == f"bot@{school.champion}") is published
