"""Entries that were read lately are not computed again, and what is kept of them is bounded."""

import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nightschool.layers.memory_reading import Candidate, MemoryReading
from nightschool.models.memory_encoder import EntryEncoder
from nightschool.models.memory_modules import MemoryModules, decoder_layers, shape_for
from nightschool.models.memory_states import EntryStates
from tests.support.engine_setups import lively_model, random_prompt
from tests.support.tokenizers_for_tests import byte_tokenizer


@pytest.fixture(scope="module")
def model():
    return lively_model("tiny-llama")


def reading_of(texts):
    return MemoryReading.of(Candidate(f"m{n}", n, text, 0.5) for n, text in enumerate(texts, start=1))


@pytest.mark.parametrize(("most_bytes", "computed"), [(1 << 20, [3, 1, 0]), (0, [3, 3, 3])])
def test_an_entry_is_computed_once_as_long_as_it_is_kept(model, most_bytes, computed):
    dice, lengths = random.Random(2), []
    texts = [random_prompt(dice, length) for length in (4, 7, 5, 9)]
    modules = MemoryModules(shape_for(model, byte_tokenizer(), fusion_rank=16, gate_rank=4), seed=1)
    encoder, fresh = (EntryEncoder(model, modules, most_bytes=most) for most in (most_bytes, 0))
    hook = decoder_layers(model)[0].register_forward_hook(lambda _, inputs, __: lengths.append(inputs[0].shape[1]))
    try:
        for asked, expected in zip(([0, 1, 2], [1, 3, 2], [3, 2, 0]), computed, strict=True):
            reading, alone = (reading_of([texts[n] for n in asked]) for _ in range(2))
            lengths.clear()
            encoder.encode([reading])
            assert (len(lengths) == 0) == (expected == 0)
            # Each is computed with the anchor before it.
            new = asked if expected == 3 else [3]
            assert sum(lengths) == (sum(len(texts[n]) + 1 for n in new) if expected else 0)
            fresh.encode([alone])
            for name in ("before", "at"):
                torch.testing.assert_close(getattr(reading.encoded, name), getattr(alone.encoded, name))
            assert reading.encoded.token_ids.tolist() == alone.encoded.token_ids.tolist()
    finally:
        hook.remove()


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 9), st.integers(1, 6)), max_size=40))
def test_what_is_kept_is_what_was_asked_for_last_and_no_more_than_its_bytes(asked):
    kept, most = EntryStates(64), 16  # floats of four bytes
    latest = {}
    for number, length in asked:
        text = (number, length)
        if kept.get(text) is None:
            assert text not in latest
            kept.keep(text, torch.full((length,), float(number)))
        latest[text] = latest.pop(text, None)
        while sum(length for _, length in latest) > most:
            latest.pop(next(iter(latest)))
        assert len(kept) == len(latest)
        assert kept.num_bytes == 4 * sum(length for _, length in latest) <= 64
        assert all(torch.equal(kept.get(one), torch.full((one[1],), float(one[0]))) for one in latest)


def test_what_is_larger_than_all_that_may_be_kept_is_not():
    kept = EntryStates(8)
    kept.keep((1,), torch.zeros(3))
    assert (len(kept), kept.num_bytes, kept.get((1,))) == (0, 0, None)
