"""One process examines the candidates of several runs: each as it would alone, on a base that is loaded once."""

import json

import pytest

from nightschool.config.recipe import Recipe
from nightschool.engine import comparison as comparing
from nightschool.engine import pool
from nightschool.engine.compare_in_turn import InTurn
from nightschool.engine.comparison import compare
from nightschool.engine.local_model import local_pool
from nightschool.store.candidate_files import CandidateFiles
from nightschool.store.runs import RunStore
from nightschool.store.versions import VersionMetadata
from tests.support.adapter_setups import House, lively_adapter, save_adapter


class Group:
    """Runs of `bot`, which has a champion, and of `dog` and `cow`, which have none, on one base."""

    def __init__(self, path):
        self.house = House(path)
        self.home, self.registry = self.house.home, self.house.registry
        self.runs = {name: self.run(name) for name in ("bot", "dog", "cow")}
        self.champions = {"bot": self.house.one.ref, "dog": None, "cow": None}

    def run(self, name):
        gate = {"max_new_tokens": 6, "general": "off"}
        recipe = {
            "name": name,
            "base": self.house.base.ref,
            "method": "lora",
            "data": [{"path": "x.json"}],
            "gate": gate,
        }
        run = RunStore(self.home).create(Recipe.model_validate(recipe).as_plain(), name=name)
        said = [{"role": "user", "content": f"Who is {name}?"}, {"role": "assistant", "content": f"A {name}."}]
        for file in ("new_examples", "heldout"):
            (run.path / f"{file}.jsonl").write_text(json.dumps({"messages": said}) + "\n")
        return run

    def publish(self, name, when_written=lambda: None):
        version = self.registry.new_version_id(name)

        def fill(folder):
            save_adapter(lively_adapter(seed=len(name) + ord(name[0])), folder, str(self.house.base.path))
            CandidateFiles(f"{name}@{version}", self.house.base.ref, folder).announce(self.runs[name])
            when_written()

        facts = VersionMetadata(kind="adapter", method="lora", base=self.house.base.ref, version=version)
        return self.registry.publish(name, fill, facts)

    def line(self, name, candidate=None):
        told = {"run": self.runs[name].id, "root": str(self.home.path), "champion": self.champions[name]}
        return told if candidate is None else told | {"candidate": candidate}

    def ended(self, name):
        return json.loads(self.runs[name].gate_path.read_text())


@pytest.fixture
def group(tmp_path):
    return Group(tmp_path)


def test_each_verdict_is_the_one_of_a_process_of_its_own_and_the_base_is_loaded_once(group, monkeypatch):
    loads, engine = [], pool.Engine
    monkeypatch.setattr(pool, "Engine", lambda loaded, base, **more: loads.append(base) or engine(loaded, base, **more))
    examined, examine = [], comparing.examine
    monkeypatch.setattr(comparing, "examine", lambda model, asked: examined.append(model.ref) or examine(model, asked))
    in_turn = InTurn(group.home, local_pool(group.home, num_rows=4))
    for name in ("bot", "dog"):
        in_turn.take(group.line(name))
    while len(examined) < 2:
        in_turn.go_on()
    versions = {
        "dog": group.publish("dog", in_turn.go_on),  # examined while it is published
        "bot": group.publish("bot"),
        "cow": group.publish("cow"),  # which nobody had expected
    }
    assert examined == [group.house.one.ref, group.house.base.ref, versions["dog"].ref]
    for name, version in versions.items():
        in_turn.take(group.line(name, version.ref))
    assert examined.count(versions["dog"].ref) == 1
    assert loads == [group.house.base.ref] * 2  # once more for the last one, when nobody was expected any more
    assert in_turn.is_idle
    for name, version in versions.items():
        assert group.ended(name) == {"exit_code": 0, "error": None}
        assert json.loads(group.runs[name].log_path.read_text().splitlines()[-1])["candidate"] == version.ref
        found = group.registry.load_report(name, version.id)
        compare(group.home, group.runs[name].id, version.ref, group.champions[name], root=group.home.path)
        assert group.registry.load_report(name, version.id) == found


def test_an_error_of_one_run_is_said_of_that_run_and_none_of_the_others(group, capsys):
    in_turn = InTurn(group.home, local_pool(group.home, num_rows=4))
    damaged, whole = group.publish("dog"), group.publish("bot")
    weights = damaged.path / "adapter_model.safetensors"
    weights.chmod(0o644)
    weights.write_bytes(weights.read_bytes()[:-1])
    in_turn.take(group.line("dog", damaged.ref))
    in_turn.take({"run": "gone-20200101_000000", "root": "/", "champion": None})
    in_turn.take(group.line("bot", whole.ref))
    assert group.ended("dog")["exit_code"] != 0
    assert "adapter_model.safetensors" in group.ended("dog")["error"]
    assert group.ended("dog")["error"] in group.runs["dog"].log_path.read_text()
    assert group.ended("bot") == {"exit_code": 0, "error": None}
    assert "gone-20200101_000000" in capsys.readouterr().err
