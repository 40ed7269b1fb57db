"""Whatever tenants do in whatever order, each gets its own model's answer, and no other's prompt is known to its cache."""

import asyncio

import hypothesis.strategies as st
import pytest
from hypothesis import HealthCheck, given, settings

from nightschool.engine.pool import EnginePool
from nightschool.engine.request import SamplingParams
from nightschool.engine.slot import Slot
from nightschool.errors import NotFound
from nightschool.server.metrics import Metrics
from nightschool.server.on_demand import OnDemand
from nightschool.server.served_names import ServedNames
from nightschool.server.submission import Answering, Ask
from nightschool.store.names import full_name
from nightschool.store.principal import Principal
from nightschool.store.registry import Registry
from tests.support.adapter_setups import House, lively_adapter, publish_adapter

TENANTS = ("acme", "zoo", "default")
# Two blocks of the prefix cache and a bit, alike for all.
PROMPTS = ["abcdefgh" * 9 + end for end in ("x", "yz")]


class Street:
    """Two versions of a name of each tenant, all adapters of one base, and what each of them answers."""

    def __init__(self, path):
        self.house = House(path)
        self.registry = self.house.registry
        self.versions, self.expected = {}, {}
        for place, tenant in enumerate(TENANTS):
            wrapped = [lively_adapter(seed=10 * place + number) for number in (1, 2)]
            made = [
                publish_adapter(self.registry, one, self.house.base, name=full_name(tenant, "dog")) for one in wrapped
            ]
            self.versions[tenant] = [one.ref for one in made]
            for one in made:
                ids = {prompt: self.house.tokenizer.encode(prompt) for prompt in PROMPTS}
                self.expected[one.ref] = {
                    prompt: self.house.tokenizer.decode(one.greedy(tokens, 5)) for prompt, tokens in ids.items()
                }
        answers = [tuple(answer.values()) for answer in self.expected.values()]
        assert len(set(answers)) == len(answers), "two versions answer alike, so nothing would be noticed"

    def promote(self, tenant, place):
        name, _, version = self.versions[tenant][place].partition("@")
        self.registry.promote(name, version, by="test")


@pytest.fixture(scope="module")
def street(tmp_path_factory):
    return Street(tmp_path_factory.mktemp("street"))


tenants = st.sampled_from(TENANTS)
asking = st.tuples(st.just("ask"), tenants, st.sampled_from(["key", "other"]), st.sampled_from(PROMPTS))
promoting = st.tuples(st.just("promote"), tenants, st.integers(0, 1))
unloading = st.tuples(st.just("unload"), tenants)
waiting = st.tuples(st.just("wait"))
steps = st.lists(st.one_of(asking, asking, asking, promoting, unloading, waiting), min_size=4, max_size=14)


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(story=steps)
def test_each_tenant_gets_the_answers_of_its_own_versions_and_nobody_elses_prefixes(street, story):
    asyncio.run(_told(street, story))


async def _told(street, story):
    for tenant in TENANTS:
        street.promote(tenant, 0)
    pool = EnginePool(street.house.home, num_rows=4)
    names = ServedNames([Slot("default", pool)], OnDemand(lambda name: Slot(name, pool), most=2), street.registry)
    answering, asked, tasks = Answering(names, Metrics(names)), set(), []

    async def ask(tenant, key, prompt):
        params = SamplingParams(max_new_tokens=1, temperature=0, ignore_eos=True)
        principal = Principal(tenant, frozenset(), key)
        running = await answering.start(Ask([prompt], params, 5, 5, "dog", principal), "r")
        label = running.binding.label
        was_asked = (label, tenant, key) in asked
        asked.add((label, tenant, key))
        [answer] = await running.answers()
        assert label in street.versions[tenant]
        assert answer.text == street.expected[label][prompt]
        assert was_asked or not running.cached_tokens, "a prefix of somebody else"

    for what, *more in story:
        if what == "ask":
            tasks.append(asyncio.create_task(ask(*more)))
        elif what == "promote":
            await asyncio.to_thread(street.promote, *more)
            for slot in await asyncio.to_thread(names.moved):
                await asyncio.to_thread(slot.refresh)
        elif what == "unload":
            await names.unload(full_name(more[0], "dog"))
        else:
            await asyncio.gather(*tasks)
    await asyncio.gather(*tasks)
    # Whatever happened meanwhile: who asks now is answered by the champion.
    for slot in await asyncio.to_thread(names.moved):
        await asyncio.to_thread(slot.refresh)
    for tenant in TENANTS:
        generation, _ = await names.resolve("dog", Principal(tenant, frozenset()))
        assert generation.version.ref == street.registry.resolve(full_name(tenant, "dog")).ref
    await names.close()
    assert pool._engines == {}


def test_a_name_means_its_champion_whatever_is_promoted_meanwhile(street, monkeypatch):
    opened = []

    def open_slot(name):
        opened.append(name)
        raise NotFound("It is enough to know its name.")

    resolve = Registry.resolve

    def resolve_and_promote(registry, ref):
        found = resolve(registry, ref)
        with monkeypatch.context() as once:
            once.setattr(Registry, "resolve", resolve)
            street.promote("acme", 1)
        return found

    street.promote("acme", 0)
    monkeypatch.setattr(Registry, "resolve", resolve_and_promote)

    async def story():
        given = Slot("default", EnginePool(street.house.home))
        names = ServedNames([given], OnDemand(open_slot, most=2), street.registry)
        for model in ("dog", "dog@champion"):
            with pytest.raises(NotFound):
                await names.find(model, Principal("acme", frozenset()))
        await names.close()

    asyncio.run(story())
    assert opened == ["acme/dog"] * 2


def test_a_tenant_finds_its_own_prefix_again_and_a_second_key_does_not(street):
    async def story():
        pool = EnginePool(street.house.home, num_rows=4)
        names = ServedNames([Slot("default", pool)], OnDemand(lambda name: Slot(name, pool), most=8), street.registry)
        answering = Answering(names, Metrics(names))
        known = []
        for tenant, key in (("acme", "a"), ("acme", "a"), ("acme", "b"), ("zoo", "a"), ("acme", "a")):
            ask = Ask(
                [PROMPTS[0]],
                SamplingParams(max_new_tokens=1, temperature=0),
                2,
                2,
                "dog",
                Principal(tenant, frozenset(), key),
            )
            running = await answering.start(ask, "r")
            await running.answers()
            known.append(running.cached_tokens)
            if len(known) == 4:
                await names.unload("acme/dog")
        await names.close()
        return known

    known = asyncio.run(story())
    assert known[1] > 0
    assert [known[0], *known[2:]] == [0, 0, 0, 0], "a prefix goes with the adapter that it was read with"
