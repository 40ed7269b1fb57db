"""Back from what a run learned towards what it began with, as far as it still knows as much.

A straight line between the weights before and after fine-tuning keeps what was learned for a good part of its way back, while what
the model was before returns sooner (WiSE-FT, Wortsman et al. 2022, arXiv 2109.01903).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from nightschool.evaluation.spot_check import SpotCheck

SHARES = (0.9, 0.8)
"""Of the way from the beginning, tried in this order. Nearer ones still answer in the wordings of rules, and no more in those of people."""

Weights = Mapping[str, Tensor]


def learning_weights(model: nn.Module) -> Weights:
    """A copy of the parameters that learn, by their names."""
    return {name: one.detach().clone() for name, one in model.named_parameters() if one.requires_grad}


def go_back(
    model: nn.Module, start: Weights, spot_check: Callable[[int], SpotCheck], learned: SpotCheck
) -> tuple[float, SpotCheck]:
    """Leave the weights in the model that lie nearest to `start` and answer as much as those that it has.

    The first share that knows less, or drifts no less, ends the search.

    Args:
        model: With the weights of a step.
        start: What `learning_weights` gave before step 1.
        spot_check: Asks the model as it is; called with the step of `learned`.
        learned: What the weights in the model know.

    Returns:
        The share of the way from `start`, and what is known there; 1 and `learned` where every step back costs something.
    """
    end = learning_weights(model)
    share, best = 1.0, learned
    for smaller in SHARES:
        _place(model, start, end, smaller)
        check = spot_check(learned.step)
        if check.learned < best.learned or (check.drift or 0.0) >= (best.drift or 0.0):
            break
        share, best = smaller, check
    _place(model, start, end, share)
    return share, best


def _place(model: nn.Module, start: Weights, end: Weights, share: float) -> None:
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name in end:
                parameter.copy_(end[name] if share == 1.0 else torch.lerp(start[name], end[name], share))
