"""What it takes to ask a model, beside its steps: found by answering a little, as a plan that trains nothing can."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from nightschool.evaluation.heldout import as_found
from nightschool.models.quiet import quiet_libraries
from nightschool.training.continuation import greedy_answers
from nightschool.training.planning.plan_row import PlanRow
from nightschool.units import Every, format_seconds

# Tokens that are said for the measurement, after the first one.
_TRIED_TOKENS = 4


@dataclass(frozen=True)
class Asking:
    """Seconds that a run spends beside its steps, at most: `before` step 1 on each of some things, and on each of `checks` spot checks.

    `checks` is None where a clock decides how many there are.
    """

    before: tuple[tuple[str, float], ...] = ()
    checks: int | None = 0
    check_seconds: float = 0.0

    @property
    def before_seconds(self) -> float:
        return sum(seconds for _, seconds in self.before)

    @property
    def seconds(self) -> float:
        return self.before_seconds + (self.checks or 0) * self.check_seconds


def asking_row(asking: Asking) -> PlanRow:
    """What a plan says of it."""
    parts = [f"{what} {format_seconds(round(seconds))}" for what, seconds in asking.before]
    if asking.check_seconds:
        times = "each spot check" if asking.checks is None else f"{asking.checks} spot checks of"
        parts.append(f"{times} {asking.check_seconds:.3g} s")
    facts = {
        "asking_seconds": asking.before_seconds,
        "spot_checks": asking.checks,
        "spot_check_seconds": asking.check_seconds,
    }
    return PlanRow("asking", f"at most, by a measured piece of it: {', '.join(parts)}", facts)


def seconds_to_answer(
    model: nn.Module, tokenizer: Any, prompts: Sequence[Sequence[int]], max_new_tokens: int, prompts_per_pass: int
) -> float:
    """Seconds for greedy answers to all prompts, none of which ends early, by a pass over some of them that says a few tokens.

    `prompts` are tokens; the model answers as it is now, and is left as it was.
    """
    if not prompts:
        return 0.0
    step = max(1, len(prompts) // prompts_per_pass)
    some = list(prompts)[::step][:prompts_per_pass]

    def seconds(tokens: int) -> float:
        return seconds_of(lambda: greedy_answers(model, tokenizer, some, tokens))

    with quiet_libraries(), as_found(model), torch.no_grad():
        greedy_answers(model, tokenizer, some[:1], 1)  # what the first call sets up
        first = seconds(1)
        each = max(0.0, seconds(1 + _TRIED_TOKENS) - first) / _TRIED_TOKENS
    return len(prompts) / len(some) * (first + (max_new_tokens - 1) * each)


def seconds_of(work: Callable[[], object]) -> float:
    """Seconds that it takes once."""
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def num_checks(every: Every, steps_total: int, steps_per_epoch: int) -> int | None:
    """How many spot checks a run of so many steps has, one at the end among them; None where a clock decides."""
    if every.unit == "seconds":
        return None
    steps = every.amount * (steps_per_epoch if every.unit == "epochs" else 1)
    return max(1, math.ceil(steps_total / steps))
