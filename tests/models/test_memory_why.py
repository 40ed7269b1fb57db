"""What an answer is ascribed to is what it would not have been without."""

import random

import pytest
import torch

from nightschool.layers.memory_reading import Candidate, MemoryReading
from nightschool.models.memory_model import MemoryModel, generate_greedily
from nightschool.models.memory_modules import MemoryModules, shape_for
from nightschool.models.memory_why import explain
from tests.support.engine_setups import lively_model, random_prompt
from tests.support.tokenizers_for_tests import byte_tokenizer


@pytest.fixture(scope="module")
def model():
    base = lively_model("tiny-llama")
    modules = MemoryModules(shape_for(base, byte_tokenizer(), fusion_rank=16, gate_rank=4), seed=3)
    with torch.no_grad():
        for layer in modules.reader.fusion.layers:
            layer.out += torch.randn_like(layer.out) * 0.5
        modules.reader.pointer.sentinel_bias.fill_(6.0)
    return MemoryModel(base, modules)


def reading_of(dice, count=3):
    return MemoryReading.of(
        Candidate(f"m{number}", number, random_prompt(dice, 6), dice.random()) for number in range(1, count + 1)
    )


def test_probabilities_are_those_of_the_answer_with_without_and_with_the_memory_off(model):
    dice = random.Random(1)
    prompt, reading = random_prompt(dice, 20), reading_of(dice)
    answer, sources = generate_greedily(model, prompt, reading, 5)
    found = explain(model, prompt, answer, reading)
    assert [one.token_id for one in found] == answer
    assert [one.source.kind for one in found] == [source.kind for source in sources]
    named = {entry.entry for one in found for entry in one.source.entries}
    assert named
    assert all(set(one.without) == named for one in found)
    ids = torch.tensor([[*prompt, *answer]])
    for place, one in enumerate(found, start=len(prompt) - 1):
        with torch.no_grad():
            base = model(input_ids=ids[:, : place + 1]).logits[0, -1].softmax(-1)[one.token_id]
        assert one.without_memory == pytest.approx(float(base), abs=1e-4)
        for entry, probability in one.without.items():
            with torch.no_grad(), model.reading([(slice(len(prompt) - 1, place + 1), reading.without(entry))]):
                there = model(input_ids=ids[:, : place + 1]).logits[0, -1].float().softmax(-1)[one.token_id]
            assert probability == pytest.approx(float(there), abs=1e-4)


@pytest.mark.parametrize("reading", [None, MemoryReading.of([])])
def test_where_nothing_was_read_everything_comes_from_the_weights(model, reading):
    prompt = random_prompt(random.Random(2), 9)
    answer, _ = generate_greedily(model, prompt, None, 4)
    found = explain(model, prompt, answer, reading)
    assert {one.source.kind for one in found} == {"weights"}
    assert all(one.probability == one.without_memory and not one.without for one in found)
    assert explain(model, prompt, [], reading) == []
