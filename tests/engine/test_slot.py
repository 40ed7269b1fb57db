"""Versions are swapped while requests are in flight: all of a swap happens, or nothing, and every answer is exact."""

import gc
import random
import threading
import weakref

import pytest
import torch
from safetensors.torch import load_file, save_file

from nightschool.config.recipe import Lora
from nightschool.engine import pool as pool_module
from nightschool.engine import proofs
from nightschool.engine import slot as slot_module
from nightschool.engine.capacity import free_bytes, needed_bytes
from nightschool.engine.compute import COMPUTE
from nightschool.engine.pool import EnginePool
from nightschool.engine.slot import Slot
from nightschool.errors import Conflict, ModelError, NotFound, PromptTooLong, SwapFailed
from nightschool.models.adapters import attach_lora
from nightschool.models.export import save_version_folder
from nightschool.models.load import load_base
from nightschool.store.home import Home
from nightschool.store.registry import Registry
from nightschool.store.versions import Probe, VersionMetadata
from tests.support.engine_setups import ask, greedy, lively_model, random_prompt
from tests.support.live_server import eventually
from tests.support.tokenizers_for_tests import byte_tokenizer

PROBE = [5, 6, 7, 8]


class School:
    """A home with two versions of `bot` that answer differently, both with a probe that they pass."""

    def __init__(self, path):
        self.home = Home(path).ensure()
        self.registry = Registry(self.home)
        self.models = {}
        self.old, self.new = (self.publish(lively_model("tiny-llama", seed=seed)) for seed in (1, 2))

    def publish(self, model, *, name="bot", change=None, expected=None):
        """Returns the reference. `change` may do to the folder what it likes before it is sealed."""

        def fill(folder):
            save_version_folder(model, byte_tokenizer(), folder)
            if change is not None:
                change(folder)

        expected = expected or greedy(model, PROBE, 6)
        facts = VersionMetadata(probes=[Probe(prompt_ids=PROBE, expected_ids=list(expected))])
        version = self.registry.publish(name, fill, facts)
        self.models[version.ref] = model
        return version.ref

    def promote(self, ref):
        self.registry.promote(*ref.split("@"), by="test")

    def answers_exactly(self, slot, ref):
        answer = ask(slot, PROBE, 20).result(30)
        assert (answer.version, answer.token_ids) == (ref, greedy(self.models[ref], PROBE, 20))


@pytest.fixture
def school(tmp_path):
    return School(tmp_path)


@pytest.fixture
def slot(school):
    slot = Slot("bot", EnginePool(school.home, num_rows=4))
    yield slot
    slot.close()
    eventually(lambda: engines() == [])


def engines():
    """The versions whose engines still run."""
    return sorted(engine.base for engine in COMPUTE.members)


def test_it_starts_without_a_model_and_says_so(slot):
    assert slot.current is None
    assert slot.previous is None
    with pytest.raises(NotFound):
        slot.refresh()
    with pytest.raises(Conflict, match="No earlier version"):
        slot.rollback()


def test_a_swap_tells_from_where_to_where_and_how_long_each_stage_took(school, slot):
    first = slot.swap(school.old)
    assert (first.before, first.after, first.changed) == (None, school.old, True)
    assert list(first.seconds) == ["resolve", "verify", "load", "warm_up", "probe", "switch"]
    assert all(seconds >= 0 for seconds in first.seconds.values())
    school.answers_exactly(slot, school.old)
    second = slot.swap(school.new)
    assert (second.before, second.after, second.changed) == (school.old, school.new, True)
    school.answers_exactly(slot, school.new)
    again = slot.swap(school.new)
    assert (again.before, again.after, again.changed) == (school.new, school.new, False)
    assert slot.previous.version.ref == school.old


def test_a_refresh_follows_the_champion_and_nothing_else(school, slot):
    school.promote(school.old)
    assert slot.refresh() is True
    assert slot.refresh() is False
    assert slot.current.version.ref == school.old
    school.promote(school.new)
    school.answers_exactly(slot, school.old)
    assert slot.refresh() is True
    school.answers_exactly(slot, school.new)


def test_a_rollback_serves_what_was_before_without_loading_it_again(school, slot, monkeypatch):
    slot.swap(school.old)
    before = slot.current
    slot.swap(school.new)
    monkeypatch.setattr(pool_module, "load_located", lambda *_, **__: pytest.fail("it is still warm"))
    report = slot.rollback()
    assert (report.before, report.after) == (school.new, school.old)
    assert slot.current is before
    school.answers_exactly(slot, school.old)
    slot.rollback()
    school.answers_exactly(slot, school.new)
    assert engines() == sorted([school.old, school.new])


def test_only_the_version_before_stays_warm(school, slot):
    for ref in (school.old, school.new, school.publish(lively_model("tiny-llama", seed=3))):
        slot.swap(ref)
    eventually(lambda: school.old not in engines())
    assert len(engines()) == 2


def flip_a_byte(school, ref):
    weights = school.registry.resolve(ref).path / "model.safetensors"
    weights.chmod(0o644)
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)


def lose_a_tensor(folder):
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.norm.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def overflowing(model):
    """Its weights are finite, and its logits are not."""
    with torch.no_grad():
        model.model.norm.weight.fill_(3e38)
    return model


def bad_version(school, stage):
    """A version of which a swap fails at this stage."""
    model = lively_model("tiny-llama", seed=9)
    if stage == "resolve":
        return school.publish(model, name="other")
    if stage == "verify":
        ref = school.publish(model)
        flip_a_byte(school, ref)
        return ref
    if stage == "load":
        return school.publish(model, change=lose_a_tensor)
    if stage == "warm_up":
        return school.publish(overflowing(model), expected=[1, 2])
    return school.publish(model, expected=[*greedy(model, PROBE, 5), 0])


@pytest.mark.parametrize("stage", ["resolve", "verify", "load", "warm_up", "probe"])
def test_a_swap_that_fails_changes_nothing(school, slot, stage):
    ref = bad_version(school, stage)
    with pytest.raises(SwapFailed, match=f"'{stage}'") as failed:
        slot.swap(ref)
    assert failed.value.stage == stage
    assert slot.current is None
    slot.swap(school.old)
    slot.swap(school.new)
    current, previous = slot.current, slot.previous
    handle = ask(slot, PROBE, 100)
    with pytest.raises(SwapFailed, match=f"'{stage}'"):
        slot.swap(ref)
    assert (slot.current, slot.previous) == (current, previous)
    assert handle.result(30).token_ids == greedy(school.models[school.new], PROBE, 100)
    school.answers_exactly(slot, school.new)
    eventually(lambda: engines() == sorted([school.old, school.new]))
    slot.rollback()
    school.answers_exactly(slot, school.old)


@pytest.mark.parametrize("kind", [ModelError, OSError, MemoryError, KeyError])
@pytest.mark.parametrize(("stage", "place"), [("load", "load_located"), ("warm_up", "Engine"), ("probe", "Probe")])
def test_whatever_goes_wrong_is_a_failed_swap(school, slot, monkeypatch, kind, stage, place):
    error = kind("x")

    def fail(*_, **__):
        raise error

    slot.swap(school.old)
    current = slot.current
    if place == "Probe":
        monkeypatch.setattr(proofs, "_ask", fail)
    else:
        monkeypatch.setattr(pool_module, place, fail)
    with pytest.raises(SwapFailed, match=f"'{stage}' and changed nothing: .*x") as failed:
        slot.swap(school.new)
    assert failed.value.__cause__ is error
    assert slot.current is current
    assert engines() == [school.old]
    monkeypatch.undo()
    assert slot.swap(school.new).changed


def test_what_makes_a_version_official_comes_after_its_probes_and_may_still_say_no(school, slot):
    slot.swap(school.old)
    wrong = school.publish(lively_model("tiny-llama", seed=3), expected=[1, 1, 1])
    official = []
    with pytest.raises(SwapFailed):
        slot.swap(wrong, commit=lambda: official.append(wrong))
    assert official == []

    def refuse():
        assert slot.current.version.ref == school.old, "not served before it is official"
        raise Conflict("The champion is pinned.")

    with pytest.raises(Conflict, match="pinned"):
        slot.swap(school.new, commit=refuse)
    school.answers_exactly(slot, school.old)
    for _ in range(2):
        slot.swap(school.new, commit=lambda: official.append(school.new))
    assert official == [school.new] * 2
    school.answers_exactly(slot, school.new)


def test_a_version_that_is_not_there_fails_at_resolve(slot):
    with pytest.raises(SwapFailed, match="'resolve'"):
        slot.swap("bot@20000101_000000")


def test_a_request_stays_on_the_version_that_it_began_with(school, slot):
    slot.swap(school.old)
    handle = ask(slot, PROBE, 200)
    eventually(lambda: handle._chunks)
    slot.swap(school.new)
    school.answers_exactly(slot, school.new)
    answer = handle.result(30)
    assert (answer.version, answer.token_ids) == (school.old, greedy(school.models[school.old], PROBE, 200))


def test_a_dropped_version_answers_what_it_has_taken(school, slot):
    slot.swap(school.old)
    handles = [ask(slot, PROBE, 150) for _ in range(6)]
    slot.swap(school.new)
    slot.swap(school.publish(lively_model("tiny-llama", seed=3)))
    expected = greedy(school.models[school.old], PROBE, 150)
    assert [handle.result(60).token_ids for handle in handles] == [expected] * 6
    eventually(lambda: school.old not in engines())


def test_a_dropped_version_leaves_memory_without_a_search_for_garbage(school, slot):
    """Such a search holds up every thread, and so every answer."""
    slot.swap(school.old)
    engine = weakref.ref(slot.current.engine)
    weight = weakref.ref(next(slot.current.engine.loaded.model.parameters()))
    gc.collect()
    gc.disable()
    try:
        slot.swap(school.new)
        slot.swap(school.publish(lively_model("tiny-llama", seed=3)))
        eventually(lambda: engine() is None and weight() is None)
    finally:
        gc.enable()


def test_without_room_for_a_third_version_the_one_before_makes_room(school, slot, monkeypatch):
    slot.swap(school.old)
    slot.swap(school.new)
    monkeypatch.setattr(slot_module, "free_bytes", lambda _: 10**12 if school.old not in engines() else 0)
    third = school.publish(lively_model("tiny-llama", seed=3))
    slot.swap(third)
    assert slot.previous.version.ref == school.new
    eventually(lambda: engines() == sorted([third, school.new]))


def test_without_room_for_a_second_version_nothing_is_loaded_and_both_numbers_are_said(school, slot, monkeypatch):
    slot.swap(school.old)
    monkeypatch.setattr(slot_module, "free_bytes", lambda _: 1000)
    monkeypatch.setattr(pool_module, "load_located", lambda *_, **__: pytest.fail("it was loaded"))
    with pytest.raises(SwapFailed, match=r"takes about .* and 1 kB of this machine are free") as failed:
        slot.swap(school.new)
    assert failed.value.stage == "load"
    school.answers_exactly(slot, school.old)


def test_an_adapter_takes_the_room_of_its_whole_base(school):
    base = school.registry.resolve(school.old)
    under = load_base(base.ref, school.home)
    elements = sum(p.numel() for p in under.model.parameters())
    wrapped = attach_lora(under.model, Lora(r=2), seed=0, base_path=str(base.path))
    facts = VersionMetadata(kind="adapter", base=base.ref, method="lora")
    adapter = school.registry.publish(
        "bot", lambda folder: save_version_folder(wrapped, byte_tokenizer(), folder, base_path=base.path), facts
    )
    for version in (base, adapter):
        assert needed_bytes(version, school.home, torch.float32) > 4 * elements
        assert needed_bytes(version, school.home, torch.bfloat16) < 4 * elements


def test_on_a_gpu_its_own_memory_counts(monkeypatch):
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (123, 456))
    assert free_bytes("cuda") == 123
    assert free_bytes("cpu") > 10**6


def test_every_answer_is_exact_for_the_version_that_it_reports_while_versions_change(school, slot):
    dice = random.Random(0)
    prompts = [random_prompt(dice, length) for length in (3, 20, 45, 80)]
    truth = {(ref, n): greedy(school.models[ref], p, 12) for ref in school.models for n, p in enumerate(prompts)}
    slot.swap(school.old)
    stop, wrong, counts = threading.Event(), [], dict.fromkeys(school.models, 0)

    def keep_asking(number):
        while not stop.is_set():
            answer = ask(slot, prompts[number], 12, request_id=f"{number}").result(60)
            counts[answer.version] += 1
            if answer.token_ids != truth[answer.version, number]:
                wrong.append((number, answer))

    asking = [threading.Thread(target=keep_asking, args=(number,)) for number in range(len(prompts))]
    for thread in asking:
        thread.start()
    third = bad_version(school, "probe")
    for number in range(12):
        if number % 4 == 3:
            with pytest.raises(SwapFailed):
                slot.swap(third)
        before = dict(counts)
        report = slot.rollback() if number % 3 == 2 else slot.swap((school.new, school.old)[number % 2])
        # Swaps go on once the new version has answered somebody.
        eventually(lambda ref=report.after, seen=before: counts[ref] > seen[ref])
    stop.set()
    for thread in asking:
        thread.join(60)
    assert wrong == []
    assert min(counts.values()) > 10


def test_settings_reach_the_engine_of_every_version(school):
    slot = Slot("bot", EnginePool(school.home, context_tokens=40))
    try:
        for ref in (school.old, school.new):
            slot.swap(ref)
            with pytest.raises(PromptTooLong, match="holds 40"):
                ask(slot, PROBE, 37)
    finally:
        slot.close()


def test_a_closed_slot_has_answered_or_cancelled_and_serves_nothing(school):
    for drain, reason in ((True, "length"), (False, "cancelled")):
        slot = Slot("bot", EnginePool(school.home, num_rows=1))
        slot.swap(school.old)
        handles = [ask(slot, PROBE, 200) for _ in range(3)]
        slot.close(drain=drain)
        assert handles[-1].result(1).finish_reason == reason
        assert slot.current is None
        with pytest.raises(SwapFailed, match="closed"):
            slot.swap(school.new)
        assert engines() == []
