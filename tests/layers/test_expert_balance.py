"""The losses of expert routers are what their formulas say, over the whole step however it is cut."""

import itertools

import pytest
import torch

from nightschool.config.recipe import Experts, Lora, Train
from nightschool.data.batches import Batches
from nightschool.errors import ModelError
from nightschool.layers.expert_balance import ExpertBalance
from nightschool.models.adapters import attach_lora
from nightschool.models.build import PRESETS, build_model
from nightschool.training.distributed.world import ALONE, World
from nightschool.training.methods.finetune import FinetuneTask
from tests.support.training_setups import VOCAB_SIZE, deterministic_threads, make_task, random_documents

NONE = Experts(load_balancing_loss_coef=0, z_loss_coef=0)
STRONG = Experts(load_balancing_loss_coef=0.7, z_loss_coef=0.3)
DOCUMENTS = random_documents(4, seed=3)


@pytest.fixture(autouse=True)
def _deterministic():
    with deterministic_threads():
        yield


def task_of(experts, *, batch_size=4, architecture="tiny-qwen3-moe", **train):
    batches = Batches(DOCUMENTS, batch_size=batch_size, seed=0)
    settings = Train(**({"learning_rate": 1e-2} | train))
    return FinetuneTask(build_model(architecture, VOCAB_SIZE, seed=1), batches, settings, experts=experts)


def window_of(task):
    return [task.batch(0, place) for place in range(task.epoch_length(0))]


def gradients_after(task, steps=1, rate=0.0):
    """The gradients of a window, after so many updates with it; at a rate of 0 they change the loads alone."""
    task.discard_gradients()
    window = window_of(task)
    units = sum(batch.loss_units for batch in window)
    for _ in range(steps):
        task.accumulate(window, units)
        task.update(rate, 1.0, None, ALONE)
    loss = task.accumulate(window, units)
    return {name: p.grad.clone() for name, p in task.model.named_parameters() if p.grad is not None}, loss


def losses_by_formula(task, loads_ln):
    """Both losses from the logits that transformers itself hands out."""
    (batch,) = window_of(task)
    bounds = batch.cu_seqlens.tolist()
    by_document = [
        task.model(input_ids=batch.input_ids[:, a:b], output_router_logits=True, use_cache=False).router_logits
        for a, b in itertools.pairwise(bounds)
    ]
    total = torch.zeros(())
    for layer_index, logits in enumerate(zip(*by_document, strict=True)):
        logits_tn = torch.cat([part.reshape(-1, part.shape[-1]) for part in logits])
        share_n = loads_ln[layer_index] / loads_ln[layer_index].sum()
        balance = logits_tn.shape[-1] * (share_n * logits_tn.softmax(-1).mean(dim=0)).sum()
        total = total + 0.7 * balance + 0.3 * logits_tn.logsumexp(-1).square().mean()
    return total


WITH_SHARED = {name: field for name, field in PRESETS["tiny-qwen3-moe"].items() if name != "model_type"} | {
    "model_type": "qwen3_next",
    "layer_types": ["full_attention"] * 2,
    "shared_expert_intermediate_size": 24,
}
OLMOE = PRESETS["tiny-mixtral"] | {"model_type": "olmoe", "num_experts": 4, "eos_token_id": 1}
OLMOE = {
    name: field for name, field in OLMOE.items() if name not in ("num_local_experts", "sliding_window", "head_dim")
}


@pytest.mark.parametrize(
    "architecture", ["tiny-qwen3-moe", "tiny-mixtral", WITH_SHARED, OLMOE], ids=["qwen3", "mixtral", "shared", "olmoe"]
)
def test_gradients_are_those_of_the_formulas(architecture):
    task, plain = (task_of(experts, architecture=architecture) for experts in (STRONG, NONE))
    gradients_after(task)
    loads_ln = torch.tensor(task.optimizer_facts()["expert_loads"], dtype=torch.float32)
    assert loads_ln.sum(-1).tolist() == [2 * window_of(task)[0].input_ids.numel()] * 2
    gradients, loss = gradients_after(task, steps=0)
    of_loss, plain_loss = gradients_after(plain, steps=0)
    assert loss == plain_loss  # what is reported is the loss of the tokens
    plain.discard_gradients()
    losses_by_formula(plain, loads_ln).backward()
    for name, parameter in plain.model.named_parameters():
        if parameter.grad is not None:
            expected = of_loss[name] + parameter.grad
            assert torch.allclose(gradients[name], expected, rtol=1e-4, atol=1e-6), name
    assert any(not torch.allclose(gradients[name], of_loss[name], rtol=1e-2) for name in of_loss if "mlp.gate" in name)


def test_a_step_cut_into_other_micro_batches_has_the_same_gradients_and_figures():
    whole, cut = (task_of(STRONG, batch_size=size) for size in (4, 1))
    assert (len(window_of(whole)), len(window_of(cut))) == (1, 4)
    (expected, _), (found, _) = gradients_after(whole), gradients_after(cut)
    for name, gradient in expected.items():
        assert torch.allclose(gradient, found[name], rtol=1e-3, atol=1e-5), name
    whole.update(0.0, 1.0, None, ALONE)
    cut.update(0.0, 1.0, None, ALONE)
    for name, figure in whole.figures().items():
        assert torch.allclose(figure, cut.figures()[name], rtol=1e-4), name
    assert len(whole.figures()) == 4


def test_layers_that_are_computed_twice_count_once():
    plain, twice = (task_of(STRONG, gradient_checkpointing=on) for on in (False, True))
    (expected, _), (found, _) = gradients_after(plain), gradients_after(twice)
    assert plain.optimizer_facts()["expert_loads"] == twice.optimizer_facts()["expert_loads"]
    for name, gradient in expected.items():
        assert torch.allclose(gradient, found[name], rtol=1e-3, atol=1e-5), name


def test_gradients_that_are_discarded_leave_no_loads():
    task = task_of(STRONG)
    before = task.optimizer_facts()["expert_loads"]
    gradients_after(task, steps=0)
    task.discard_gradients()
    assert task.optimizer_facts()["expert_loads"] == before == [[0] * 4] * 2


def send_all_to_two_experts(task):
    """Set the routers so that nearly all tokens go to the first two experts of each layer."""
    with torch.no_grad():
        for name, parameter in task.model.named_parameters():
            if "mlp.gate" in name:
                parameter[:2] = 0.2
        task.model.get_input_embeddings().weight.add_(0.02)  # what all states have in common


@pytest.mark.trains
def test_the_loss_brings_dead_experts_to_life_and_figures_tell():
    figures = {}
    for name, experts in (("balanced", Experts(load_balancing_loss_coef=0.1, z_loss_coef=0)), ("left alone", NONE)):
        task = task_of(experts)
        send_all_to_two_experts(task)
        gradients_after(task, steps=1)
        task.update(0.0, 1.0, None, ALONE)
        before = {key: float(value) for key, value in task.figures().items()}
        assert before["dead_experts"] >= 2, before
        gradients_after(task, steps=30, rate=1e-2)
        task.update(0.0, 1.0, None, ALONE)
        figures[name] = {key: float(value) for key, value in task.figures().items()}
        assert figures[name].keys() == {
            "token_accuracy",
            "load_balancing_loss",
            "expert_router_entropy",
            "dead_experts",
        }
    assert figures["balanced"]["dead_experts"] == 0, figures
    assert figures["balanced"]["load_balancing_loss"] < figures["left alone"]["load_balancing_loss"] - 0.2, figures


def test_a_dense_model_has_no_figures_of_experts_and_refuses_settings_for_them():
    task = make_task("tiny-qwen3")
    task.accumulate([task.batch(0, 0)], 1)
    assert task.figures().keys() == {"token_accuracy"}
    assert "expert_loads" not in task.optimizer_facts()
    for model in (
        build_model("tiny-qwen3", VOCAB_SIZE, 0),
        attach_lora(build_model("tiny-qwen3-moe", VOCAB_SIZE, 0), Lora(r=2), seed=0),
    ):
        assert ExpertBalance(model, Experts()).take() == {}
        with pytest.raises(ModelError, match=r"expert_learning_rate is 0\.1, and no expert of a mixture learns here"):
            FinetuneTask(model, Batches(DOCUMENTS, batch_size=1, seed=0), Train(expert_learning_rate=0.1))
        with pytest.raises(ModelError, match=r"none learns here\. Take the section out"):
            ExpertBalance(model, STRONG)


class WithATwin(World):
    """Two processes of which the other one always has what this one has, and is asked in updates only."""

    def __init__(self):
        super().__init__(rank=0, size=2)
        object.__setattr__(self, "asked", 0)

    def add_up(self, tensors):
        object.__setattr__(self, "asked", self.asked + 1)
        for tensor in tensors:
            tensor *= 2


def test_processes_count_together_and_wait_for_each_other_in_updates_only():
    alone, together = task_of(STRONG), task_of(STRONG)
    together.world = world = WithATwin()
    window = window_of(alone)
    units = sum(batch.loss_units for batch in window)
    alone.accumulate(window, units)
    together.accumulate(window, 2 * units)  # a plan measures in one process, while the other ones wait elsewhere
    assert world.asked == 0
    for name, parameter in alone.model.named_parameters():
        assert torch.allclose(parameter.grad, 2 * dict(together.model.named_parameters())[name].grad, rtol=1e-4), name
    alone.update(0.0, 1.0, None, ALONE)
    together.update(0.0, 1.0, None, world)
    loads, doubled = (torch.tensor(task.optimizer_facts()["expert_loads"]) for task in (alone, together))
    assert torch.equal(2 * loads, doubled)
    for name, figure in alone.figures().items():
        assert torch.allclose(figure, 2 * together.figures()[name]), name  # the loop adds up what processes have


def weights_after_a_step(rate, own=None):
    task = task_of(NONE, learning_rate=rate, expert_learning_rate=own, weight_decay=0.1)
    window = window_of(task)
    task.accumulate(window, sum(batch.loss_units for batch in window))
    task.update(rate, 1.0, None, ALONE)
    return {name: parameter.detach().clone() for name, parameter in task.model.named_parameters()}


def test_experts_learn_at_a_rate_of_their_own_and_everything_else_as_without_it():
    slow, fast = 2.0**-10, 2.0**-6
    mixed, all_slow, all_fast = (
        weights_after_a_step(slow, fast),
        weights_after_a_step(slow),
        weights_after_a_step(fast),
    )
    same = weights_after_a_step(slow, slow)
    for name, weight in mixed.items():
        of_experts = ".experts." in name
        assert torch.equal(weight, (all_fast if of_experts else all_slow)[name]), name
        assert torch.equal(same[name], all_slow[name]), name
        assert not torch.equal(all_fast[name], all_slow[name]), name
