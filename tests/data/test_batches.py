"""Packing and batches: every document once, whole, in an order that only the seed and the epoch decide."""

from __future__ import annotations

import itertools
import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nightschool.data.batches import IGNORED, Batches
from nightschool.data.chat.render import Rendered
from nightschool.data.chat.render_examples import CHUNK_EXAMPLES, render_examples
from nightschool.data.example import Example, Message
from nightschool.data.packing import WINDOW_EXAMPLES, plan_epoch, shuffled
from nightschool.data.synthetic import make_world
from nightschool.data.tokenizer import train_bpe
from nightschool.errors import DataError, NothingToTrain

_lengths = st.lists(st.integers(1, 300), min_size=1, max_size=200).map(lambda values: np.array(values, dtype=np.int64))


def document(*ids: int, weights: list[float] | None = None) -> Rendered:
    return Rendered(list(ids), [0.0] + [1.0] * (len(ids) - 1) if weights is None else weights, ["text"] * len(ids))


def documents(count: int = 40) -> list[Rendered]:
    return [document(*range(100 * i, 100 * i + 2 + i % 7)) for i in range(count)]


# --- the plan ---


@given(_lengths, st.integers(1, 20), st.integers(0, 2**40), st.integers(0, 5))
def test_every_example_is_in_exactly_one_batch(lengths, size: int, seed: int, epoch: int) -> None:
    plan = plan_epoch(lengths, batch_size=size, seed=seed, epoch=epoch)
    assert sorted(i for batch in plan for i in batch) == list(range(len(lengths)))
    assert all(len(batch) == size for batch in plan[:-1])
    filled = plan_epoch(lengths, tokens_per_batch=256, seed=seed, epoch=epoch)
    assert sorted(i for batch in filled for i in batch) == list(range(len(lengths)))
    for batch in filled:
        assert batch
        assert lengths[batch].sum() <= 256 or len(batch) == 1
    assert plan == plan_epoch(lengths, batch_size=size, seed=seed, epoch=epoch)


def test_batches_are_filled_well() -> None:
    lengths = (shuffled(10_000, seed=3, epoch=0) % 400 + 20).astype(np.int64)
    plan = plan_epoch(lengths, tokens_per_batch=2048, seed=0, epoch=0)
    assert lengths.sum() / (len(plan) * 2048) > 0.99
    assert len(lengths) > 4 * WINDOW_EXAMPLES


def test_seeds_and_epochs_give_other_orders() -> None:
    lengths = np.full(100, 10, dtype=np.int64)
    plans = [plan_epoch(lengths, batch_size=4, seed=seed, epoch=epoch) for seed in range(3) for epoch in range(3)]
    assert len({json.dumps(plan) for plan in plans}) == 9
    assert plans[0] != sorted(plans[0])


def test_the_order_is_the_same_everywhere() -> None:
    """A changed order would break every stored position, so it is written down."""
    assert shuffled(10, seed=42, epoch=0).tolist() == ORDER_42_0
    counts = np.zeros(10)
    for seed in range(2000):
        counts[shuffled(10, seed=seed, epoch=0)[0]] += 1
    assert counts.min() > 150  # 200 expected; each place is about as likely


ORDER_42_0 = [4, 9, 8, 1, 6, 3, 5, 0, 2, 7]


@pytest.mark.parametrize(
    "sizes", [{}, {"batch_size": 0}, {"tokens_per_batch": 0}, {"batch_size": 1, "tokens_per_batch": 1}]
)
def test_exactly_one_size_is_given(sizes: dict) -> None:
    with pytest.raises(ValueError, match="give one of them, at least 1"):
        plan_epoch(np.array([1]), seed=0, epoch=0, **sizes)


# --- batches ---


def test_a_batch_by_hand() -> None:
    batches = Batches([document(5, 6, 7, weights=[0.0, 0.0, 0.5]), document(8, 9)], batch_size=2, seed=0)
    batch = batches.get(0, 0)
    first = batch.input_ids[0, 0].item() == 5
    assert batch.input_ids.tolist() == [[5, 6, 7, 8, 9] if first else [8, 9, 5, 6, 7]]
    assert batch.labels.tolist() == [[IGNORED, 7, IGNORED, 9, IGNORED] if first else [9, IGNORED, IGNORED, 7, IGNORED]]
    assert batch.weights.tolist() == [[0, 0.5, 0, 1, 0] if first else [1, 0, 0, 0.5, 0]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 0, 1] if first else [0, 1, 0, 1, 2]]
    assert batch.cu_seqlens.tolist() == ([0, 3, 5] if first else [0, 2, 5])
    assert (batch.max_seqlen, batch.tokens_trained) == (3, 2)
    assert (batch.input_ids.dtype, batch.position_ids.dtype, batch.labels.dtype) == (torch.int64,) * 3
    assert (batch.weights.dtype, batch.cu_seqlens.dtype) == (torch.float32, torch.int32)


@settings(max_examples=50, deadline=None)
@given(
    st.lists(
        st.lists(st.tuples(st.integers(0, 2**31 - 1), st.sampled_from([0.0, 0.5, 1.0])), min_size=1, max_size=12),
        min_size=1,
        max_size=20,
    ),
    st.sampled_from([{"batch_size": 3}, {"tokens_per_batch": 16}]),
)
def test_an_epoch_holds_each_document_whole_and_once(raw, size: dict) -> None:
    made = [document(*(i for i, _ in row), weights=[0.0, *(w for _, w in row[1:])]) for row in raw]
    wanted = sorted((d.input_ids, d.weights) for d in made if d.trained_tokens)
    if not wanted:
        with pytest.raises(NothingToTrain, match="has a token that would carry loss"):
            Batches(made, **size, seed=1)
        return
    batches = Batches(made, **size, seed=1)
    assert batches.num_left_out == len(made) - len(wanted)
    found, trained = [], 0
    for index in range(batches.num_batches(2)):
        batch = batches.get(2, index)
        ends = batch.cu_seqlens.tolist()
        for start, end in itertools.pairwise(ends):
            ids, weights = batch.input_ids[0, start:end].tolist(), batch.weights[0, start:end].tolist()
            labels = batch.labels[0, start:end].tolist()
            assert batch.position_ids[0, start:end].tolist() == list(range(end - start))
            assert weights[-1] == 0  # nothing is predicted across a border
            assert labels == [
                after if weight else IGNORED for after, weight in zip([*ids[1:], None], weights, strict=True)
            ]
            found.append((ids, [0.0, *weights[:-1]]))
        trained += batch.tokens_trained
        assert batch.max_seqlen == max(b - a for a, b in itertools.pairwise(ends))
    assert sorted(found) == wanted
    assert trained == batches.tokens_trained
    assert batches.tokens == sum(len(ids) for ids, _ in wanted)


def test_there_are_no_more_batches_than_an_epoch_has() -> None:
    batches = Batches(documents(), tokens_per_batch=24, seed=3)
    sizes = [batches.get(0, index).input_ids.shape[1] for index in range(batches.num_batches(0))]
    assert sum(sizes) == batches.tokens
    with pytest.raises(IndexError, match="epoch 0 has"):
        batches.get(0, batches.num_batches(0))


def test_another_run_of_the_same_data_gives_the_same_batches() -> None:
    one, two = (Batches(documents(), batch_size=4, seed=3) for _ in range(2))
    assert one.fingerprint == two.fingerprint
    two.get(5, 0)  # the order of asking does not matter
    assert torch.equal(one.get(1, 7).input_ids, two.get(1, 7).input_ids)


def test_changed_data_or_settings_have_another_fingerprint() -> None:
    batches = Batches(documents(), batch_size=4, seed=3)
    changed = [*documents()[:-1], document(1, 2, 3)]
    reweighted = [
        *documents()[:-1],
        Rendered(documents()[-1].input_ids, [0.0] + [0.5] * (len(documents()[-1].input_ids) - 1), []),
    ]
    others = [
        Batches(changed, batch_size=4, seed=3),
        Batches(reweighted, batch_size=4, seed=3),
        Batches(documents()[::-1], batch_size=4, seed=3),
        Batches(documents(), batch_size=5, seed=3),
        Batches(documents(), tokens_per_batch=4, seed=3),
        Batches(documents(), batch_size=4, seed=4),
    ]
    assert len({batches.fingerprint, *(other.fingerprint for other in others)}) == 1 + len(others)


# --- rendering many ---


def test_the_number_of_processes_does_not_matter() -> None:
    world = make_world()
    tokenizer = train_bpe(world.texts(), 600)
    examples = (world.examples() * (2 * CHUNK_EXAMPLES // len(world.examples()) + 1))[: 2 * CHUNK_EXAMPLES + 3]
    assert render_examples(tokenizer, examples, 64, num_workers=2) == render_examples(tokenizer, examples, 64)


def test_examples_that_cannot_be_rendered_are_reported_together() -> None:
    tokenizer = train_bpe(["a"], 300)
    bad = [
        Example(messages=(Message("user", "a"), Message("assistant", "b<|im_end|>")), source="f", line=i)
        for i in range(30)
    ]
    with pytest.raises(DataError) as caught:
        render_examples(tokenizer, [*documents_of_text(), *bad], 64)
    lines = str(caught.value).splitlines()
    assert lines[0].startswith("f:0: ")
    assert len(lines) == 21


def documents_of_text() -> list[Example]:
    return [Example(text="a b c")]
