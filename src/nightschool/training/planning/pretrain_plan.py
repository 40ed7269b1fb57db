"""What a pretraining run would do, before it does anything."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from nightschool.models.cost import count_parameters, expected_peak_bytes, flops_per_token
from nightschool.models.peak import peak_flops
from nightschool.store.home import Home
from nightschool.training.loop import steps_in_epoch
from nightschool.training.methods.pretrain import PreparedPretrain
from nightschool.training.planning.loss_mask_preview import Span, loss_mask, render_mask
from nightschool.training.planning.throughput import Probe, disk_free, disk_needed, measure
from nightschool.units import format_bytes

PREVIEWED_TOKENS = 160


@dataclass(frozen=True)
class PretrainPlan:
    """All counts are measured on the shards and the model of the run. Sizes in bytes, times in seconds."""

    name: str
    base: str
    method: str
    parameters_total: int
    parameters_trainable: int
    shards: int
    tokens: int
    documents: int
    sequences: int
    sequences_held_out: int
    tokens_left_over: int
    max_seq_len: int
    vocab_size: int
    tokens_per_step: int
    epochs: int
    steps_per_epoch: int
    steps_total: int
    dtype: str
    device: str
    num_threads: int
    processes: int
    expected_peak_bytes: int
    expected_seconds: float
    measured_batches: int
    measured_tokens_per_second: float
    model_flops_utilization: float
    disk_needed_bytes: int
    disk_free_bytes: int
    loss_masks: list[list[Span]]

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def pretrain_plan_of(prepared: PreparedPretrain, home: Home, processes: int | None = None) -> PretrainPlan:
    """The plan of a run that is ready to start. Computes a few micro-batches; trains nothing.

    `processes` is how many the run will have, where they were not started for the plan.
    """
    recipe, task = prepared.recipe, prepared.task
    train, index, batches = recipe.train, prepared.source.shards.index, task.batches
    count = count_parameters(task.model)
    processes = processes or task.world.size
    stride = train.batch_size * processes
    per_epoch = steps_in_epoch(batches.num_sequences, train.accumulation_steps, stride)
    steps_total = train.max_steps or per_epoch * train.epochs
    per_step = min(train.accumulation_steps * stride, batches.num_sequences) * train.max_seq_len
    probe = measure(task)
    # Processes that are not there yet will share the cores that this one has alone; each has a GPU of its own.
    rate = probe.tokens_per_second * (processes if task.device.type == "cuda" else task.world.size)
    peak, _ = peak_flops(task.device, task.compute_dtype)
    cost = expected_peak_bytes(
        task.model,
        train.batch_size * train.max_seq_len,
        gradient_checkpointing=train.gradient_checkpointing,
        compute=task.compute_dtype,
    )
    return PretrainPlan(
        name=recipe.name,
        base=recipe.base,
        method=recipe.method,
        parameters_total=count.total,
        parameters_trainable=count.trainable,
        shards=len(index.shards),
        tokens=index.tokens,
        documents=sum(shard.documents for shard in index.shards),
        sequences=batches.num_sequences,
        sequences_held_out=batches.num_held_out,
        tokens_left_over=batches.tokens_left_over,
        max_seq_len=train.max_seq_len,
        vocab_size=prepared.loaded.vocab_size,
        tokens_per_step=per_step,
        epochs=train.epochs,
        steps_per_epoch=per_epoch,
        steps_total=steps_total,
        dtype=prepared.dtype.why,
        device=task.device.type,
        num_threads=prepared.num_threads,
        processes=processes,
        expected_peak_bytes=cost.total,
        expected_seconds=per_step / rate * steps_total,
        measured_batches=probe.batches,
        measured_tokens_per_second=rate,
        model_flops_utilization=probe.tokens_per_second * flops_per_token(task.model, train.max_seq_len) / peak,
        disk_needed_bytes=disk_needed(prepared, count.total, count.trainable),
        disk_free_bytes=disk_free(home.path),
        loss_masks=[_first_mask(prepared)],
    )


def _first_mask(prepared: PreparedPretrain) -> list[Span]:
    """The beginning of the first sequence that is trained: each token by whether it is predicted."""
    batch = prepared.task.batches.get(0, 0, 1)
    ids = batch.input_ids[0, :PREVIEWED_TOKENS].tolist()
    # A weight stands at the place that predicts; shown is the token that is predicted.
    weights = [0.0, *batch.weights[0, : len(ids) - 1].tolist()]
    return loss_mask(prepared.loaded.tokenizer, ids, weights, ["text"] * len(ids))


def render_pretrain_plan(plan: PretrainPlan, console: Console) -> None:
    """Print the plan for people."""
    console.print(Text(f"Plan: {plan.name} by method {plan.method} from {plan.base}", style="bold"), highlight=False)
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    minutes, seconds = divmod(round(plan.expected_seconds), 60)
    facts = [
        ("parameters", f"{plan.parameters_total:,}, of which {plan.parameters_trainable:,} learn"),
        ("shards", f"{plan.shards} with {plan.tokens:,} tokens of {plan.documents:,} documents"),
        (
            "sequences",
            f"{plan.sequences:,} of {plan.max_seq_len} tokens an epoch, {plan.sequences_held_out} held out; "
            f"{plan.tokens_left_over:,} tokens at the ends of shards fill none",
        ),
        ("vocabulary", f"{plan.vocab_size:,} ids"),
        (
            "steps",
            f"{plan.steps_total:,} in all, {plan.steps_per_epoch:,} an epoch, {plan.tokens_per_step:,} tokens each",
        ),
        (
            "computes",
            f"on {plan.device} with {plan.num_threads} threads in {plan.dtype}"
            + (f"; {plan.processes} processes together" if plan.processes > 1 else ""),
        ),
        ("peak", f"about {format_bytes(plan.expected_peak_bytes)} of tensors"),
        (
            "time",
            f"about {minutes} min {seconds} s, {Probe(plan.measured_batches, plan.measured_tokens_per_second).how} "
            f"({plan.measured_tokens_per_second:,.0f} tokens/s"
            + (f", {plan.model_flops_utilization:.0%} of what products reach)" if plan.measured_batches else ")"),
        ),
        ("disk", f"{format_bytes(plan.disk_needed_bytes)} needed at most, {format_bytes(plan.disk_free_bytes)} free"),
    ]
    for label, value in facts:
        table.add_row(label, value)
    console.print(table)
    colour = console.color_system is not None and not console.no_color
    how = "bold green is trained, dim is context" if colour else "▏between bars▕ is trained, the rest is context"
    console.print(Text(f"Loss mask of the first tokens ({how}):"))
    for spans in plan.loss_masks:
        console.print(render_mask(spans, colour=colour), soft_wrap=True)
        console.print()
