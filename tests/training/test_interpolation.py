"""What was learned is taken back as far as the model still knows as much."""

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from nightschool.config.recipe import Recipe
from nightschool.evaluation.spot_check import SpotCheck
from nightschool.events import read_events
from nightschool.store.registry import Registry
from nightschool.training.interpolation import SHARES, go_back, learning_weights
from nightschool.training.spot_check import SpotChecks
from tests.support.training_setups import LORA, MiniRun, deterministic_threads

FACTS = [{"query": f"{n}?", "retrieved": f"it is {word}"} for n, word in enumerate(["red", "blue", "tall", "cold"])]


class Line(nn.Module):
    """From 1 to 3; knows all from `needed` on, and drifts by its distance from 1."""

    def __init__(self, needed, drifts=True):
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([3.0]))
        self.frozen = nn.Parameter(torch.tensor([7.0]), requires_grad=False)
        self.needed, self.drifts = needed, drifts

    def check(self, step):
        way = (self.weight.item() - 1) / 2
        return SpotCheck(step, float(way >= self.needed - 1e-6), way if self.drifts else 0.1)


@pytest.mark.parametrize(("needed", "share"), [(0.95, 1.0), (0.9, 0.9), (0.85, 0.9), (0.0, SHARES[-1])])
def test_it_goes_back_as_far_as_it_knows_as_much(needed, share):
    line = Line(needed)
    found_share, found = go_back(line, {"weight": torch.tensor([1.0])}, line.check, line.check(7))
    assert (found_share, found.step, found.learned) == (share, 7, 1.0)
    assert found.drift == pytest.approx(share)
    assert line.weight.item() == pytest.approx(1 + 2 * share)
    assert line.frozen.item() == 7.0


def test_a_step_back_that_spares_nothing_is_not_taken_and_the_weights_are_those_of_before():
    line = Line(0.0, drifts=False)
    line.weight.data = torch.tensor([0.1 + 0.2])
    before = line.weight.detach().clone()
    assert go_back(line, {"weight": torch.tensor([1.0])}, line.check, line.check(7))[0] == 1.0
    assert torch.equal(line.weight, before)


def test_only_what_learns_is_kept():
    assert list(learning_weights(Line(0.0))) == ["weight"]


@pytest.mark.parametrize(
    ("plain", "said"),
    [
        ({"train": {"early_stopping": {"interpolate": True}}}, "write `every` with it"),
        ({"train": {"early_stopping": {"every": "2 steps", "interpolate": True}}, "method": "full"}, "trains no adapter"),
    ],
)  # fmt: skip
def test_what_cannot_be_interpolated_is_refused(plain, said):
    with pytest.raises(ValueError, match=said):
        Recipe.model_validate({"base": "x", "data": [{"path": "y"}]} | plain)


def a_run(folder, **stopping):
    early = {"every": "100 steps", "learned": ">= 90%"} | stopping
    recipe = {"gate": {"holdout_loss": None}, "checkpoints": {"background": False}}
    return MiniRun(folder, rows=FACTS, lora=LORA, recipe=recipe, epochs=4, early_stopping=early)


def published(run):
    version = Registry(run.home).resolve(run.run.status.candidate)
    return load_file(next(version.path.rglob("adapter_model.safetensors")))


@pytest.mark.trains
def test_a_run_publishes_the_nearest_point_that_knows_as_much(tmp_path, monkeypatch):
    checks = iter([(1.0, 0.3), (1.0, 0.2), (0.5, 0.1)])
    monkeypatch.setattr(SpotChecks, "__call__", lambda _, step: SpotCheck(step, *next(checks)))
    with deterministic_threads():
        nearest = a_run(tmp_path / "nearest", interpolate=True).go()
        monkeypatch.setattr(SpotChecks, "__call__", lambda _, step: SpotCheck(step, 1.0, 0.3))
        whole = a_run(tmp_path / "whole").go()
    said = [row for row in read_events(nearest.run.events.path) if row["event"] == "interpolated"]
    assert [(row["share"], row["learned"], row["drift"]) for row in said] == [(0.9, 1.0, 0.2)]
    learned = published(whole)
    for name, tensor in published(nearest).items():
        if "lora_B" in name:
            torch.testing.assert_close(tensor, 0.9 * learned[name])
    assert any("lora_B" in name and tensor.any() for name, tensor in learned.items())
