"""Several runs in one process give what each gives alone, and none touches another."""

import json
import signal
import sys

import pytest
import torch
from safetensors.torch import load_file

from nightschool.config.recipe import Lora
from nightschool.errors import Interrupted, UsageError
from nightschool.events import read_events
from nightschool.store.home import Home
from nightschool.store.registry import Registry
from nightschool.training import run_together
from nightschool.training.run_together import main
from nightschool.training.together.member import serve
from tests.support.training_setups import MiniRun, deterministic_threads, random_rows

pytestmark = pytest.mark.trains
LORA = Lora(r=4, alpha=8, dropout=0.2)


@pytest.fixture(autouse=True)
def _deterministic():
    with deterministic_threads():
        yield


def runs_of(folder, **settings):
    """A run a name, all in one home: each with data of its own."""
    home = Home(folder / "home").ensure()
    return {
        name: MiniRun(
            folder / name, lora=LORA, home=home, rows=random_rows(20, seed=ord(name[0])), **({"steps_total": 6} | given)
        )
        for name, given in settings.items()
    }


def train_together(runs, resume=None):
    first = next(iter(runs.values()))
    members = [{"run": one.run.id, "resume": resume, "root": str(one.folder)} for one in runs.values()]
    file = first.home.path / "members.json"
    file.write_text(json.dumps(members))
    return main(["--home", str(first.home.path), "--members", str(file)])


def adapter_of(one):
    version = Registry(one.home).resolve(one.run.status.candidate)
    return load_file(version.path / "adapter_model.safetensors")


def test_runs_on_one_base_give_what_each_gives_alone(tmp_path):
    settings = {"short": {"steps_total": 3}, "broken": {"learning_rate": 1e30}, "long": {"seed": 7}}
    together = runs_of(tmp_path / "together", **settings)
    alone = runs_of(tmp_path / "alone", **{name: settings[name] for name in ("short", "long")})
    out = sys.stdout
    assert train_together(together) == 0
    assert sys.stdout is out
    for name, solo in alone.items():
        solo.go()
        found, wanted = adapter_of(together[name]), adapter_of(solo)
        assert found.keys() == wanted.keys()
        assert all(torch.equal(found[key], wanted[key]) for key in wanted), name
        assert together[name].run.status.shares_process
        assert not solo.run.status.shares_process
        events = [read_events(one.run.events_path) for one in (together[name], solo)]
        assert [row["event"] for row in events[0]] == [row["event"] for row in events[1]]
        log = together[name].run.log_path.read_text()
        assert f"Published {together[name].run.status.candidate}" in log
        assert all(other.run.id not in log for other in together.values() if other is not together[name])
    failed = together["broken"].run.status
    assert (failed.state, failed.exit_code, failed.candidate) == ("failed", 1, None)
    assert "became nan" in failed.error
    assert f"error: {failed.error}" in together["broken"].run.log_path.read_text()


def test_one_is_stopped_alone_and_a_signal_stops_all(tmp_path, monkeypatch):
    together, alone = (runs_of(tmp_path / where, one={}, two={"seed": 7}) for where in ("together", "alone"))
    served = 0

    def serve_and_interrupt(members):
        nonlocal served
        served += 1
        if served == 2:
            together["one"].run.request_stop("A pause")
        if served == 4:
            signal.raise_signal(signal.SIGTERM)
        serve(members)

    with monkeypatch.context() as patched:
        patched.setattr(run_together, "serve", serve_and_interrupt)
        assert train_together(together) == Interrupted.exit_code
    for name, reason, step in (("one", "A pause", 2), ("two", "SIGTERM", 4)):
        status = together[name].run.status
        assert (status.state, status.step, status.exit_code) == ("interrupted", step, 75)
        assert status.error.startswith(reason)
        assert together[name].run.stop_request is None
    assert train_together(together, resume="latest") == 0
    for name, solo in alone.items():
        solo.go()
        found, wanted = adapter_of(together[name]), adapter_of(solo)
        assert all(torch.equal(found[key], wanted[key]) for key in wanted), name


def test_a_run_that_is_not_there_is_nobody_elses_affair(tmp_path, capfd):
    together = runs_of(tmp_path, one={"steps_total": 1})
    members = [
        {"run": "gone-20260101_000000", "root": "."},
        {"run": together["one"].run.id, "root": str(tmp_path / "one")},
    ]
    file = tmp_path / "members.json"
    file.write_text(json.dumps(members))
    assert main(["--home", str(together["one"].home.path), "--members", str(file)]) == 0
    assert together["one"].run.status.state == "completed"
    assert "gone-20260101_000000" in capfd.readouterr().err
    file.write_text('[{"resume": null}]')
    assert main(["--home", str(together["one"].home.path), "--members", str(file)]) == UsageError.exit_code
