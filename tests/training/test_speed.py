import pytest
import torch

from nightschool.models.dtype import DtypeChoice
from nightschool.training.planning import speed
from nightschool.training.planning.speed import choose_by_measuring
from tests.support.training_setups import deterministic_threads, make_task

pytestmark = pytest.mark.trains

CHOICE = DtypeChoice(torch.float32, torch.bfloat16, "cpu", "a product alone says so")


@pytest.fixture(autouse=True)
def _deterministic():
    with deterministic_threads():
        yield


def choose(monkeypatch, *, product, steps):
    """What is chosen where products in bf16 are `product` times as fast, and whole steps `steps` times."""
    task = make_task()
    times = {torch.float32: 1e-3 * steps, torch.bfloat16: 1e-3}
    monkeypatch.setattr(speed, "bf16_speedup", lambda width: product)
    monkeypatch.setattr(speed, "_seconds", lambda work: work() or times[task.compute_dtype])
    return task, choose_by_measuring(task, CHOICE, 64)


@pytest.mark.parametrize(
    ("product", "steps", "dtype", "words"),
    [
        (7.0, 2.0, torch.bfloat16, "bf16 computes a micro-batch of this run 2 times as fast"),
        (7.0, 0.6, torch.float32, "bf16 computes a micro-batch of this run 0.6 times as fast"),
        (7.0, 1.1, torch.float32, "1.1 times"),
        (0.01, 9.0, torch.float32, "a product in bf16 is 0.01 times as fast"),
    ],
)
def test_whole_steps_decide(monkeypatch, product, steps, dtype, words):
    task, choice = choose(monkeypatch, product=product, steps=steps)
    assert choice.compute == task.compute_dtype == dtype
    assert words in choice.why


def test_measuring_changes_nothing(monkeypatch):
    state = torch.get_rng_state()
    task, _ = choose(monkeypatch, product=7.0, steps=2.0)
    assert torch.equal(state, torch.get_rng_state())
    assert all(p.grad is None for p in task.trainable().values())
    assert not task.optimizer.inner.state


def test_emulated_bf16_is_never_computed_with(monkeypatch):
    """It can take a hundred times as long, so that one micro-batch would already be too many."""
    task = make_task()
    monkeypatch.setattr(speed, "bf16_speedup", lambda width: 0.01)
    monkeypatch.setattr(speed, "compute", lambda *_: pytest.fail("computed"))
    assert choose_by_measuring(task, CHOICE, 64).compute == torch.float32
