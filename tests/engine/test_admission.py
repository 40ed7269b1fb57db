"""Who is admitted next: fair between tenants, in order within each, few adapters at once, and nobody starves."""

import random
from collections import Counter

import pytest

from nightschool.engine.admission import ADMISSION_POLICIES, FairByTenant, FirstCome
from nightschool.engine.scheduler import Scheduler


def scheduler_of(admission=None, **changes):
    limits = {"num_rows": 1, "queue_limit": 10_000, "tokens_per_step": 64, "cache_tokens": 1 << 30}
    return Scheduler(**limits | changes, admission=admission)


class Server:
    """Steps a scheduler as the engine does; an answer ends at its last token."""

    def __init__(self, scheduler):
        self.scheduler = scheduler
        self.wants = {}
        self.tenants = {}
        self.adapters = {}
        self.admitted = []
        self.running = set()
        self.tokens = Counter()

    def ask(self, tenant="t", *, prompt=4, answer=1, adapter=None):
        key = len(self.wants)
        self.scheduler.submit(key, prompt, answer, tenant=tenant, adapter=adapter)
        self.wants[key], self.tenants[key], self.adapters[key] = prompt + answer, tenant, adapter
        return key

    def step(self):
        for admission in self.scheduler.admit():
            self.admitted.append(admission.key)
            self.running.add(admission.key)
        self.scheduler.compact()
        plan = self.scheduler.plan()
        self.scheduler.advance(plan)
        for span in plan.spans:
            self.tokens[self.tenants[span.key]] += span.length
            # The last token of an answer does not go through the model.
            if span.start + span.length >= self.wants[span.key] - 1:
                self.scheduler.finish(span.key)
                self.running.discard(span.key)

    def run(self, steps=10_000):
        for _ in range(steps):
            if self.scheduler.is_idle:
                break
            self.step()
        return [self.tenants[key] for key in self.admitted]


def test_first_come_is_first_served_whoever_asks():
    server = Server(scheduler_of(FirstCome()))
    for tenant in "aaabab":
        server.ask(tenant)
    assert "".join(server.run()) == "aaabab"


def test_a_tenant_with_a_long_queue_does_not_hold_up_the_others():
    server = Server(scheduler_of(FairByTenant()))
    for tenant in "aaaaaabbc":
        server.ask(tenant)
    assert "".join(server.run()) == "abcabaaaa"


def test_rows_that_become_free_at_once_are_shared_too():
    server = Server(scheduler_of(FairByTenant(), num_rows=4))
    for tenant in "aaaabb":
        server.ask(tenant, answer=3)
    server.step()
    assert [server.tenants[key] for key in server.admitted] == list("abab")


def test_what_counts_is_tokens_not_requests():
    server = Server(scheduler_of(FairByTenant()))
    for _ in range(60):
        server.ask("short", prompt=2, answer=8)
        server.ask("long", prompt=20, answer=20)
    order = server.run(200)
    assert order.count("short") > 2 * order.count("long") > 0
    assert abs(server.tokens["short"] - server.tokens["long"]) <= 40


def test_requests_of_one_tenant_keep_their_order():
    server = Server(scheduler_of(FairByTenant(), num_rows=3))
    keys = [server.ask("a", prompt=random.Random(n).randrange(1, 30)) for n in range(20)]
    server.run()
    assert server.admitted == keys


def test_who_was_away_has_saved_nothing_up():
    server = Server(scheduler_of(FairByTenant()))
    for _ in range(50):
        server.ask("busy")
    for _ in range(40):
        server.step()
    before = len(server.admitted)
    for _ in range(10):
        server.ask("late")
    order = server.run()[before:]
    assert max(Counter(order[:8]).values()) <= 5, "they take turns from now on"


def test_who_took_much_and_comes_back_at_once_is_not_forgiven():
    policy = FairByTenant()
    server = Server(scheduler_of(policy))
    server.ask("greedy", answer=500)
    server.ask("modest", answer=100)
    server.run(499)
    server.ask("modest", answer=100)
    server.ask("greedy")
    server.ask("modest")
    assert server.run()[2:] == ["modest", "modest", "greedy"]


def test_prefixes_that_were_known_are_not_charged():
    scheduler = scheduler_of(FairByTenant())
    for key, tenant in enumerate("ab"):
        scheduler.submit(key, 100, 1, tenant=tenant)
    scheduler.admit()
    scheduler.reuse(0, 96)
    scheduler.finish(0)
    scheduler.submit(2, 3, 1, tenant="a")
    assert [admission.key for admission in scheduler.admit()] == [1]
    scheduler.finish(1)
    scheduler.submit(3, 1, 1, tenant="b")
    assert [admission.key for admission in scheduler.admit()] == [2]


def test_tenants_that_are_gone_are_forgotten():
    policy = FairByTenant()
    server = Server(scheduler_of(policy, num_rows=2))
    server.ask("one that stays", answer=5000)
    for number in range(300):
        server.ask(f"tenant {number}", answer=random.Random(number).randrange(1, 9))
        server.run(9)
    assert len(policy._tokens) < 30
    server.run()
    server.ask("last")
    assert list(policy._tokens) == ["last"]


@pytest.mark.parametrize("policy", ADMISSION_POLICIES.values())
def test_the_adapters_of_a_step_are_bounded_and_nobody_starves(policy):
    server = Server(scheduler_of(policy(), num_rows=6, max_adapters=2))
    rare = None
    for round_ in range(200):
        # Both are always being answered; without a limit on passing, the third would wait for ever.
        for tenant, adapter in (("a", "x"), ("b", "y")):
            server.ask(tenant, adapter=adapter, answer=4 + round_ % 2)
        if round_ == 20:
            rare = server.ask("c", adapter="z")
        server.step()
        assert len({server.adapters[key] for key in server.running}) <= 2
    assert rare in server.admitted
    server.run()
    assert len(server.admitted) == len(server.wants)


def test_who_needs_no_further_adapter_passes_one_that_waits():
    server = Server(scheduler_of(FirstCome(), num_rows=4, max_adapters=1))
    for adapter in ("x", "y", None, "x"):
        server.ask(adapter=adapter, answer=5)
    server.step()
    assert server.admitted == [0, 2, 3]
    server.run()
    assert server.admitted == [0, 2, 3, 1]
