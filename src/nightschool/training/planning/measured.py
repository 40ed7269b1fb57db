"""What a run will take, reckoned from what was measured before it: memory at its peak, seconds of a step and of all."""

from __future__ import annotations

from typing import Any

import torch

from nightschool.config.recipe import Recipe
from nightschool.models.cost import flops_per_token
from nightschool.models.peak import peak_flops
from nightschool.store.atomic import read_json
from nightschool.store.runs import Run
from nightschool.training.methods.prepared import MethodPlan, PlanRow, PreparedRun
from nightschool.training.metrics import peak_bytes, say
from nightschool.training.planning.speed import Probe, measure
from nightschool.training.update_cost import UpdateCost
from nightschool.units import format_bytes

# By which a process grows in its first dozen steps, as micro-batches of different sizes leave holes in the heap: 0 to 6 % were
# measured on the four mixtures of benchmarks/expert_plan.py.
_HOLES_SHARE = 0.03


def measured_rows(prepared: PreparedRun[Any], method: MethodPlan, tensor_bytes: int) -> list[PlanRow]:
    """The rows `peak`, `step` and `time`. Computes a few micro-batches, and an update of something else.

    `tensor_bytes` are those of tensors at the peak, as reckoned.
    """
    micro_batches = prepared.budget.accumulation_steps
    probe, update = measure(prepared.task, micro_batches), prepared.task.update_cost()
    kept = update.new_bytes + max(0, micro_batches - 2) * prepared.task.kept_bytes(method.largest_batch_tokens)
    if prepared.task.device.type == "cpu" and probe.peak_bytes is not None:
        kept += int(_HOLES_SHARE * probe.peak_bytes)
    if saves_in_background(prepared.recipe) and prepared.budget.saves_before_its_end:
        kept += prepared.task.expected_bytes()
    return [_peak(probe, kept, tensor_bytes), *_times(prepared, method, probe, update)]


def say_measured(run: Run, device: torch.device, steps: int, seconds: float) -> None:
    """Put what so many steps took, and the peak, beside what the plan of the run said."""
    plan = read_json(run.path / "plan.json")
    measured = {"step_seconds": seconds / steps, "process_bytes": peak_bytes(device)}
    planned: dict[str, Any] = {name: plan.get(f"expected_{name}") for name in measured}
    run.events.write("measured", **measured, **{f"expected_{name}": value for name, value in planned.items()})
    step_planned, bytes_planned = (
        "" if planned[name] is None else f" ({form(planned[name])} planned)"
        for name, form in (("step_seconds", _seconds), ("process_bytes", format_bytes))
    )
    say(
        f"A step took {_seconds(measured['step_seconds'])}{step_planned}; the most in memory was "
        f"{format_bytes(measured['process_bytes'])}{bytes_planned}"
    )


def _seconds(seconds: float) -> str:
    return f"{seconds:.3g} s"


def saves_in_background(recipe: Recipe) -> bool:
    """Whether a process of its own writes the checkpoints of a run, from a copy. None does where experts are streamed, of all
    of which it would be a copy.
    """
    return recipe.checkpoints.background and recipe.experts.tier == "device"


def _peak(probe: Probe, kept_bytes: int, tensor_bytes: int) -> PlanRow:
    facts: dict[str, Any] = {"expected_peak_bytes": tensor_bytes, "expected_process_bytes": None}
    text = f"about {format_bytes(tensor_bytes)} of tensors"
    if probe.peak_bytes is not None:
        facts["expected_process_bytes"] = probe.peak_bytes + kept_bytes
        text += f"; of the whole process {format_bytes(facts['expected_process_bytes'])} while it trains"
    return PlanRow("peak", text, facts)


def _times(prepared: PreparedRun[Any], method: MethodPlan, probe: Probe, update: UpdateCost) -> list[PlanRow]:
    task = prepared.task
    # Processes that are not there yet will share the cores that this one has alone; each has a GPU of its own.
    rate = probe.tokens_per_second * (method.processes if task.device.type == "cuda" else task.world.size)
    pass_seconds = method.tokens_computed / rate / method.steps_total
    step_seconds = pass_seconds + update.seconds
    moving_seconds = probe.moving_share * pass_seconds + update.moving_seconds
    expected_seconds = step_seconds * method.steps_total
    facts: dict[str, Any] = {
        "expected_seconds": expected_seconds,
        "measured_batches": probe.batches,
        "measured_tokens_per_second": rate,
    }
    of_peak = ""
    if method.sequence_tokens is not None:
        peak, _ = peak_flops(task.device, task.compute_dtype)
        used = probe.tokens_per_second * flops_per_token(task.model, method.sequence_tokens) / peak
        facts["model_flops_utilization"] = used
        of_peak = f", {used:.0%} of what products reach" if probe.batches else ""
    step = f"{_seconds(step_seconds)}: {_seconds(pass_seconds)} for its micro-batches, {_seconds(update.seconds)} for the update"
    if moving_seconds:
        step += f"; {_seconds(moving_seconds)} of it to read and write experts"
    minutes, seconds = divmod(round(expected_seconds), 60)
    return [
        PlanRow(
            "step",
            step,
            {
                "expected_step_seconds": step_seconds,
                "expected_update_seconds": update.seconds,
                "expected_moving_seconds": moving_seconds,
            },
        ),
        PlanRow("time", f"about {minutes} min {seconds} s, {probe.how} ({rate:,.0f} tokens/s{of_peak})", facts),
    ]
