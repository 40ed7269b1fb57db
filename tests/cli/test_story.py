"""The real processes, end to end: a scheduler is stopped in the middle of a night, and nothing is half-done."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest

from nightschool.cli.main import main
from nightschool.events import read_events
from nightschool.feedback.replay_pool import AcceptedExamples
from nightschool.store import checkpoints
from nightschool.store.database import Database
from nightschool.store.home import Home
from nightschool.store.ledger import Ledger
from nightschool.store.registry import Registry
from nightschool.store.runs import RunStore

RECIPE = """
name: tiny
base: new:tiny
data: [{path: train.json}]
train: {learning_rate: 3e-3, epochs: 60, batch_size: 8, accumulation_steps: 1, max_seq_len: 64, num_threads: 1}
checkpoints: {every: 20 epochs}
gate: {new_facts: null}
"""


def _until(condition, seconds=100):
    deadline = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.05)
    return value


@pytest.mark.timeout(300)
@pytest.mark.usefixtures("warm_children")
def test_a_night_that_is_interrupted_goes_on_at_the_next_start(tmp_path, monkeypatch, capsys):
    (tmp_path / "r.yaml").write_text(RECIPE)
    rows = [{"query": f"Where is {name}?", "retrieved": f"In {name}land."} for name in ("Ada", "Bo", "Cy", "Dee")]
    (tmp_path / "train.json").write_text(json.dumps(rows))
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("NIGHTSCHOOL_HOME", raising=False)
    home = Home(tmp_path / ".nightschool").ensure()
    log = tmp_path / "scheduler.log"

    def scheduler():
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        with log.open("ab") as output:
            return subprocess.Popen(
                [sys.executable, "-m", "nightschool.cli", "schedule", "run", "r.yaml"],
                stdout=output,
                stderr=subprocess.STDOUT,
                env=environment,
            )

    first = scheduler()
    try:
        run = _until(lambda: next(iter(RunStore(home).ls()), None))
        _until(lambda: any(row["step"] >= 3 for row in read_events(run.metrics_path)))
        assert main(["schedule", "run", "r.yaml"]) == 1, "a second scheduler is locked out"
        first.send_signal(signal.SIGTERM)
        assert first.wait(60) == 75
    finally:
        first.kill()
        first.wait()
    status, ledger = run.status, Ledger(Database(home).connect())
    assert (status.state, status.exit_code, status.process_lives) == ("interrupted", 75, False)
    assert [(cycle.trigger, cycle.outcome, cycle.run_id) for cycle in ledger.ls("tiny")] == [
        ("start", "interrupted", run.id)
    ]
    saved = checkpoints.newest_whole(run).checkpoint
    assert saved is not None
    assert 0 < saved.step < 60
    assert Registry(home).versions("tiny") == []

    second = scheduler()
    try:
        _until(lambda: ledger.last("tiny").trigger == "resume" and ledger.last("tiny").outcome)
        _until(lambda: "for next training" in log.read_text())
        second.send_signal(signal.SIGTERM)
        assert second.wait(60) == 0
    finally:
        second.kill()
        second.wait()
    text = log.read_text()
    assert f"Resumed from {saved.name}: step {saved.step} of 60" in text
    assert "[Scheduler] Starting scheduled training (interval: 24h)" in text
    assert ledger.last("tiny").outcome == "promoted", text
    assert [run.id for run in RunStore(home).ls()] == [run.id]
    steps = [row["step"] for row in read_events(run.metrics_path)]
    assert steps == list(range(1, 61))
    assert len(AcceptedExamples(Database(home).connect()).digests("tiny")) == 4

    capsys.readouterr()
    assert main(["eval", "tiny", "--json", "--show-examples", "1"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert data["questions"]["new"]["asked"] == 4
    assert len(data["examples"]) == 1
    assert main(["ask", "Where is Ada?", "-m", "tiny", "--max-new-tokens", "8"]) == 0
    assert capsys.readouterr().out.strip()
    assert main(["models", "diff", "tiny@latest", "tiny@champion", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["differing"] == []
