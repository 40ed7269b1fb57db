"""Adapters that leave their engine go to host memory, come back from there as they were, and leave that one in their turn."""

import random

import pytest

from nightschool.engine import adapters
from nightschool.engine import pool as pool_module
from nightschool.engine.host_tier import HostTier
from nightschool.engine.pool import EnginePool
from nightschool.engine.slot import Slot
from tests.support.adapter_setups import House
from tests.support.engine_setups import random_prompt, request


@pytest.fixture(scope="module")
def house(tmp_path_factory):
    return House(tmp_path_factory.mktemp("home"))


def answer(slot, prompt):
    generation = slot.current
    return generation.engine.submit(request(prompt, max_new_tokens=12, binding=generation.binding)).result(60).token_ids


@pytest.mark.parametrize("has_kernel", [True, False])
def test_an_adapter_comes_back_from_host_memory_as_it_was(house, has_kernel, monkeypatch):
    if not has_kernel:
        monkeypatch.setattr(adapters, "_has_kernel", lambda like: False)
    pool = EnginePool(house.home, host_bytes=1 << 30)
    stays, slot = Slot("cat", pool), Slot("bot", pool)
    stays.swap(house.cat.ref)
    slot.swap(house.one.ref)
    num_bytes, prompt = slot.num_bytes, random_prompt(random.Random(1), 9)
    before = answer(slot, prompt)
    slot.close(drain=True, keep=True)
    assert pool.host.load() == (1, num_bytes, 0)
    assert slot.num_bytes == 0
    monkeypatch.setattr(pool_module, "load_unmerged", lambda *_: pytest.fail("the file was read again"))
    slot = Slot("bot", pool)
    slot.swap(house.one.ref)
    assert pool.host.load() == (0, 0, 0)
    assert answer(slot, prompt) == before == tuple(house.one.greedy(prompt, 12))
    slot.close(drain=True)
    stays.close()
    assert pool.host.load() == (0, 0, 0), "what was closed for good is kept nowhere"


def test_over_its_bytes_the_one_that_left_first_goes(house):
    pool = EnginePool(house.home, host_bytes=1 << 30)
    for ref in (house.one.ref, house.two.ref, house.cat.ref):
        slot = Slot(ref.partition("@")[0], pool)
        slot.swap(ref)
        num_bytes = slot.num_bytes
        slot.close(keep=True)
    refs = [house.one.ref, house.two.ref, house.cat.ref]
    left = [pool.host.take(ref) for ref in refs]
    assert all(left)
    host = HostTier(2 * num_bytes)
    for adapter in left:
        host.put(adapter)
    assert host.load() == (2, 2 * num_bytes, 1)
    assert [host.take(ref) is not None for ref in refs] == [False, True, True]
    none = HostTier(num_bytes - 1)
    none.put(left[0])
    assert none.load() == (0, 0, 0)
