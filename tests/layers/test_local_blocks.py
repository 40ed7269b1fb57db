"""Local learning: one block is backpropagation bit by bit; more have no gradient between them, and losses of their own."""

import pytest
import torch

from nightschool.config.recipe import Recipe
from nightschool.errors import ModelError
from nightschool.layers.forward import document_loss
from nightschool.layers.local_blocks import LocalBlocks
from nightschool.models.build import PRESETS, build_model
from nightschool.training.distributed.world import ALONE
from tests.support.training_setups import VOCAB_SIZE, deterministic_threads, make_task

FOUR_LAYERS = PRESETS["tiny-qwen3"] | {"num_hidden_layers": 4}


@pytest.fixture(autouse=True)
def _deterministic():
    with deterministic_threads():
        yield


def task_of(blocks, preset=FOUR_LAYERS):
    return make_task(model=build_model(preset, VOCAB_SIZE, 1), local_blocks=blocks)


def gradients_of(task, places=2):
    window = [task.batch(0, place) for place in range(places)]
    units = sum(batch.loss_units for batch in window)
    loss = task.accumulate(window, units)
    return {name: p.grad.clone() for name, p in task.trainable().items() if p.grad is not None}, loss, window, units


def test_one_block_is_backpropagation_bit_by_bit():
    task = task_of(1)
    assert not any("local" in name for name in task.trainable())
    gradients, loss, window, units = gradients_of(task)
    plain = build_model(FOUR_LAYERS, VOCAB_SIZE, 1)
    plain.set_attn_implementation(task.model.config._attn_implementation)
    expected = torch.zeros(())
    for batch in window:
        part = document_loss(plain, task.path, batch)[0] / units
        part.backward()
        expected = expected + part.detach()
    assert torch.equal(loss, expected)
    assert all(torch.equal(gradients[name], p.grad) for name, p in plain.named_parameters())


def test_no_gradient_crosses_a_block_and_the_last_loss_is_that_of_the_whole_model():
    whole, local = task_of(1), task_of(2)
    expected, whole_loss, *_ = gradients_of(whole)
    gradients, loss, *_ = gradients_of(local)
    torch.testing.assert_close(loss, whole_loss, rtol=0, atol=0)
    last = [name for name in expected if name.startswith(("model.layers.2", "model.layers.3", "model.norm"))]
    assert all(torch.equal(gradients[name], expected[name]) for name in last), "the last block learns as ever"
    # The first block learns from its own head alone: as if what follows were not there.
    first = [name for name in expected if name.startswith(("model.layers.0", "model.layers.1"))]
    assert all(not torch.allclose(gradients[name], expected[name], rtol=1e-2) for name in first if "norm" not in name)
    spoiled = task_of(2)
    with torch.no_grad():
        for name, parameter in spoiled.model.named_parameters():
            if name.startswith("model.layers.3"):
                parameter.add_(torch.randn_like(parameter))
    found, other_loss, *_ = gradients_of(spoiled)
    assert other_loss != loss
    assert all(torch.equal(found[name], gradients[name]) for name in first)
    heads = [name for name in gradients if name.startswith("local_heads.")]
    assert len(heads) == 3
    assert all(gradients[name].abs().sum() > 0 for name in heads if "down" not in name)


def test_blocks_learn_and_their_losses_are_figures():
    task = task_of(2)
    first = None
    for _ in range(12):
        gradients_of(task)
        figures = {name: float(figure) for name, figure in task.figures().items()}
        first = first or figures
        task.update(1e-2, 1.0, None, ALONE)
        task.discard_gradients()
    assert figures.keys() == {"token_accuracy", "local_loss_1"}
    assert figures["local_loss_1"] < first["local_loss_1"] - 0.5
    assert any(name.startswith("local_heads.0") for name in task.saved_tensors()), "a run that resumes has them"


def test_blocks_of_less_than_two_layers_are_refused_and_so_are_other_methods():
    with pytest.raises(ModelError, match=r"the 4 layers of this model make at most 2 blocks of 2 or more"):
        task_of(3)
    with pytest.raises(ValueError, match=r"`train\.local_blocks` belongs to `method: full` or `method: pretrain`"):
        Recipe.model_validate({"base": "x", "method": "lora", "data": [{"path": "y"}], "train": {"local_blocks": 2}})
    with pytest.raises(ValueError, match=r"`train\.local_blocks` and `train\.zero_stage` do not go together"):
        Recipe.model_validate({"base": "x", "data": [{"path": "y"}], "train": {"local_blocks": 2, "zero_stage": 2}})


def test_experts_learn_in_blocks_too():
    preset = PRESETS["tiny-qwen3-moe"] | {"num_hidden_layers": 4}
    task = task_of(2, preset)
    gradients, *_ = gradients_of(task)
    assert all(gradients[f"model.layers.{layer}.mlp.experts.down_proj"].abs().sum() > 0 for layer in range(4))
    assert LocalBlocks(task.model, task.path, 1).parameters() == {}
