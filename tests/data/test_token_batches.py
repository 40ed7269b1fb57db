"""Micro-batches of shards: each token is predicted once, documents end, ranks and batch sizes only cut the same order."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nightschool.data.shards.shard_sources import open_shards
from nightschool.data.shards.token_batches import Portion, TokenBatches
from nightschool.errors import DataError, NothingToTrain
from tests.support.shard_setups import tokenizer, write_shards

T = 16


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shards")
    write_shards(folder)
    return open_shards("shards", root=folder, cache=folder / "cache")


def batches_of(source, **changes):
    plain = {"seq_len": T, "seed": 1, "group_shards": 2, "vocab_size": 300}
    return TokenBatches(source.shards, **(plain | changes))


def all_sequences(batches, size=3, portion=None):
    starts = range(0, batches.num_sequences, size)
    return torch.cat([batches.get(0, start, size, portion).input_ids for start in starts], dim=1)


def test_labels_are_the_next_tokens_and_none_is_shifted_twice(source):
    batches = batches_of(source, loss_across_documents=True)
    batch = batches.get(0, 0, 4)
    ids, labels = batch.input_ids.view(4, T), batch.labels.view(4, T)
    assert torch.equal(ids[:, 1:], labels[:, :-1])
    stream = {
        tuple(np.asarray(source.shards.tokens(n)[at : at + T + 1]).tolist())
        for n in range(3)
        for at in range(0, 240, T)
    }
    found = [(*row.tolist(), label) for row, label in zip(ids, labels[:, -1].tolist(), strict=True)]
    assert sum(one in stream for one in found) >= 1
    assert batch.tokens_trained == 4 * T


def test_every_token_of_a_shard_but_its_first_and_its_rest_is_predicted_once(source):
    batches = batches_of(source, loss_across_documents=True)
    predicted = torch.cat([batches.get(0, place, 1).labels[0] for place in range(batches.num_sequences)])
    expected = np.concatenate(
        [
            np.asarray(tokens)[1 : (len(tokens) - 1) // T * T + 1]
            for tokens in (source.shards.tokens(n) for n in range(len(source.shards.index.shards)))
        ]
    )
    assert sorted(predicted.tolist()) == sorted(expected.tolist())
    assert batches.tokens_left_over + len(expected) == source.shards.index.tokens


def test_a_document_sees_no_other_and_its_first_token_carries_no_loss(source):
    eos = source.shards.index.eos_token_id
    batches = batches_of(source)
    found = 0
    for place in range(batches.num_sequences):
        batch = batches.get(0, place, 1)
        ids, weights = batch.input_ids[0], batch.weights[0]
        ends = (ids == eos).nonzero().flatten().tolist()
        inner = [end + 1 for end in ends if end + 1 < T]
        assert batch.cu_seqlens.tolist() == [0, *inner, T]
        assert all(batch.position_ids[0, begin] == 0 for begin in [0, *inner])
        assert all(weights[end] == 0 and batch.labels[0, end] == -100 for end in ends)
        assert batch.tokens_trained == T - len(ends) == int(weights.sum())
        found += len(ends)
    assert found > 0


@given(st.sampled_from([1, 2, 3, 5]), st.integers(1, 4))
@settings(max_examples=12, deadline=None)
def test_ranks_and_sizes_cut_the_same_order(source, size, world_size):
    batches = batches_of(source, loss_across_documents=True)
    order = all_sequences(batches)
    assert torch.equal(all_sequences(batches, size), order)
    together = []
    for start in range(0, batches.num_sequences, size * world_size):
        parts = [batches.get(0, start, size * world_size, Portion(rank, world_size)) for rank in range(world_size)]
        together += [part.input_ids for part in parts if part.tokens_trained]
    assert torch.equal(torch.cat(together, dim=1), order)


def test_a_process_for_which_nothing_is_left_takes_the_step_without_loss(source):
    batches = batches_of(source)
    last = batches.num_sequences - 1
    idle = batches.get(0, last, 4, Portion(0, 4))
    assert (idle.tokens_trained, idle.tokens_consumed, float(idle.weights.sum())) == (0, 0, 0)
    busy = [batches.get(0, last, 4, Portion(rank, 4)).tokens_trained for rank in range(4)]
    assert sum(one > 0 for one in busy) == 1


def test_what_is_held_out_is_never_trained(source):
    batches = batches_of(source, held_out_share=0.2, held_out_tokens=10_000, loss_across_documents=True)
    whole = batches_of(source, loss_across_documents=True)
    assert 0 < batches.num_held_out < whole.num_sequences
    assert batches.num_held_out + batches.num_sequences == whole.num_sequences
    rows = lambda batch: {tuple(row) for row in batch.view(-1, T).tolist()}  # noqa: E731
    trained = rows(all_sequences(batches)[0])
    held = rows(
        torch.cat([batches.held_out(place, 4).input_ids for place in range(0, batches.num_held_out, 4)], dim=1)[0]
    )
    assert not trained & held
    assert trained | held == rows(all_sequences(whole)[0])
    few = batches_of(source, held_out_share=0.2, held_out_tokens=2 * T)
    assert 1 <= few.num_held_out <= 4


def test_many_shards_hold_out_as_much_as_few(tmp_path):
    write_shards(tmp_path, count=12, words=200, shard_tokens=64)
    source = open_shards("shards", root=tmp_path, cache=tmp_path / "cache")
    assert len(source.shards.index.shards) > 40
    batches = batches_of(source, held_out_share=0.5, held_out_tokens=20 * T)
    assert 15 <= batches.num_held_out <= 20
    half = len(source.shards.index.shards) // 2
    assert 0 < sum(shard < half for shard, _ in batches._held_places) < batches.num_held_out


def test_what_decides_the_order_is_in_the_fingerprint(source):
    plain = batches_of(source).fingerprint
    assert batches_of(source).fingerprint == plain
    for changes in (
        {"seed": 2},
        {"seq_len": 8},
        {"group_shards": 1},
        {"loss_across_documents": True},
        {"held_out_share": 0.3, "held_out_tokens": 999},
    ):
        assert batches_of(source, **changes).fingerprint != plain


def test_bad_input_is_refused_by_name(source):
    with pytest.raises(NothingToTrain, match=r"train\.max_seq_len=5000"):
        batches_of(source, seq_len=5000)
    with pytest.raises(DataError, match=r"tokens_0000.*vocabulary has the ids 0 to 9"):
        batches_of(source, vocab_size=10).get(0, 0, 1)
    with pytest.raises(IndexError):
        batches_of(source).get(0, 10**6, 1)


def test_a_place_is_told_by_shard_and_token(source):
    batches = batches_of(source, loss_across_documents=True)
    name, _, token = batches.where(0, 5).partition(", token ")
    number = [shard.file for shard in source.shards.index.shards].index(name)
    begin = np.asarray(source.shards.tokens(number)[int(token) : int(token) + T]).tolist()
    assert batches.get(0, 5, 1).input_ids[0].tolist() == begin
    assert tokenizer().decode(begin)
