"""The prefix cache: longest known beginnings, whole blocks, never another tenant's, never more bytes than allowed."""

import dataclasses

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings

from nightschool.engine.prefix import BLOCK, PrefixCache
from tests.support.engine_setups import BOUND

BLOCK_BYTES = BLOCK * 4


def reader(token_ids):
    """Pieces that show which tokens they stand for."""
    return lambda start, end: [torch.tensor(token_ids[:end], dtype=torch.float32)[start:end].clone()]


def held(cache, binding, token_ids):
    """How many tokens are known; their pieces must be the right ones."""
    blocks = cache.match(binding, token_ids)
    found = torch.cat([pieces[0] for pieces in blocks]).tolist() if blocks else []
    assert found == [float(token) for token in token_ids[: len(found)]]
    return len(found)


def keep(cache, binding, token_ids):
    cache.insert(binding, token_ids, reader(token_ids))


def test_a_shared_beginning_is_known_up_to_whole_blocks():
    cache = PrefixCache(1 << 20)
    keep(cache, BOUND, list(range(100)))
    assert held(cache, BOUND, list(range(100))) == 96
    assert held(cache, BOUND, [*range(70), 0, 0, 0]) == 64
    assert held(cache, BOUND, list(range(20))) == 0
    assert held(cache, BOUND, [5, *range(1, 100)]) == 0


def test_the_last_token_of_a_prompt_is_always_left_to_be_computed():
    cache = PrefixCache(1 << 20)
    keep(cache, BOUND, list(range(64)))
    assert held(cache, BOUND, list(range(64))) == 32
    assert held(cache, BOUND, list(range(65))) == 64


@pytest.mark.parametrize(
    "difference", [{"base": "x"}, {"adapter": "x"}, {"memory_revision": "x"}, {"tenant": "x"}, {"key": "x"}]
)
def test_bindings_that_differ_in_anything_share_nothing(difference):
    cache, other = PrefixCache(1 << 20), dataclasses.replace(BOUND, **difference)
    keep(cache, BOUND, list(range(64)))
    assert held(cache, other, list(range(65))) == 0
    assert held(cache, BOUND, list(range(65))) == 64


def test_what_was_read_with_an_adapter_goes_with_it_whoever_asked():
    cache = PrefixCache(1 << 20)
    tenants = [dataclasses.replace(BOUND, adapter="bot@1", tenant=tenant) for tenant in ("a", "b")]
    stays = [BOUND, dataclasses.replace(BOUND, adapter="bot@2", tenant="a")]
    for binding in (*tenants, *stays):
        keep(cache, binding, list(range(64)))
        keep(cache, binding, [*range(32), *range(100, 132)])
    cache.drop("bot@1")
    assert [held(cache, binding, list(range(65))) for binding in (*tenants, *stays)] == [0, 0, 64, 64]
    assert (cache.num_roots, cache.num_blocks, cache.num_bytes) == (2, 6, 6 * BLOCK_BYTES)
    cache.drop("bot@1")
    assert cache.num_blocks == 6


def test_a_binding_whose_blocks_are_gone_leaves_nothing_behind():
    cache = PrefixCache(2 * BLOCK_BYTES)
    for number in range(50):
        keep(cache, BOUND.of(f"tenant {number}"), list(range(64)))
    keep(PrefixCache(10), BOUND, list(range(64)))
    assert (cache.num_roots, cache.num_blocks) == (1, 2)


def test_what_is_known_is_not_read_again():
    cache, reads = PrefixCache(1 << 20), []
    tokens = list(range(96))

    def read(start, end):
        reads.append((start, end))
        return reader(tokens)(start, end)

    cache.insert(BOUND, tokens[:64], read)
    cache.insert(BOUND, tokens, read)
    assert reads == [(0, 32), (32, 64), (64, 96)]
    assert (cache.num_blocks, cache.num_bytes) == (3, 3 * BLOCK_BYTES)


def test_the_least_recently_used_end_goes_first():
    cache = PrefixCache(4 * BLOCK_BYTES)
    first, second = list(range(64)), list(range(1000, 1064))
    keep(cache, BOUND, first)
    keep(cache, BOUND, second)
    assert held(cache, BOUND, [*first, 0]) == 64
    keep(cache, BOUND, list(range(2000, 2032)))
    assert held(cache, BOUND, [*first, 0]) == 64
    assert held(cache, BOUND, [*second, 0]) == 32
    assert cache.num_bytes == 4 * BLOCK_BYTES


def test_what_is_longer_than_the_cache_is_kept_as_far_as_it_goes():
    cache = PrefixCache(2 * BLOCK_BYTES)
    keep(cache, BOUND, list(range(32 * 5)))
    assert held(cache, BOUND, list(range(32 * 5))) == 64
    nothing = PrefixCache(10)
    keep(nothing, BOUND, list(range(64)))
    assert (nothing.num_blocks, nothing.num_bytes) == (0, 0)


@given(
    st.lists(st.tuples(st.sampled_from("ab"), st.lists(st.integers(0, 2), min_size=1, max_size=5), st.booleans())),
    st.integers(0, 6),
)
@settings(max_examples=100, deadline=None)
def test_anything_that_is_found_is_right_and_within_the_limit(events, limit_blocks):
    cache = PrefixCache(limit_blocks * BLOCK_BYTES)
    inserted = set()
    for tenant, kinds, is_insert in events:
        tokens = [kind * 1000 + i for kind in kinds for i in range(BLOCK)]
        if is_insert:
            keep(cache, BOUND.of(tenant), tokens)
            inserted |= {(tenant, tuple(tokens[: (n + 1) * BLOCK])) for n in range(len(kinds))}
        found = held(cache, BOUND.of(tenant), [*tokens, 0])
        assert found == 0 or (tenant, tuple(tokens[:found])) in inserted
        assert cache.num_bytes == cache.num_blocks * BLOCK_BYTES <= limit_blocks * BLOCK_BYTES
