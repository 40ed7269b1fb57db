"""One engine per base: adapters come and go on it without a second copy, and every answer is that of its own version."""

import logging
import threading

import pytest
from peft import PeftModel

from nightschool.engine import pool as pool_module
from nightschool.engine.adapters import AdapterLinear
from nightschool.engine.compute import COMPUTE
from nightschool.engine.pool import EnginePool
from nightschool.engine.slot import Slot
from nightschool.errors import SwapFailed
from nightschool.models.load import load_base
from nightschool.store.versions import VersionMetadata
from tests.support.adapter_setups import House, lively_adapter, publish_adapter, save_adapter
from tests.support.engine_setups import ask, greedy
from tests.support.live_server import eventually

PROMPT = [9, 8, 7, 6]


@pytest.fixture(scope="module")
def house(tmp_path_factory):
    return House(tmp_path_factory.mktemp("home"))


@pytest.fixture
def pool(house):
    pool = EnginePool(house.home, num_rows=4)
    yield pool
    assert pool._engines == {}, "every slot was closed"


@pytest.fixture
def slots(pool):
    slots = {name: Slot(name, pool) for name in ("bot", "cat", "base")}
    yield slots
    for slot in slots.values():
        slot.close()


def answers_exactly(slot, published):
    answer = ask(slot, PROMPT, 12).result(60)
    assert (answer.version, answer.token_ids) == (published.ref, published.greedy(PROMPT, 12))


def test_names_that_stand_on_one_base_share_one_engine(house, pool, slots):
    for slot, ref in ((slots["bot"], house.one.ref), (slots["cat"], house.cat.ref), (slots["base"], house.base.ref)):
        slot.swap(ref)
    assert list(pool._engines) == [house.base.ref]
    assert len({slot.current.engine for slot in slots.values()}) == 1
    handles = [ask(slot, PROMPT, 30) for slot in slots.values() for _ in range(2)]
    expected = [house.one.greedy(PROMPT, 30), house.cat.greedy(PROMPT, 30), greedy(house.model, PROMPT, 30)]
    assert [handle.result(60).token_ids for handle in handles] == [one for one in expected for _ in range(2)]


def test_a_swap_between_adapters_loads_no_second_base_and_disturbs_no_answer(house, pool, slots, monkeypatch):
    slot = slots["bot"]
    slot.swap(house.one.ref)
    monkeypatch.setattr(pool_module, "load_located", lambda *_, **__: pytest.fail("the base is here"))
    handle = ask(slot, PROMPT, 200)
    eventually(lambda: handle._chunks)
    report = slot.swap(house.two.ref)
    assert list(report.seconds) == ["resolve", "verify", "load", "warm_up", "probe", "switch"]
    answers_exactly(slot, house.two)
    answer = handle.result(60)
    assert (answer.version, answer.token_ids) == (house.one.ref, house.one.greedy(PROMPT, 200))
    slot.rollback()
    answers_exactly(slot, house.one)
    assert list(pool._engines) == [house.base.ref]


def test_with_room_for_no_second_base_an_adapter_is_swapped_all_the_same(house, pool, slots, monkeypatch):
    slots["bot"].swap(house.one.ref)
    monkeypatch.setattr("nightschool.engine.slot.free_bytes", lambda _: 1000)
    slots["bot"].swap(house.two.ref)
    answers_exactly(slots["bot"], house.two)
    other = house.full("cat", seed=5)
    with pytest.raises(SwapFailed, match="takes about"):
        slots["cat"].swap(other.ref)


def test_the_engine_ends_with_the_last_name_on_its_base(house, pool, slots):
    slots["base"].swap(house.base.ref)
    slots["bot"].swap(house.one.ref)
    engine = slots["bot"].current.engine
    slots["base"].close()
    answers_exactly(slots["bot"], house.one)
    slots["bot"].close()
    assert pool._engines == {}
    assert engine.load() == (0, 0)


def test_a_dropped_adapter_drains_and_leaves_the_layers(house, pool, slots):
    slot, third = slots["bot"], house.adapter("bot", seed=4)
    slot.swap(house.one.ref)
    handles = [ask(slot, PROMPT, 100) for _ in range(6)]
    slot.swap(house.two.ref)
    slot.swap(third.ref)
    assert [handle.result(60).token_ids for handle in handles] == [house.one.greedy(PROMPT, 100)] * 6
    layer = next(m for m in slot.current.engine._runner._model.modules() if isinstance(m, AdapterLinear))
    eventually(lambda: len(layer.factors) == 2)
    slot.swap(house.one.ref)
    answers_exactly(slot, house.one)


def test_an_engine_that_lets_a_version_go_leaves_the_compute_thread_its_lock(house, slots, monkeypatch):
    slots["bot"].swap(house.one.ref)
    engine, wake, answered = slots["bot"].current.engine, COMPUTE.wake, []

    def wake_after_a_look():
        looking = threading.Thread(target=lambda: answered.append(engine.has_work()), daemon=True)
        looking.start()
        looking.join(10)
        answered_before_waking.append(len(answered) > len(answered_before_waking))
        wake()

    answered_before_waking = []
    monkeypatch.setattr(COMPUTE, "wake", wake_after_a_look)
    slots["bot"].close()
    assert answered_before_waking
    assert all(answered_before_waking)


def test_what_cannot_be_kept_apart_is_merged_into_a_base_of_its_own_and_the_log_says_why(house, pool, slots, caplog):
    slots["bot"].swap(house.one.ref)
    special = house.adapter("cat", seed=5, use_dora=True)
    with caplog.at_level(logging.WARNING):
        slots["cat"].swap(special.ref)
    [record] = [record for record in caplog.records if "merged" in record.getMessage()]
    assert record.facts == {"version": special.ref, "reason": "its use_dora is true"}
    answers_exactly(slots["cat"], special)
    answers_exactly(slots["bot"], house.one)
    assert sorted(pool._engines) == sorted([house.base.ref, special.ref])


def test_adapters_can_be_merged_on_request(house):
    pool = EnginePool(house.home, merge_adapters=True)
    slot = Slot("bot", pool)
    try:
        slot.swap(house.one.ref)
        assert list(pool._engines) == [house.one.ref]
        answers_exactly(slot, house.one)
    finally:
        slot.close()


@pytest.mark.parametrize("stage", ["verify", "probe"])
def test_a_swap_to_a_bad_adapter_changes_nothing(house, pool, slots, stage):
    slot, expected = slots["bot"], [0, 0, 0] if stage == "probe" else None
    bad = publish_adapter(house.registry, lively_adapter(seed=6), house.base, expected=expected)
    if stage == "verify":
        path = house.registry.resolve(bad.ref).path / "adapter_model.safetensors"
        path.chmod(0o644)
        path.write_bytes(path.read_bytes()[:-1] + b"\x00")
    slot.swap(house.one.ref)
    with pytest.raises(SwapFailed, match=f"'{stage}'"):
        slot.swap(bad.ref)
    answers_exactly(slot, house.one)
    layer = next(m for m in slot.current.engine._runner._model.modules() if isinstance(m, AdapterLinear))
    assert len(layer.factors) == 1, "the bad one is gone"
    with pytest.raises(SwapFailed):
        slots["cat"].swap(bad.ref)
    assert pool._holders == {house.base.ref: 1}


def test_a_name_is_merged_while_it_answers_and_kept_apart_again(house, pool, slots):
    slots["bot"].swap(house.one.ref)
    slots["cat"].swap(house.cat.ref)
    apart = slots["bot"].current
    handle = ask(slots["bot"], PROMPT, 100)
    assert slots["bot"].merge(merged=True) is True
    assert slots["bot"].merge(merged=True) is False
    assert handle.result(60).token_ids == house.one.greedy(PROMPT, 100)
    merged = slots["bot"].current
    assert (merged.version, merged.engine.base) == (apart.version, house.one.ref)
    assert set(pool._engines) == {house.base.ref, house.one.ref}
    answers_exactly(slots["bot"], house.one)
    answers_exactly(slots["cat"], house.cat)
    slots["bot"].swap(house.two.ref)
    assert slots["bot"].current.engine.base == house.two.ref, "it goes on merged"
    answers_exactly(slots["bot"], house.two)
    assert slots["bot"].merge(merged=False) is True
    answers_exactly(slots["bot"], house.two)
    assert slots["bot"].current.engine is slots["cat"].current.engine
    slots["base"].swap(house.base.ref)
    assert slots["base"].merge(merged=True) is True
    answers_base = slots["base"].current.engine
    assert answers_base is slots["cat"].current.engine, "a version that is no adapter stays where it is"


def test_a_merge_that_fails_changes_nothing(house, pool, slots, monkeypatch):
    slots["bot"].swap(house.one.ref)
    before = slots["bot"].current
    monkeypatch.setattr("nightschool.engine.slot.free_bytes", lambda _: 1000)
    with pytest.raises(SwapFailed, match="takes about"):
        slots["bot"].merge(merged=True)
    assert (slots["bot"].current, slots["bot"].is_merged) == (before, False)
    slots["bot"].swap(house.two.ref)
    answers_exactly(slots["bot"], house.two)


def test_adapters_are_served_on_a_quantised_base_as_peft_answers_on_it(house, pool, tmp_path):
    pytest.importorskip("bitsandbytes", reason="the extra `qlora` is not installed")
    base = f"{house.base.ref}[nf4]"
    wrapped = lively_adapter(seed=9)
    folder = save_adapter(wrapped, tmp_path / "adapter", str(house.base.path))
    on_codes = PeftModel.from_pretrained(load_base(base, house.home).model, str(folder)).eval()
    facts = VersionMetadata(kind="adapter", method="qlora", base=base)
    version = house.registry.publish("codes", lambda into: save_adapter(wrapped, into, str(house.base.path)), facts)
    slot = Slot("codes", pool)
    slot.swap(version.ref)
    layers = [m for m in slot.current.engine._runner._model.modules() if isinstance(m, AdapterLinear)]
    assert {type(layer.layer).__name__ for layer in layers} == {"Linear4bit"}
    assert ask(slot, PROMPT, 12).result(60).token_ids == greedy(on_codes, PROMPT, 12)
    slot.close()
