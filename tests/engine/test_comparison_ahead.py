"""A candidate's files may be examined before they are published; what was found counts if these files were published."""

import json
import os
import threading

import pytest

from nightschool.config.recipe import Recipe
from nightschool.engine import comparison as comparing
from nightschool.engine.compare import main
from nightschool.engine.comparison import Comparison, compare
from nightschool.errors import Conflict
from nightschool.store.candidate_files import CandidateFiles
from nightschool.store.runs import RunStore
from nightschool.store.versions import Probe, VersionMetadata
from tests.support.adapter_setups import PROBE, House, lively_adapter, save_adapter
from tests.support.engine_setups import greedy


class Night:
    """A house, and a run of `bot` in it whose candidate is published as a run does it."""

    def __init__(self, path):
        self.house = House(path)
        self.home, self.registry = self.house.home, self.house.registry
        recipe = {"name": "bot", "base": self.house.base.ref, "method": "lora", "data": [{"path": "x.json"}]}
        gate = {"max_new_tokens": 6, "general": "off"}
        self.run = RunStore(self.home).create(Recipe.model_validate(recipe | {"gate": gate}).as_plain(), name="bot")
        examples = [
            {"messages": [{"role": "user", "content": f"{n}?"}, {"role": "assistant", "content": f"It is {n}."}]}
            for n in range(3)
        ]
        for name in ("new_examples", "heldout"):
            (self.run.path / f"{name}.jsonl").write_text("".join(json.dumps(one) + "\n" for one in examples))

    @property
    def champion(self):
        return self.house.one.ref

    def publish(self, when_written, *, expected=None, base=None, model_seed=1, spoil=None):
        """Publish a new adapter; `when_written` is called with its folder when its files are there and announced.

        `spoil` is called with the folder before.
        """
        wrapped = lively_adapter(seed=7, model_seed=model_seed)
        base = base or self.house.base
        version = self.registry.new_version_id("bot")
        facts = VersionMetadata(kind="adapter", method="lora", base=base.ref, version=version)

        def fill(folder):
            save_adapter(wrapped, folder, str(base.path))
            if spoil is not None:
                spoil(folder)
            CandidateFiles(f"bot@{version}", base.ref, folder).announce(self.run)
            when_written(folder)

        def probes():
            return [Probe(prompt_ids=PROBE, expected_ids=expected or greedy(wrapped, PROBE, 4))]

        return self.registry.publish("bot", fill, facts, probes=probes).ref

    def comparison(self):
        return Comparison(self.home, self.run.id, root=self.home.path)


@pytest.fixture
def night(tmp_path):
    return Night(tmp_path)


@pytest.fixture
def examined(monkeypatch):
    """The references of those who were asked, in their order."""
    refs = []
    examine = comparing.examine
    monkeypatch.setattr(comparing, "examine", lambda model, asked: refs.append(model.ref) or examine(model, asked))
    return refs


def report_of(night, ref):
    report = night.registry.load_report(*ref.split("@"))
    return {key: value for key, value in report.items() if key != "created_at"}


def test_what_was_found_before_it_was_published_is_what_would_be_found_afterwards(night, examined):
    with night.comparison() as comparison:
        comparison.ask_ahead(night.champion)
        assert not comparison.examine_ahead()
        candidate = night.publish(lambda _: comparison.examine_ahead())
        assert examined == [night.champion, candidate]
        comparison.of(candidate, night.champion)
        assert examined == [night.champion, candidate]
    early = report_of(night, candidate)
    compare(night.home, night.run.id, candidate, night.champion, root=night.home.path)
    assert report_of(night, candidate) == early


def test_files_that_were_altered_afterwards_are_examined_again(night, examined):
    other = lively_adapter(seed=8)

    def examine_and_replace(folder):
        comparison.examine_ahead()
        save_adapter(other, folder, str(night.house.base.path))

    with night.comparison() as comparison:
        comparison.ask_ahead(night.champion)
        candidate = night.publish(examine_and_replace, expected=greedy(other, PROBE, 4))
        comparison.of(candidate, night.champion)
    assert examined == [night.champion, candidate, candidate]
    late = report_of(night, candidate)
    compare(night.home, night.run.id, candidate, night.champion, root=night.home.path)
    assert report_of(night, candidate) == late


def test_another_champion_means_that_both_are_asked_anew(night, examined):
    with night.comparison() as comparison:
        comparison.ask_ahead(night.champion)
        candidate = night.publish(lambda _: comparison.examine_ahead())
        report = comparison.of(candidate, night.house.two.ref)
    assert report.champion == night.house.two.ref
    assert examined == [night.champion, candidate, night.house.two.ref, candidate]


def test_a_candidate_that_does_not_answer_as_it_was_published_is_refused_although_it_was_examined(night):
    with night.comparison() as comparison:
        comparison.ask_ahead(night.champion)
        candidate = night.publish(lambda _: comparison.examine_ahead(), expected=[1, 1, 1, 1])
        with pytest.raises(Conflict, match="probe 1"):
            comparison.of(candidate, night.champion)


def test_a_candidate_on_another_base_waits_until_it_is_published(night, examined):
    other = night.house.full("other", seed=9)
    with night.comparison() as comparison:
        comparison.ask_ahead(night.champion)
        candidate = night.publish(lambda _: comparison.examine_ahead(), base=other, model_seed=9)
        assert examined == [night.champion]
        comparison.of(candidate, night.champion)
    assert examined == [night.champion, candidate]


def test_files_that_are_gone_again_are_no_candidate(night):
    assert CandidateFiles.announced(night.run) is None
    CandidateFiles("bot@1", night.house.base.ref, night.home.path / "gone.partial").announce(night.run)
    assert CandidateFiles.announced(night.run) is None
    (night.run.path / "candidate-files.json").write_text("[]")
    assert CandidateFiles.announced(night.run) is None


def test_the_files_can_be_read_while_they_are_renamed(tmp_path):
    before, after = tmp_path / "a.partial", tmp_path / "a"
    before.mkdir()
    (before / "weights").write_bytes(b"1")
    with CandidateFiles("bot@1", "base", before).held() as files:
        before.rename(after)
        assert (files.folder / "weights").read_bytes() == b"1"
        assert set(files.digests()) == {"weights"}


@pytest.mark.parametrize("damaged", [False, True])
def test_the_process_that_waits_examines_ahead_and_says_what_it_decided(night, monkeypatch, capsys, examined, damaged):
    """Also where the files turn out to be none: then it waits for what is published."""
    read, write = os.pipe()
    has_examined = threading.Event()
    look = Comparison.examine_ahead

    def examine_ahead(comparison):
        found = True  # also where it raises
        try:
            found = look(comparison)
        finally:
            if found:
                has_examined.set()
        return found

    monkeypatch.setattr(Comparison, "examine_ahead", examine_ahead)
    whole = {}

    def spoil(folder):
        weights = folder / "adapter_model.safetensors"
        whole[weights] = weights.read_bytes()
        weights.write_bytes(whole[weights][:-1])

    def written(_):
        assert has_examined.wait(60)
        for path, content in whole.items():
            path.write_bytes(content)

    def publish():
        told = {"candidate": night.publish(written, spoil=spoil if damaged else None), "champion": night.champion}
        with os.fdopen(write, "w") as stdin:
            stdin.write(json.dumps(told) + "\n")

    with os.fdopen(read) as stdin:
        monkeypatch.setattr("sys.stdin", stdin)
        publisher = threading.Thread(target=publish)
        publisher.start()
        champion = ("--champion", night.champion)
        assert main(["--home", str(night.home.path), "--run", night.run.id, *champion, "--ahead"]) == 0
        publisher.join()
    said = capsys.readouterr()
    decided = json.loads(said.out.splitlines()[-1])
    assert examined == [night.champion, decided["candidate"]]
    assert ("not examined ahead" in said.err) == damaged
