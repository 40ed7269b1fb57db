"""Probes are asked once for all processes of a machine, and again if anything changes that answers depend on."""

import pytest

from nightschool.engine import proofs
from nightschool.engine.local_model import local_model
from nightschool.engine.pool import BoundEngine, EnginePool
from nightschool.engine.slot import Slot
from nightschool.errors import Conflict, SwapFailed
from tests.support.adapter_setups import House, lively_adapter, publish_adapter


@pytest.fixture
def house(tmp_path):
    return House(tmp_path)


@pytest.fixture
def asked(monkeypatch):
    """Who answered probes, in their order."""
    found = []
    answers = BoundEngine.answers

    def noted(bound, prompts):
        if prompts[0][1].ignore_eos:  # what warms an engine up doesn't
            found.append(bound.binding.adapter)
        return answers(bound, prompts)

    monkeypatch.setattr(BoundEngine, "answers", noted)
    return found


def served(house, ref):
    """Serve a version in a process of its own, as far as its memory goes."""
    slot = Slot(ref.partition("@")[0], EnginePool(house.home))
    try:
        slot.swap(ref)
    finally:
        slot.close()


def test_what_the_gate_has_asked_a_server_does_not_ask_again(house, asked):
    version = house.registry.resolve(house.one.ref)
    with local_model(house.home, version.ref) as model:
        model.prove(version)
        model.prove(version)
    assert asked == [house.one.ref]
    served(house, house.one.ref)
    assert asked == [house.one.ref]
    served(house, house.two.ref)
    assert asked == [house.one.ref, house.two.ref]


@pytest.mark.parametrize("change", ["the engine", "a library", "the machine", "the instructions"])
def test_another_way_to_compute_asks_again(house, asked, monkeypatch, change):
    served(house, house.one.ref)
    place, name, value = {
        "the engine": (proofs, "_own_code", lambda: "other"),
        "a library": (proofs, "installed", lambda _: "99"),
        "the machine": (proofs.platform, "node", lambda: "elsewhere"),
        "the instructions": (proofs.torch.backends.cpu, "get_cpu_capability", lambda: "OTHER"),
    }[change]
    monkeypatch.setattr(place, name, value)
    served(house, house.one.ref)
    assert asked == [house.one.ref] * 2


def test_merged_it_is_another_model(house, asked):
    served(house, house.one.ref)
    slot = Slot("bot", EnginePool(house.home, merge_adapters=True))
    slot.swap(house.one.ref)
    slot.close()
    assert asked == [house.one.ref, None]


def test_a_version_that_answers_otherwise_is_never_taken_as_proven(house):
    wrong = publish_adapter(house.registry, lively_adapter(seed=9), house.base, expected=[1, 1, 1])
    version = house.registry.resolve(wrong.ref)
    for _ in range(2):
        with local_model(house.home, wrong.ref) as model, pytest.raises(Conflict, match="probe 1"):
            model.prove(version)
        with pytest.raises(SwapFailed, match="probe 1"):
            served(house, wrong.ref)


def test_the_oldest_proofs_go_when_there_are_too_many(house, monkeypatch):
    monkeypatch.setattr(proofs, "_MOST_FILES", 2)
    for ref in (house.one.ref, house.two.ref, house.cat.ref):
        served(house, ref)
    assert len(list((house.home.cache / "proofs").iterdir())) == 2
