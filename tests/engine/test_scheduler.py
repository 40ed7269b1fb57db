"""The scheduler keeps its promises under every order of events: order, limits, dense rows, and nobody starves."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from nightschool.engine.scheduler import Scheduler
from nightschool.errors import QueueFull

LEAST_PROMPT_TOKENS = 16


def scheduler_of(**changes):
    return Scheduler(**{"num_rows": 4, "queue_limit": 8, "tokens_per_step": 32, "cache_tokens": 10_000} | changes)


class Life(RuleBasedStateMachine):
    """Whatever comes, in whatever order; what the scheduler says is compared with a model made of lists and dicts."""

    @initialize(
        num_rows=st.integers(1, 5),
        queue_limit=st.integers(1, 6),
        tokens_per_step=st.integers(1, 40),
        cache_tokens=st.integers(1, 300),
    )
    def start(self, **limits):
        self.limits = limits
        self.now = 0.0
        self.scheduler = Scheduler(**limits, clock=lambda: self.now)
        self.wants = {}  # key: prompt tokens, tokens of the answer at most
        self.waiting = []
        self.rows = {}  # key: row
        self.held = {}  # key: tokens that went through the model
        self.next_key = 0

    @rule(prompt_tokens=st.integers(1, 120), max_new_tokens=st.integers(1, 20))
    def submit(self, prompt_tokens, max_new_tokens):
        key, self.next_key = self.next_key, self.next_key + 1
        if len(self.waiting) == self.limits["queue_limit"]:
            with pytest.raises(QueueFull) as refused:
                self.scheduler.submit(key, prompt_tokens, max_new_tokens)
            assert 1 <= refused.value.retry_after_seconds <= 60
        else:
            self.scheduler.submit(key, prompt_tokens, max_new_tokens)
            self.wants[key] = prompt_tokens, max_new_tokens
            self.waiting.append(key)

    @rule(pick=st.integers(0))
    def cancel(self, pick):
        if alive := [*self.waiting, *self.rows]:
            self.finish(alive[pick % len(alive)])

    @rule()
    def cancel_what_is_gone(self):
        assert self.scheduler.finish(-1) is None

    @rule(cached=st.integers(0, 3), seconds=st.floats(0, 5))
    def step(self, cached, seconds):
        """As the engine does it: admit, compact, plan; an answer ends at its last token."""
        self.now += seconds
        before = len(self.rows)
        for admission in self.scheduler.admit():
            assert admission.key == self.waiting.pop(0), "first come, first served"
            self.rows[admission.key] = admission.row
            self.held[admission.key] = 0
        assert self.rows or not self.waiting, "an idle engine takes whoever waits"
        if self.waiting and len(self.rows) < self.limits["num_rows"]:
            places = max(sum(self.wants[key]) for key in [*self.rows, self.waiting[0]])
            assert places * (len(self.rows) + 1) > self.limits["cache_tokens"], "it would have fitted"
        if len(self.rows) > max(before, 1):
            places = max(sum(self.wants[key]) for key in self.rows)
            assert places * len(self.rows) <= self.limits["cache_tokens"]
        self.follow(self.scheduler.compact())
        assert sorted(self.rows.values()) == list(range(len(self.rows))), "rows are dense"
        for key, held in self.held.items():
            tokens = min(cached, self.wants[key][0] - 1)
            if held == 0 and tokens:
                self.scheduler.reuse(key, tokens)
                self.held[key] = tokens
        plan = self.scheduler.plan()
        assert self.scheduler.plan() == plan, "planning changes nothing"
        self.check(plan)
        self.scheduler.advance(plan)
        for span in plan.spans:
            self.held[span.key] += span.length
            if self.held[span.key] >= sum(self.wants[span.key]):
                self.finish(span.key)

    def follow(self, moves):
        """Nothing is moved over a row in use, and only what is held."""
        for move in moves:
            key = next(key for key, row in self.rows.items() if row == move.source)
            assert move.target not in self.rows.values()
            assert move.tokens == self.held[key]
            self.rows[key] = move.target

    def check(self, plan):
        prompt_left = {key: self.wants[key][0] - self.held[key] for key in self.rows}
        assert {span.key for span in plan.decode} == {key for key, left in prompt_left.items() if left <= 0}
        reading = {key for key, left in prompt_left.items() if left > 0}
        assert [span.row for span in plan.decode] == sorted(span.row for span in plan.decode)
        for span in plan.spans:
            assert (span.row, span.start) == (self.rows[span.key], self.held[span.key])
        assert all((span.length, span.answers) == (1, True) for span in plan.decode)
        assert all(1 <= span.length <= prompt_left[span.key] for span in plan.prefill)
        assert all(span.answers == (span.length == prompt_left[span.key]) for span in plan.prefill)
        assert {span.key for span in plan.prefill} == reading, "every prompt advances at every step"
        budget = max(self.limits["tokens_per_step"] - len(plan.decode), LEAST_PROMPT_TOKENS, len(reading))
        read = sum(span.length for span in plan.prefill)
        assert read == min(budget, sum(prompt_left[key] for key in reading)), "no more than the budget, and all of it"

    def finish(self, key):
        assert self.scheduler.finish(key) == self.rows.pop(key, None)
        self.held.pop(key, None)
        if key in self.waiting:
            self.waiting.remove(key)

    @invariant()
    def it_knows_what_it_holds(self):
        if hasattr(self, "scheduler"):
            assert (self.scheduler.num_waiting, self.scheduler.num_running) == (len(self.waiting), len(self.rows))
            assert self.scheduler.is_idle == (not self.waiting and not self.rows)
            places = max((sum(self.wants[key]) for key in self.rows), default=0)
            assert self.scheduler.longest_need_tokens == places

    def teardown(self):
        """Nobody starves: without new requests everybody is through after a number of steps that can be foreseen."""
        if hasattr(self, "scheduler"):
            left = [sum(self.wants[key]) - self.held.get(key, 0) for key in [*self.waiting, *self.rows]]
            for _ in range(sum(left) + 1):
                if self.scheduler.is_idle:
                    break
                self.step(0, 1.0)
            assert self.scheduler.is_idle


Life.TestCase.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)
test_every_order_of_events_keeps_the_promises = Life.TestCase


def run_steps(scheduler, count):
    plans = []
    for _ in range(count):
        scheduler.admit()
        scheduler.compact()
        plans.append(scheduler.plan())
        scheduler.advance(plans[-1])
    return plans


def test_a_long_prompt_delays_answers_by_one_chunk_at_most():
    scheduler = scheduler_of(tokens_per_step=32)
    scheduler.submit(1, 4, 100)
    run_steps(scheduler, 1)
    scheduler.submit(2, 500, 100)
    plans = run_steps(scheduler, 10)
    assert all([span.key for span in plan.decode] == [1] for plan in plans)
    assert [span.length for plan in plans for span in plan.prefill] == [31] * 10


def test_a_short_prompt_overtakes_a_long_one_in_reading_but_not_in_the_queue():
    scheduler = scheduler_of(num_rows=2, tokens_per_step=32)
    for key, prompt_tokens in ((1, 300), (2, 20), (3, 5)):
        scheduler.submit(key, prompt_tokens, 10)
    first, second = run_steps(scheduler, 2)
    assert [(span.key, span.length) for span in first.prefill] == [(1, 16), (2, 16)]
    assert [(span.key, span.length, span.answers) for span in second.prefill] == [(1, 28, False), (2, 4, True)]
    assert scheduler.num_waiting == 1


def test_one_that_needs_more_than_the_whole_cache_is_answered_alone():
    scheduler = scheduler_of(cache_tokens=100)
    for key, prompt_tokens in ((1, 10), (2, 500), (3, 10)):
        scheduler.submit(key, prompt_tokens, 10)
    assert [admission.key for admission in scheduler.admit()] == [1]
    assert scheduler.admit() == [], "a later one that fits does not overtake"
    scheduler.finish(1)
    assert [admission.key for admission in scheduler.admit()] == [2]
    scheduler.finish(2)
    assert [admission.key for admission in scheduler.admit()] == [3]


def test_a_cancelled_row_is_free_for_the_next_admission():
    scheduler = scheduler_of(num_rows=2)
    for key in range(3):
        scheduler.submit(key, 10, 10)
    run_steps(scheduler, 1)
    assert scheduler.finish(0) == 0
    assert [(admission.key, admission.row) for admission in scheduler.admit()] == [(2, 0)]
    assert scheduler.compact() == []


def test_the_last_row_fills_the_hole_if_nobody_waits():
    scheduler = scheduler_of(tokens_per_step=64)
    for key in range(4):
        scheduler.submit(key, 10, 10)
    run_steps(scheduler, 2)
    scheduler.finish(0)
    scheduler.finish(2)
    assert scheduler.admit() == []
    assert [(move.source, move.target, move.tokens) for move in scheduler.compact()] == [(3, 0, 11)]


def test_the_time_to_come_back_follows_the_pace_of_the_queue():
    now = [0.0]
    scheduler = scheduler_of(num_rows=1, queue_limit=4, clock=lambda: now[0])
    for key in range(10):
        scheduler.submit(key, 1, 1)
        scheduler.admit()
        now[0] += 3
        scheduler.finish(key)
    for key in range(10, 14):
        scheduler.submit(key, 1, 1)
    now[0] += 3
    with pytest.raises(QueueFull) as refused:
        scheduler.submit(99, 1, 1)
    assert refused.value.retry_after_seconds == pytest.approx(12, abs=2)


@given(st.lists(st.integers(1, 300), min_size=1, max_size=8), st.integers(1, 100))
def test_no_prompt_gets_less_than_a_shorter_one_that_is_not_done(lengths, tokens_per_step):
    scheduler = scheduler_of(num_rows=8, tokens_per_step=tokens_per_step, cache_tokens=100_000)
    for key, length in enumerate(lengths):
        scheduler.submit(key, length, 1)
    [plan] = run_steps(scheduler, 1)
    share = {span.key: span.length for span in plan.prefill}
    unfinished = [share[key] for key, length in enumerate(lengths) if share[key] < length]
    assert not unfinished or max(unfinished) - min(unfinished) <= 1
    assert not unfinished or max(share.values()) <= max(unfinished) + 1  # what is left of a division goes to some
