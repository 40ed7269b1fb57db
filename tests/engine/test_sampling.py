"""Choosing tokens: the shares of every setting are those of its definition, and no row looks at another."""

import math
from collections import Counter

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings

from nightschool.engine.request import SamplingParams
from nightschool.engine.sampling import RowSampling, choose
from nightschool.errors import UsageError

VOCAB = 50
CPU = torch.device("cpu")


def row(prompt=(0,), vocab=VOCAB, **params):
    return RowSampling(SamplingParams(**params), list(prompt), vocab, CPU)


def logits_of(*rows):
    return torch.tensor(rows, dtype=torch.float32)


def random_logits(rows, vocab=VOCAB, seed=0):
    return torch.randn(rows, vocab, generator=torch.Generator().manual_seed(seed)) * 3


def shares_by_definition(logits, params):
    """Temperature, then top_k, then top_p of what is left, then min_p: the order of transformers' own processors."""
    p = (logits.double() / params.temperature).softmax(-1)
    order = p.argsort(descending=True).tolist()
    kept = order[: params.top_k or len(order)]
    total, before, nucleus = sum(float(p[i]) for i in kept), 0.0, []
    for i in kept:
        if before < params.top_p * total or not nucleus:
            nucleus.append(i)
        before += float(p[i])
    kept = [i for i in nucleus if float(p[i]) >= params.min_p * float(p[order[0]])]
    total = sum(float(p[i]) for i in kept)
    return {i: float(p[i]) / total for i in kept}


SETTINGS = [
    {},
    {"temperature": 0.5},
    {"temperature": 3.0},
    {"top_k": 3},
    {"top_k": 1},
    {"top_p": 0.6},
    {"top_p": 0.01},
    {"min_p": 0.2},
    {"top_k": 8, "top_p": 0.7, "min_p": 0.1, "temperature": 1.4},
    {"top_k": 10_000},
]


@pytest.mark.parametrize("params", SETTINGS, ids=str)
def test_tokens_come_as_often_as_their_definition_says(params):
    logits = random_logits(1)[0]
    count = 4000
    rows = [row(seed=seed, **params) for seed in range(count)]
    seen = Counter(choice.token_id for choice in choose(logits.expand(count, -1), rows))
    expected = shares_by_definition(logits, SamplingParams(**params))
    assert set(seen) <= set(expected)
    for token, share in expected.items():
        deviation = math.sqrt(share * (1 - share) / count)
        assert seen[token] / count == pytest.approx(share, abs=5 * deviation + 1e-9)


def test_a_nucleus_wider_than_the_first_look_takes_the_whole_vocabulary():
    vocab = 2000
    flat = torch.zeros(1, vocab)
    tokens = {choose(flat, [row(vocab=vocab, top_p=0.99, seed=seed)])[0].token_id for seed in range(600)}
    assert len(tokens) > 400


@given(
    draws=st.lists(
        st.fixed_dictionaries(
            {
                "temperature": st.sampled_from([0.0, 0.7, 1.0, 2.0]),
                "top_p": st.sampled_from([1.0, 0.9, 0.3]),
                "top_k": st.sampled_from([0, 1, 7]),
                "min_p": st.sampled_from([0.0, 0.3]),
                "repetition_penalty": st.sampled_from([1.0, 1.5]),
                "presence_penalty": st.sampled_from([0.0, 1.0]),
                "frequency_penalty": st.sampled_from([0.0, -0.5]),
                "logprobs": st.sampled_from([None, 0, 3]),
                "seed": st.integers(0, 2**64 - 1),
            }
        ),
        min_size=2,
        max_size=6,
    ),
    seed=st.integers(0, 100),
)
@settings(max_examples=60, deadline=None)
def test_a_row_chooses_alike_alone_and_in_any_company(draws, seed):
    logits = random_logits(len(draws), seed=seed)
    together, alone = ([row(prompt=[1, 2], **params) for params in draws] for _ in range(2))
    for _ in range(3):
        choices = choose(logits, together)
        for place, choice in enumerate(choices):
            (single,) = choose(logits[place : place + 1], [alone[place]])
            assert single.token_id == choice.token_id
            assert (single.logprob is None) == (choice.logprob is None)
            together[place].note(choice.token_id)
            alone[place].note(choice.token_id)


def test_temperature_zero_is_the_likeliest_token_whatever_else_is_set():
    logits = random_logits(4)
    rows = [row(temperature=0, top_p=0.1, top_k=5, min_p=0.5, seed=i) for i in range(4)]
    assert [c.token_id for c in choose(logits, rows)] == logits.argmax(-1).tolist()
    mixed = [*rows[:3], row(temperature=1.0)]
    assert [c.token_id for c in choose(logits, mixed)][:3] == logits.argmax(-1).tolist()[:3]


def test_a_repeated_step_draws_the_same_token_and_the_next_step_another_number():
    logits = torch.zeros(1, VOCAB)
    one = row(seed=3)
    first = choose(logits, [one])[0].token_id
    assert choose(logits, [one])[0].token_id == first
    one.note(first)
    later = []
    for _ in range(8):
        later.append(choose(logits, [one])[0].token_id)
        one.note(later[-1])
    assert len({first, *later}) > 3


def test_penalties_are_those_of_their_definitions():
    logits = logits_of([2.0, -2.0, 1.0, 0.5])
    one = row(prompt=[0, 1], vocab=4, repetition_penalty=2.0, presence_penalty=0.25, frequency_penalty=0.1)
    for token in (2, 2, 3):
        one.note(token)
    # The prompt's tokens count for the repetition penalty only; a logit below 0 is multiplied.
    expected = [1.0, -4.0, 0.5 - 2 * 0.1 - 0.25, 0.25 - 0.1 - 0.25]
    assert one.penalise(logits[0]).tolist() == pytest.approx(expected)
    assert row(vocab=4).penalise(logits[0]) is logits[0] or row(vocab=4).penalise(logits[0]).equal(logits[0])


def test_a_penalty_moves_a_greedy_answer_on():
    logits = logits_of([1.0, 0.9, 0.0])
    one, chosen = row(prompt=[2], vocab=3, temperature=0, presence_penalty=0.5), []
    for _ in range(3):
        chosen.append(choose(logits, [one])[0].token_id)
        one.note(chosen[-1])
    assert chosen == [0, 1, 0]


def test_logprobs_are_those_before_temperature_and_penalties():
    logits = random_logits(2)
    rows = [row(temperature=0.1, presence_penalty=2.0, logprobs=4, seed=1), row(temperature=0, logprobs=0)]
    rows[0].note(int(logits[0].argmax()))
    first, second = (choice.logprob for choice in choose(logits, rows))
    expected = logits.log_softmax(-1)
    assert first.logprob == pytest.approx(float(expected[0, first.token_id]), abs=1e-5)
    assert [token for token, _ in first.top] == expected[0].topk(4).indices.tolist()
    assert second.top == ()
    assert second.logprob == pytest.approx(float(expected[1].max()), abs=1e-5)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("params", [{"temperature": 0}, {"temperature": 1.0, "top_p": 0.9}], ids=str)
def test_only_the_row_whose_logits_are_no_numbers_says_so(bad, params):
    logits = random_logits(3)
    logits[1, 7] = bad
    choices = choose(logits, [row(**params) for _ in range(3)])
    assert [choice.is_finite for choice in choices] == [True, False, True]


TINIEST = 5e-324


@pytest.mark.parametrize("restriction", [{}, {"top_k": 5}, {"top_p": 0.9}, {"min_p": 0.1}], ids=str)
@pytest.mark.parametrize("temperature", [TINIEST, 1e-46, 1e-38, 1e-10])
def test_next_to_no_temperature_is_the_likeliest_token(temperature, restriction):
    logits = random_logits(4)
    logits[0, 7] = -math.inf
    rows = [row(temperature=temperature, **restriction) for _ in range(3)] + [row()]
    chosen = choose(logits, rows)
    assert [choice.token_id for choice in chosen[:3]] == logits[:3].argmax(-1).tolist()
    assert all(choice.is_finite for choice in chosen)


@pytest.mark.parametrize("params", [{"top_p": TINIEST}, {"top_p": 1e-46, "top_k": 3}, {"min_p": 1.0}], ids=str)
def test_next_to_no_share_still_leaves_the_likeliest_token(params):
    logits = random_logits(3)
    chosen = choose(logits, [row(**params) for _ in range(3)])
    assert [choice.token_id for choice in chosen] == logits.argmax(-1).tolist()


@pytest.mark.parametrize("penalty", [0.01, 100.0])
def test_penalties_at_their_bounds_choose_a_token_that_there_is(penalty):
    logits = random_logits(2) * 1e30
    rows = [row(range(VOCAB), repetition_penalty=penalty, temperature=t, presence_penalty=-2.0) for t in (0.0, 1.0)]
    assert all(choice.is_finite and 0 <= choice.token_id < VOCAB for choice in choose(logits, rows))


def test_a_row_whose_logits_a_penalty_makes_no_numbers_says_so_and_spares_the_others():
    logits = random_logits(2) * 1e37
    wild, plain = row(range(VOCAB), repetition_penalty=0.01), row()
    chosen = choose(logits, [wild, plain])
    assert [choice.is_finite for choice in chosen] == [False, True]
    assert all(0 <= choice.token_id < VOCAB for choice in chosen)


@pytest.mark.parametrize("penalty", [0.0, TINIEST, 1e-45, 0.009, 101.0, math.inf, math.nan])
def test_a_penalty_that_leaves_no_numbers_is_refused(penalty):
    with pytest.raises(UsageError, match=r"repetition_penalty .* from 0.01 to 100"):
        SamplingParams(repetition_penalty=penalty)


def test_tokens_of_probability_zero_never_come():
    logits = torch.full((1, VOCAB), -math.inf)
    logits[0, 20:23] = 0
    tokens = {choose(logits, [row(seed=seed)])[0].token_id for seed in range(200)}
    assert tokens == {20, 21, 22}
