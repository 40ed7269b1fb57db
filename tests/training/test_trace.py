"""A run can be read: from `execute` to the first update it goes through few files, and hardly ever back up."""

import sys
from pathlib import Path

import pytest

import nightschool.training
from nightschool.training.methods.finetune import FinetuneTask
from tests.support.training_setups import MiniRun, deterministic_threads

TRAINING = Path(nightschool.training.__file__).parent
MOST_FILES, MOST_CLIMBS = 15, 6


class Trace:
    """The files of training that are entered, and the calls from one file into another that waits further up the stack."""

    def __init__(self):
        self.files, self.climbs, self.stack = set(), [], []

    def __call__(self, frame, event, _):
        path = Path(frame.f_code.co_filename)
        if event not in ("call", "return") or not path.is_relative_to(TRAINING) or frame.f_code.co_name[0] == "<":
            return
        name = path.relative_to(TRAINING).as_posix()
        if event == "return":
            if self.stack:
                self.stack.pop()
            return
        if self.stack and self.stack[-1] != name and name in self.stack:
            self.climbs.append((self.stack[-1], name))
        self.files.add(name)
        self.stack.append(name)


@pytest.mark.trains
def test_a_run_goes_through_few_files_to_its_first_step(tmp_path, monkeypatch):
    trace, update = Trace(), FinetuneTask.update

    def first_update(*arguments):
        sys.setprofile(None)
        return update(*arguments)

    monkeypatch.setattr(FinetuneTask, "update", first_update)
    run = MiniRun(tmp_path)
    with deterministic_threads():
        sys.setprofile(trace)
        try:
            run.go(stop_after=1)
        finally:
            sys.setprofile(None)
    assert {"run.py", "methods/prepared.py", "loop.py", "causal_task.py"} <= trace.files
    assert len(trace.files) <= MOST_FILES, "\n".join(sorted(trace.files))
    assert len(trace.climbs) <= MOST_CLIMBS, trace.climbs
