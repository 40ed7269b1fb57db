"""What a run would do, before it does anything: sizes, tokens, bytes, time, the loss mask."""

from __future__ import annotations

import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text

from nightschool.config.recipe import Recipe
from nightschool.data.chat.loss_mask_preview import Span, render_mask
from nightschool.layers.forward import causal_lm
from nightschool.models.cost import (
    count_parameters,
    expected_peak_bytes,
    expert_counts,
    expert_step_bytes,
    expert_stores,
    expert_tiers,
    flops_per_token,
)
from nightschool.models.peak import peak_flops
from nightschool.models.update_cost import UpdateCost
from nightschool.store.atomic import read_json
from nightschool.store.home import Home
from nightschool.store.runs import Run
from nightschool.training.environment import keep_freed_memory
from nightschool.training.methods import METHODS
from nightschool.training.methods.prepared import MethodPlan, PreparedRun, Setup
from nightschool.training.metrics import peak_bytes, say
from nightschool.training.optimizer import optimizer_class
from nightschool.training.planning.asking import asking_row
from nightschool.training.planning.plan_row import PlanRow
from nightschool.training.planning.speed import Probe, measure
from nightschool.training.task import Task
from nightschool.units import format_bytes
from nightschool.work.peak_memory import resident_bytes

# Rendering takes about a millisecond an example: a plan looks at this many, chosen by the seed. A run counts them all.
SAMPLED_EXAMPLES = 2000
TRAINED_DTYPE_BYTES = 4


@dataclass(frozen=True)
class Plan:
    """Everything that `nightschool plan` says, row by row: those of every run, and those of its method.

    Token counts are those of one epoch. Where a method took a sample (`examples_rendered` is less than all that would be
    trained), its counts are estimates. Times are extrapolated from micro-batches that were really computed.
    """

    title: str
    rows: list[PlanRow]
    findings: list[str]
    loss_masks: list[list[Span]]
    masked: str

    @property
    def facts(self) -> dict[str, Any]:
        """All figures by name. Sizes are in bytes, times in seconds."""
        return {name: value for row in self.rows for name, value in row.facts.items()} | {"loss_masks": self.loss_masks}

    def to_json(self) -> dict[str, Any]:
        plain = asdict(self)
        facts: dict[str, Any] = {}
        for row in plain["rows"]:
            facts |= row["facts"]
        return facts | {"loss_masks": plain["loss_masks"]}


def make_plan(recipe: Recipe, home: Home, root: Path | None = None, *, alone: bool = False) -> Plan:
    """Plan a run without creating one. Loads the base and computes a few micro-batches; trains nothing.

    Args:
        recipe: What is wanted.
        home: Where versions and accepted examples are.
        root: Where relative paths begin; the working directory without it.
        alone: Whether this process does nothing else: then it keeps freed memory as a run does, for its peak to be measured.

    Raises:
        NothingToTrain: If no token would carry loss, or more than train.max_cut_share of those that would is cut.
        DataError, ModelError, NotFound: If the data or the base cannot be read.
    """
    prepared = METHODS[recipe.method].prepare(Setup(recipe, home, root or Path.cwd(), sample=SAMPLED_EXAMPLES))
    if alone:
        keep_freed_memory(recipe)
    prepared.stand_in()
    return plan_of(prepared, home, recipe.train.num_processes)


def plan_of(prepared: PreparedRun[Any], home: Home, num_processes: int | None = None) -> Plan:
    """The plan of a run that is ready to start. Computes a few micro-batches; trains nothing.

    `num_processes` is how many the run will have, where they were not started for the plan.
    """
    recipe, task = prepared.recipe, prepared.task
    method = prepared.plan_rows(num_processes or task.world.size)
    count = count_parameters(task.model)
    moment_bytes = optimizer_class(recipe.train).moment_bytes
    cost = expected_peak_bytes(
        task.model,
        method.largest_batch_tokens,
        gradient_checkpointing=recipe.train.gradient_checkpointing,
        layer_by_layer_bytes=recipe.train.accumulation_steps * task.kept_bytes(method.largest_batch_tokens),
        compute=task.compute_dtype,
        moment_bytes=moment_bytes,
    )
    needed, free = _disk_needed(prepared, count.total, count.trainable), _disk_free(home.path)
    rows = [
        PlanRow("", "", {"name": recipe.name, "base": recipe.base, "method": recipe.method}),
        PlanRow(
            "parameters",
            f"{count.total:,}, of which {count.trainable:,} learn",
            {"parameters_total": count.total, "parameters_trainable": count.trainable},
        ),
        *_experts(task, count.active, moment_bytes, recipe.train.accumulation_steps),
        PlanRow(
            "rate",
            f"{recipe.train.learning_rate:g}, {recipe.train.lr_schedule}, by {recipe.train.optimizer}"
            + (f"; experts {recipe.train.expert_learning_rate:g}" if recipe.train.expert_learning_rate else ""),
            {"learning_rate": recipe.train.learning_rate, "optimizer": recipe.train.optimizer},
        ),
        *method.rows,
        PlanRow(
            "computes",
            f"on {task.device.type} with {prepared.num_threads} threads in {prepared.dtype.why}"
            + (f"; {method.processes} processes together" if method.processes > 1 else ""),
            {"dtype": prepared.dtype.why, "device": task.device.type, "num_threads": prepared.num_threads},
        ),
        *measured_rows(prepared, method, max(cost.total, cost.parameters + method.bytes_before)),
        PlanRow(
            "disk",
            f"{format_bytes(needed)} needed at most, {format_bytes(free)} free",
            {"disk_needed_bytes": needed, "disk_free_bytes": free},
        ),
    ]
    notes = [*(method.notes or []), *_experimental(recipe)]
    rows.append(PlanRow("", "", {"notes": notes}))
    return Plan(
        title=f"Plan: {recipe.name} by method {recipe.method} from {recipe.base}",
        rows=rows,
        findings=[*method.findings, *notes],
        loss_masks=method.loss_masks,
        masked=method.masked,
    )


def _experimental(recipe: Recipe) -> list[str]:
    if recipe.train.local_blocks == 1:
        return []
    return [
        f"Experimental: {recipe.train.local_blocks} blocks of layers learn by themselves. What that costs in loss against "
        "train.local_blocks=1 is not measured by a run; benchmarks/local_learning.py measures it."
    ]


def _experts(task: Task, active: int, moment_bytes: int, micro_batches: int) -> list[PlanRow]:
    """What is said of a mixture: its experts, and on which tier their bytes lie."""
    counts = expert_counts(causal_lm(task.model).config)
    if counts is None:
        return []
    tiers = asdict(expert_tiers(task.model, moment_bytes))
    where = ", ".join(f"{format_bytes(size)} on the {tier}" for tier, size in tiers.items())
    facts: dict[str, Any] = {
        "num_experts": counts.experts,
        "num_active_experts": counts.active,
        "parameters_active": active,
        "expert_bytes": tiers,
        "expert_step_bytes": expert_step_bytes(task.model, task.expert_loads(micro_batches)),
    }
    text = f"{counts.experts} in a layer, {counts.active} for a token, so {active:,} parameters are active; {where}"
    if facts["expert_step_bytes"]:
        text += f"; at most {format_bytes(facts['expert_step_bytes'])} to and fro in a step"
    return [PlanRow("experts", text, facts)]


def _disk_needed(prepared: PreparedRun[Any], total: int, trainable: int) -> int:
    """Checkpoints (weights and two moments, in fp32) at their most, one of them half-written, the version, and a file of experts."""
    keep = prepared.recipe.checkpoints.keep
    checkpoint = 3 * TRAINED_DTYPE_BYTES * trainable
    version = TRAINED_DTYPE_BYTES * (trainable if prepared.loaded.adapter else total)
    best = keep.best * (1 if prepared.budget.enough is None else 2)  # by the held-out loss, and by spot checks
    experts = sum(store.taken_disk_bytes for store in expert_stores(prepared.task.model))
    return (keep.last + best + 1) * checkpoint + version + experts


def _disk_free(path: Path) -> int:
    """Free bytes where the home is, or will be."""
    while not path.exists():
        path = path.parent
    return shutil.disk_usage(path).free


def render_plan(plan: Plan, console: Console) -> None:
    """Print the plan for people."""
    console.print(Text(plan.title, style="bold"), highlight=False)
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    for row in plan.rows:
        if row.label:
            table.add_row(row.label, row.text)
    console.print(table)
    for finding in plan.findings:
        console.print(Text(f"  {finding}"))
    colour = console.color_system is not None and not console.no_color
    how = "bold green is trained, dim is context" if colour else "▏between bars▕ is trained, the rest is context"
    console.print(Text(f"Loss mask of the first {plan.masked} ({how}):"))
    for spans in plan.loss_masks:
        console.print(render_mask(spans, colour=colour), soft_wrap=True)
        console.print()


# By which a process grows in its first dozen steps, as micro-batches of different sizes leave holes in the heap: 0 to 6 % were
# measured on the four mixtures of benchmarks/expert_plan.py.
_HOLES_SHARE = 0.03


def measured_rows(prepared: PreparedRun[Any], method: MethodPlan, tensor_bytes: int) -> list[PlanRow]:
    """The rows `peak`, `asking`, `step` and `time`. Computes a few micro-batches, an update of something else, and a few answers.

    `tensor_bytes` are those of tensors at the peak, as reckoned.
    """
    micro_batches, before = prepared.budget.accumulation_steps, resident_bytes() + method.bytes_before
    probe, update = measure(prepared.task, micro_batches), prepared.task.update_cost()
    asking = prepared.asking()
    kept = update.new_bytes + max(0, micro_batches - 2) * prepared.task.kept_bytes(method.largest_batch_tokens)
    if prepared.task.device.type == "cpu" and probe.peak_bytes is not None:
        kept += int(_HOLES_SHARE * probe.peak_bytes)
    if saves_in_background(prepared.recipe) and prepared.budget.saves_before_its_end:
        kept += prepared.task.expected_bytes()
    return [
        _peak(probe, kept, before, tensor_bytes),
        *([] if asking is None else [asking_row(asking)]),
        *_times(prepared, method, probe, update, 0.0 if asking is None else asking.seconds),
    ]


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


def _peak(probe: Probe, kept_bytes: int, bytes_before: int, tensor_bytes: int) -> PlanRow:
    """By what was held while micro-batches were computed and what is kept from then on, or by what is held before step 1."""
    facts: dict[str, Any] = {"expected_peak_bytes": tensor_bytes, "expected_process_bytes": None}
    text = f"about {format_bytes(tensor_bytes)} of tensors"
    if probe.peak_bytes is not None:
        facts["expected_process_bytes"] = max(probe.peak_bytes + kept_bytes, bytes_before)
        text += f"; of the whole process {format_bytes(facts['expected_process_bytes'])} while it trains"
    return PlanRow("peak", text, facts)


def _times(
    prepared: PreparedRun[Any], method: MethodPlan, probe: Probe, update: UpdateCost, asking_seconds: float
) -> list[PlanRow]:
    task = prepared.task
    # Processes that are not there yet will share the cores that this one has alone; each has a GPU of its own.
    rate = probe.tokens_per_second * (method.processes if task.device.type == "cuda" else task.world.size)
    pass_seconds = method.tokens_computed / rate / method.steps_total
    step_seconds = pass_seconds + update.seconds
    moving_seconds = probe.moving_share * pass_seconds + update.moving_seconds
    expected_seconds = step_seconds * method.steps_total + asking_seconds
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
