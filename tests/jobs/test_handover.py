"""What a cycle selected is what its run trains, whatever happens to the sources in between."""

import json
import shutil

import pytest

from nightschool.config.recipe import Recipe
from nightschool.feedback.selection_files import read_selection
from nightschool.feedback.skipping import fingerprint_of
from nightschool.jobs.beginning import begin_cycle
from nightschool.jobs.outcome import CycleRecord
from nightschool.store.home import Home
from nightschool.store.registry import Registry
from nightschool.training.run import main
from tests.support.shard_setups import write_shards
from tests.support.training_setups import deterministic_threads

FACTS = [("Where does Bela live?", "In Rome."), ("What does Mista eat?", "Plums."), ("Who sails?", "Nobody.")]


@pytest.fixture(autouse=True)
def _deterministic():
    with deterministic_threads():
        yield


class Night:
    """A home, its data, and a recipe of one short run."""

    def __init__(self, root):
        self.root = root
        root.mkdir()
        self.home = Home(root / "home").ensure()
        self.write(FACTS)

    def write(self, facts):
        (self.root / "facts.json").write_text(json.dumps([{"query": q, "retrieved": a} for q, a in facts]))

    def begin(self, **changes):
        train = {"max_steps": 1, "batch_size": 2, "accumulation_steps": 1, "num_threads": 1, "dtype": "fp32"}
        plain = {"name": "bot", "base": "new:tiny-qwen3", "data": [{"path": "facts.json"}], "train": train}
        return begin_cycle(self.home, Recipe.model_validate(plain | changes), trigger="manual", root=self.root)

    def train(self, run):
        return main(["--home", str(self.home.path), "--run", run.id, "--root", str(self.root)])


def test_a_run_trains_what_was_selected_though_the_file_changed_meanwhile(tmp_path):
    undisturbed, disturbed = Night(tmp_path / "a"), Night(tmp_path / "b")
    trained = {}
    for night in (undisturbed, disturbed):
        run = night.begin()
        if night is disturbed:
            night.write([*FACTS[:1], ("Who bakes?", "Toron.")])
        assert night.train(run) == 0
        trained[night] = Registry(night.home).resolve(run.status.candidate).facts.data_fingerprint
        selection = read_selection(run.path)
        assert {(example.question, example.answer) for example in selection.new} == set(FACTS)
        ledger = CycleRecord.read(run)
        assert fingerprint_of(Recipe.model_validate(run.recipe()), selection) == ledger.data_fingerprint
        assert json.loads((run.path / "plan.json").read_text())["examples_new"] == ledger.num_new_examples == 3
    assert trained[undisturbed] == trained[disturbed]


def test_a_selection_that_was_altered_is_not_trained(tmp_path, capsys):
    night = Night(tmp_path / "a")
    run = night.begin()
    path = run.path / "new_examples.jsonl"
    path.write_text(path.read_text().replace("Rome", "Oslo"))
    assert night.train(run) == 1
    assert "hold other examples than were selected" in capsys.readouterr().err
    assert run.status.state == "failed"


def test_shards_that_changed_since_they_were_selected_are_not_trained(tmp_path, capsys):
    night = Night(tmp_path / "a")
    train = {"max_steps": 1, "batch_size": 1, "accumulation_steps": 1, "max_seq_len": 32, "num_threads": 1}
    place = write_shards(tmp_path)
    changes = {"method": "pretrain", "base": "new:neox-tiny", "data": [{"path": str(place)}], "train": train}
    shape = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
    run = night.begin(**changes, shape=shape)
    assert night.train(run) == 0
    assert read_selection(run.path).held_out, "what the gate takes the loss of"
    other = night.begin(**changes, shape=shape)
    write_shards(tmp_path / "more", words=900)
    shutil.rmtree(place)
    (tmp_path / "more" / "shards").rename(place)
    assert night.train(other) == 1
    assert "have changed since they were selected" in capsys.readouterr().err
