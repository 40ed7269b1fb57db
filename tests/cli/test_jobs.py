"""nightschool jobs and nightschool worker, as a person types them."""

import json
import os
import signal
import subprocess
import sys

import pytest
from benchmarks.toy_jobs import MODULES

from nightschool.cli.main import main
from nightschool.jobs.worker_beside import worker_beside
from nightschool.store.home import Home
from nightschool.store.job_files import JobFiles
from nightschool.store.job_queue import JobQueue
from nightschool.work import processes
from tests.support.cli_home import make_run
from tests.support.job_setups import ROOT, Jobs, lives

RECIPE = "name: acme/bot\nbase: new:tiny\ndata: [{path: train.json}]\ntrain: {max_steps: 20}\n"


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("NIGHTSCHOOL_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.delenv("DATABASE_URL", raising=False)
    monkeypatch.setattr(processes, "PROCESSES", {**processes.PROCESSES, **MODULES})
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    (tmp_path / "train.json").write_text(json.dumps([{"query": "why?", "retrieved": "because"}]))
    return Home(tmp_path / "home").ensure()


def run(capsys, *words, code=0):
    assert main([*words]) == code
    return capsys.readouterr()


def submit(capsys, *overrides):
    return run(capsys, "-q", "jobs", "submit", "recipe.yaml", *overrides).out.strip()


def test_a_recipe_is_queued_done_and_shown(home, capsys):
    job_id = submit(capsys, "train.max_steps=12")
    rows = json.loads(run(capsys, "--json", "jobs", "ls").out)
    assert [(row["id"], row["state"], row["tenant"], row["source"]) for row in rows] == [
        (job_id, "queued", "acme", "cli")
    ]
    assert "completed: acme/bot@" in run(capsys, "worker", "--drain").err
    shown = json.loads(run(capsys, "--json", "jobs", "show", job_id).out)
    assert (shown["state"], shown["outcome"], shown["progress"], shown["steps_total"]) == (
        "completed",
        "promoted",
        1.0,
        12,
    )
    text = run(capsys, "jobs", "show", shown["run_id"]).out
    assert job_id in text
    assert "progress           100%" in text
    log = run(capsys, "jobs", "logs", "-f", job_id).out
    assert "[Cycle] Run acme/bot-" in log
    assert run(capsys, "-q", "jobs", "ls", "--state", "completed").out.strip() == job_id
    assert run(capsys, "-q", "jobs", "ls", "--tenant", "other").out.strip() == ""


def test_a_job_is_paused_resumed_and_cancelled(home, capsys):
    job_id = submit(capsys)
    for verb, phase in [("pause", "paused"), ("resume", "queued"), ("cancel", "cancelled")]:
        assert run(capsys, "-q", "jobs", verb, job_id).out.strip() == phase
    assert "is cancelled, so it cannot be resumed" in run(capsys, "jobs", "resume", job_id, code=1).err
    assert "has no log yet. Its state is cancelled" in run(capsys, "jobs", "logs", job_id, code=4).err


def test_what_does_not_exist_exits_4(home, capsys):
    for verb in ("show", "logs", "cancel", "pause", "resume"):
        assert "There is no job train_0" in run(capsys, "jobs", verb, "train_0", code=4).err
    assert run(capsys, "jobs", "show", "../../etc", code=2)


def test_runs_without_a_job_are_listed_and_their_log_is_theirs(home, capsys):
    made = make_run(home)
    assert run(capsys, "-q", "jobs", "ls").out.strip() == made.id
    assert run(capsys, "jobs", "logs", made.id).out == "preparing\nstep 12/12\n"


@pytest.mark.parametrize("words", [["--max-running", "0"], ["--max-device-memory", "much"], ["--grace", "soon"]])
def test_a_worker_refuses_settings_that_make_no_sense(home, capsys, words):
    assert run(capsys, "worker", "--drain", *words, code=2).err


def test_a_worker_that_is_told_to_stop_ends_with_0_and_its_job_goes_on_later(home, capsys):
    jobs = Jobs(home.path.parent)
    job = jobs.submit(steps=5000)
    code = (
        "import sys; from benchmarks.toy_jobs import use_toys; use_toys();"
        "from nightschool.cli.main import main; sys.exit(main(['worker', '--max-running', '1']))"
    )
    with subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.DEVNULL) as worker:
        trainer = jobs.until_training(job)
        worker.send_signal(signal.SIGTERM)
        assert worker.wait(60) == 0
    assert not lives(trainer)
    assert jobs.get(job).state == "queued"


def test_a_worker_beside_a_server_is_started_again_and_ends_with_it(home):
    jobs = Jobs(home.path.parent)
    job = jobs.submit(steps=5000)
    with worker_beside(home):
        jobs.until_training(job)
        first = jobs.get(job).lease.owner
        os.kill(first.pid, signal.SIGKILL)
        second = jobs.until(lambda: (owner := jobs.get(job).lease.owner) != first and owner)
        process = second.find()
    assert not lives(process)
    assert JobQueue(home.database).get(job.id).state == "queued"
    assert not JobFiles.of(home, job).process_lives
