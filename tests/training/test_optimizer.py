import math

import pytest
import torch
from torch import nn

from nightschool.errors import StateMismatch
from nightschool.training.optimizer import AdamW, AdamWSettings, Schedule, embedding_names
from tests.support.training_setups import NUM_THREADS, differing, make_task

pytestmark = pytest.mark.trains


@pytest.fixture(autouse=True)
def _one_thread():
    torch.set_num_threads(NUM_THREADS)


def test_the_warm_up_rises_linearly_to_the_peak():
    schedule = Schedule(1.0, 100, warmup_steps=4)
    assert [schedule.rate(step) for step in range(5)] == [0.25, 0.5, 0.75, 1.0, 1.0]


@pytest.mark.parametrize(("kind", "middle"), [("cosine", 0.55), ("linear", 0.55), ("constant", 1.0)])
def test_the_rate_falls_to_the_floor(kind, middle):
    schedule = Schedule(1.0, 100, kind, warmup_steps=0, min_ratio=0.1)
    assert schedule.rate(0) == 1.0
    assert schedule.rate(50) == pytest.approx(middle)
    assert schedule.rate(100) == pytest.approx(1.0 if kind == "constant" else 0.1)
    assert schedule.rate(1000) == schedule.rate(100)


def test_cosine_is_slower_than_linear_at_first_and_the_rate_never_rises_after_warm_up():
    cosine, linear = Schedule(1.0, 50, "cosine"), Schedule(1.0, 50, "linear")
    assert cosine.rate(5) > linear.rate(5)
    rates = [cosine.rate(step) for step in range(50)]
    assert rates == sorted(rates, reverse=True)


def small_model(dtype=torch.float32):
    torch.manual_seed(0)
    model = nn.ModuleDict({"embed": nn.Embedding(5, 4), "linear": nn.Linear(4, 3), "norm": nn.LayerNorm(3)})
    return model.to(dtype)


def optimizer_of(model, **settings):
    return AdamW(dict(model.named_parameters()), AdamWSettings(**settings), embedding_names(model))


def step(optimizer, rate, gradients):
    for parameter, gradient in zip(optimizer._parameters.values(), gradients, strict=True):
        parameter.grad = gradient.to(parameter.dtype)
    optimizer.step(optimizer.gradients_ready(), rate, 0.0, None)


def test_only_matrices_that_are_no_embedding_decay():
    model = small_model()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = optimizer_of(model, weight_decay=0.5)
    step(optimizer, 0.1, [torch.zeros_like(p) for p in model.parameters()])
    changed = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert changed == {"linear.weight"}
    torch.testing.assert_close(model["linear"].weight, before["linear.weight"] * (1 - 0.1 * 0.5))


def test_a_head_that_is_tied_to_the_embedding_does_not_decay():
    task = make_task("tiny-qwen3")
    assert embedding_names(task.model) == {"model.embed_tokens.weight"}
    assert "model.embed_tokens.weight" not in task.optimizer.hyper_parameters()["decayed"]
    assert "model.layers.0.mlp.up_proj.weight" in task.optimizer.hyper_parameters()["decayed"]


def test_it_is_adamw():
    """Against the textbook formula (Loshchilov and Hutter 2019), two steps."""
    model = nn.ModuleDict({"linear": nn.Linear(3, 2, bias=False)})
    weight = model["linear"].weight.detach().clone()
    optimizer = optimizer_of(model, beta1=0.8, beta2=0.9, epsilon=1e-6, weight_decay=0.1)
    m, v = torch.zeros_like(weight), torch.zeros_like(weight)
    for count, rate in ((1, 0.1), (2, 0.05)):
        gradient = torch.full_like(weight, 0.3 * count)
        step(optimizer, rate, [gradient])
        m, v = 0.8 * m + 0.2 * gradient, 0.9 * v + 0.1 * gradient**2
        weight *= 1 - rate * 0.1
        weight -= rate * (m / (1 - 0.8**count)) / ((v / (1 - 0.9**count)).sqrt() + 1e-6)
    torch.testing.assert_close(model["linear"].weight.detach(), weight)


def test_bf16_parameters_keep_updates_that_are_too_small_for_bf16():
    model = nn.ModuleDict({"linear": nn.Linear(1, 1, bias=False)}).to(torch.bfloat16)
    with torch.no_grad():
        model["linear"].weight.fill_(1.0)
    optimizer = optimizer_of(model, weight_decay=0.0)
    for _ in range(64):
        step(optimizer, 1e-4, [torch.ones(1, 1)])
    # Each step moves by 1e-4; bf16 has nothing between 1 and 0.99609, so every single one would round away.
    assert model["linear"].weight.item() == pytest.approx(1 - 64e-4, abs=4e-3)
    assert model["linear"].weight.item() < 1.0
    assert float(optimizer.state()["master.linear.weight"]) == pytest.approx(1 - 64e-4, abs=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_its_state_goes_on_bit_by_bit(dtype):
    def gradients(seed):
        generator = torch.Generator().manual_seed(seed)
        return [torch.randn(p.shape, generator=generator) for p in small_model().parameters()]

    straight, first = small_model(dtype), small_model(dtype)
    one, two = optimizer_of(straight), optimizer_of(first)
    for seed in range(3):
        step(one, 0.1, gradients(seed))
        step(two, 0.1, gradients(seed))
    second = small_model(dtype)
    three = optimizer_of(second)
    three.load_state({name: tensor.clone() for name, tensor in two.state().items()}, set())
    second.load_state_dict(first.state_dict())
    for seed in range(3, 6):
        step(one, 0.1, gradients(seed))
        step(three, 0.1, gradients(seed))
    assert not differing(straight.state_dict(), second.state_dict())
    assert not differing(one.state(), three.state())


def test_after_the_last_step_its_memory_can_be_given_back():
    model = small_model()
    optimizer = optimizer_of(model)
    step(optimizer, 0.1, [torch.ones_like(p) for p in model.parameters()])
    assert any(name.startswith("first_moment.") for name in optimizer.state())
    weights = {name: p.clone() for name, p in model.named_parameters()}
    optimizer.release()
    assert optimizer.state() == {}
    assert all(p.grad is None for p in model.parameters())
    assert not differing(weights, dict(model.named_parameters()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["missing", "unexpected", "shape", "dtype"])
def test_a_state_that_does_not_fit_is_refused_by_name_and_changes_nothing(kind, dtype):
    model = small_model(dtype)
    optimizer = optimizer_of(model)
    step(optimizer, 0.1, [torch.ones_like(p) for p in model.parameters()])
    state = {name: tensor.clone() for name, tensor in optimizer.state().items()}
    name = "first_moment.linear.weight"
    if kind == "missing":
        del state[name]
    elif kind == "unexpected":
        name = "first_moment.nobody"
        state[name] = torch.zeros(1)
    elif kind == "shape":
        state[name] = state[name].T.contiguous()
    else:
        state[name] = state[name].double()
    before = {key: tensor.clone() for key, tensor in optimizer.state().items()}
    with pytest.raises(StateMismatch, match=name):
        optimizer.load_state(state, set())
    assert not differing(before, optimizer.state())


def test_the_schedule_is_a_pure_function():
    schedule = Schedule(3e-4, 77, "cosine", 5, 0.1)
    assert [schedule.rate(step) for step in range(77)] == [schedule.rate(step) for step in range(77)]
    assert all(math.isfinite(schedule.rate(step)) for step in range(200))
