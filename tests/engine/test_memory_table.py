"""Requests that read entries of a memory, in one batch with others that read other entries, or none."""

import gc
import random
from weakref import WeakSet

import pytest
import torch

from nightschool.engine.memory_lookup import forget_entries
from nightschool.engine.memory_table import MemoryOnBase
from nightschool.engine.request import GenerationRequest, SamplingParams
from nightschool.errors import ModelError
from nightschool.layers.memory_reading import Candidate, MemoryReading
from nightschool.models.memory_model import MemoryModel, generate_greedily
from nightschool.models.memory_modules import MemoryModules, shape_for
from nightschool.models.memory_states import EntryStates
from tests.support.engine_setups import BOUND, greedy, lively_model, loaded_model, random_prompt, request, running
from tests.support.tokenizers_for_tests import byte_tokenizer

REF = "reader@1"


@pytest.fixture(scope="module")
def model():
    return lively_model("tiny-llama")


def modules_for(model, *, seed=3):
    """Modules that have learned something: what they add is not zero, and the pointer sometimes copies."""
    made = MemoryModules(shape_for(model, byte_tokenizer(), fusion_rank=16, gate_rank=4), seed=seed)
    with torch.no_grad():
        for layer in made.reader.fusion.layers:
            layer.out += torch.randn_like(layer.out) * 0.5
        made.reader.pointer.sentinel_bias.fill_(6.0)
    return made


def reading_of(dice, entries=3):
    return MemoryReading.of(
        Candidate(f"m{number}", number, random_prompt(dice, dice.randint(2, 9)), dice.random())
        for number in range(1, entries + 1)
    )


def asked(prompt, reading, *, tokens=8, binding=None, **more):
    params = SamplingParams(tokens, temperature=0, ignore_eos=True)
    return GenerationRequest("r", binding or BOUND, list(prompt), params, reading=reading, **more)


def test_each_request_of_a_batch_reads_its_own_entries_and_the_others_are_the_base(model):
    dice, modules = random.Random(5), modules_for(model)
    prompts = [random_prompt(dice, length) for length in (5, 40, 17, 23)]
    readings = [reading_of(dice), reading_of(dice, 5), reading_of(dice, 1), None]
    expected = [
        generate_greedily(MemoryModel(model, modules), p, r, 8)[0] for p, r in zip(prompts, readings, strict=True)
    ]
    with running(loaded_model(model=model), num_rows=5, tokens_per_step=16) as engine:
        binding = engine.open(MemoryOnBase(REF, byte_tokenizer(), modules))
        assert binding.label == REF
        handles = [engine.submit(asked(p, r, binding=binding)) for p, r in zip(prompts, readings, strict=True)]
        plain = engine.submit(request(prompts[0], 8))
        answers = [list(handle.result(60).token_ids) for handle in handles]
        assert plain.result(60).token_ids == greedy(model, prompts[0], 8)
        engine.retire(binding)
    assert answers == expected
    assert answers[0] != list(greedy(model, prompts[0], 8))
    assert tuple(answers[3]) == greedy(model, prompts[3], 8)


def test_who_joins_and_leaves_a_batch_changes_nobody_elses_entries(model):
    dice, modules, lengths = random.Random(9), modules_for(model), (2, 9, 5, 7)
    prompts = [random_prompt(dice, length) for length in (5, 11, 30, 8)]
    readings = [reading_of(dice, entries) for entries in (6, 2, 4, 1)]
    expected = [
        generate_greedily(MemoryModel(model, modules), *one)[0] for one in zip(prompts, readings, lengths, strict=True)
    ]
    # Two rows for four requests: each that ends makes room for the next, beside one that goes on.
    with running(loaded_model(model=model), num_rows=2, tokens_per_step=16) as engine:
        binding = engine.open(MemoryOnBase(REF, byte_tokenizer(), modules))
        handles = [
            engine.submit(asked(prompt, reading, tokens=count, binding=binding))
            for prompt, reading, count in zip(prompts, readings, lengths, strict=True)
        ]
        assert [list(handle.result(60).token_ids) for handle in handles] == expected


def test_two_versions_with_memories_on_one_base_keep_apart(model):
    dice = random.Random(6)
    prompt, reading, made = random_prompt(dice, 20), reading_of(dice), [modules_for(model, seed=s) for s in (3, 4)]
    expected = [generate_greedily(MemoryModel(model, modules), prompt, reading, 8)[0] for modules in made]
    with running(loaded_model(model=model), num_rows=4) as engine:
        bindings = [engine.open(MemoryOnBase(f"reader@{n}", byte_tokenizer(), m)) for n, m in enumerate(made)]
        handles = [engine.submit(asked(prompt, reading, binding=binding)) for binding in bindings]
        assert [list(handle.result(60).token_ids) for handle in handles] == expected
        gone = engine.retire(bindings[0])
        assert gone.modules is made[0]
        still = engine.submit(asked(prompt, reading, binding=bindings[1])).result(60)
        assert list(still.token_ids) == expected[1]
    assert expected[0] != expected[1]


def test_chunks_say_which_entry_a_token_came_from_if_that_is_wanted(model):
    dice, modules = random.Random(7), modules_for(model)
    prompt, reading = random_prompt(dice, 12), reading_of(dice)
    expected = generate_greedily(MemoryModel(model, modules), prompt, reading, 6)[1]
    with running(loaded_model(model=model)) as engine:
        binding = engine.open(MemoryOnBase(REF, byte_tokenizer(), modules))
        told = engine.submit(asked(prompt, reading, tokens=6, binding=binding, wants_sources=True))
        untold = engine.submit(asked(prompt, reading, tokens=6, binding=binding))
        told.result(60), untold.result(60)
        sources = [chunk.source for chunk in told.chunks() if chunk.token_ids]
        assert [chunk.source for chunk in untold.chunks() if chunk.token_ids] == [None] * 6
    assert [source.kind for source in sources] == [source.kind for source in expected]
    for source, other in zip(sources, expected, strict=True):
        assert [entry.entry for entry in source.entries] == [entry.entry for entry in other.entries]
        assert source.copied == pytest.approx(other.copied, abs=1e-3)
        assert sum(entry.weight for entry in source.entries) <= 1 + 1e-5


def test_prompts_share_their_prefix_whatever_is_read_and_what_an_entry_said_is_in_none(model):
    dice, modules = random.Random(8), modules_for(model)
    prompt, first, second = random_prompt(dice, 70), reading_of(dice), reading_of(dice)
    expected = [generate_greedily(MemoryModel(model, modules), prompt, r, 6)[0] for r in (first, second, None)]
    with running(loaded_model(model=model)) as engine:
        binding = engine.open(MemoryOnBase(REF, byte_tokenizer(), modules))
        for reading, tokens in zip((first, second, None), expected, strict=True):
            answer = engine.submit(asked(prompt, reading, tokens=6, binding=binding)).result(60)
            assert list(answer.token_ids) == tokens
        assert answer.usage.cached_tokens == 64
        longer = [*prompt, *expected[0], 5, 6]
        after = generate_greedily(MemoryModel(model, modules), longer, None, 6)[0]
        assert list(engine.submit(asked(longer, None, tokens=6, binding=binding)).result(60).token_ids) == after


def test_modules_of_another_base_are_refused(model):
    other = lively_model("tiny-llama", hidden_size=model.config.hidden_size * 2)
    with running(loaded_model(model=model)) as engine, pytest.raises(ModelError, match="width"):
        engine.open(MemoryOnBase(REF, byte_tokenizer(), modules_for(other)))


def test_after_a_purge_nothing_of_entries_is_kept_and_answers_stay_what_they_were(model):
    dice, modules = random.Random(9), modules_for(model)
    prompt, candidates = random_prompt(dice, 70), [Candidate(f"m{n}", n, random_prompt(dice, 6), 0.9) for n in (1, 2)]
    kept = WeakSet(one for one in gc.get_objects() if type(one) is EntryStates)
    with running(loaded_model(model=model), num_rows=2, tokens_per_step=128) as engine:
        binding = engine.open(MemoryOnBase(REF, byte_tokenizer(), modules))

        def answer():
            done = engine.submit(asked(prompt, MemoryReading.of(candidates), binding=binding)).result(60)
            return list(done.token_ids), done.usage.cached_tokens

        first, cached = answer()
        assert cached == 0
        assert answer() == (first, 64)
        [states] = [one for one in gc.get_objects() if type(one) is EntryStates and one not in kept]
        assert len(states) == 2
        forget_entries()
        assert (len(states), states.num_bytes) == (0, 0)
        assert answer() == (first, 0)
        engine.retire(binding)
