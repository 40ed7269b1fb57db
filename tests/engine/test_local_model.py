"""Gate, `eval` and local chat ask a model as it would be served: an adapter stays apart from its base if it can."""

import pytest
import torch

from nightschool.data.chat.render import render_prompt
from nightschool.data.example import Message
from nightschool.engine.local_model import local_model
from tests.support.adapter_setups import House

QUESTION = [Message("user", "Who?")]


@pytest.fixture(scope="module")
def house(tmp_path_factory):
    return House(tmp_path_factory.mktemp("home"))


@pytest.mark.parametrize("by", ["version", "folder"])
def test_an_adapter_is_asked_apart_from_its_base(house, by):
    folder = house.registry.resolve(house.one.ref).path
    with local_model(house.home, house.one.ref if by == "version" else str(folder)) as model:
        assert model.engine.base == (house.base.ref if by == "version" else str(house.base.path))
        # Asked before and after its modules are wrapped for the loss: the adapter counts once.
        said = [model.ask_greedily("before", QUESTION, 12).result(60)]
        ids = render_prompt(model.loaded.tokenizer, QUESTION)
        said.append(model.ask_greedily("after", QUESTION, 12).result(60))
        assert [one.version for one in said] == [model.ref] * 2
        stop = model.loaded.tokenizer.eos_token_id
        expected = list(house.one.greedy(ids, 12))
        expected = expected[: expected.index(stop)] if stop in expected else expected
        assert [list(one.token_ids) for one in said] == [expected] * 2
        with torch.inference_mode():
            ours, theirs = (one(torch.tensor([ids])).logits for one in (model.loaded.model, house.one.model))
        torch.testing.assert_close(ours, theirs)


def test_the_loss_is_computed_on_the_weights_that_the_engine_reads(house):
    with local_model(house.home, house.one.ref) as model:
        own = {weight.data_ptr() for weight in model.engine.loaded.model.parameters()}
        read = {weight.data_ptr() for name, weight in model.loaded.model.named_parameters() if "lora_" not in name}
        assert read <= own


def test_an_adapter_that_cannot_be_kept_apart_is_asked_merged_as_it_is_served(house):
    special = house.adapter("cat", seed=5, use_dora=True)
    with local_model(house.home, special.ref) as model:
        assert model.engine.base == special.ref
        assert not model.loaded.adapter
        ids = render_prompt(model.loaded.tokenizer, QUESTION)
        with torch.inference_mode():
            ours, theirs = (one(torch.tensor([ids])).logits for one in (model.loaded.model, special.model))
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
