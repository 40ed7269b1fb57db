"""What a run would do, before it does anything: sizes, tokens by role, what is cut, bytes, time, the loss mask."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from nightschool.config.recipe import Recipe
from nightschool.data.chat.render import Rendered
from nightschool.feedback.selection import Selection, sample_of, select_examples
from nightschool.models.cost import count_parameters, expected_peak_bytes
from nightschool.store.home import Home
from nightschool.training.loop import steps_in_epoch
from nightschool.training.methods.pretrain import PreparedPretrain, prepare_pretraining
from nightschool.training.planning.loss_mask_preview import Span, loss_mask, render_mask
from nightschool.training.planning.pretrain_plan import PretrainPlan, pretrain_plan_of, render_pretrain_plan
from nightschool.training.planning.throughput import Probe, disk_free, disk_needed, measure
from nightschool.training.setup import PreparedFinetune, PreparedRun, prepare_finetune
from nightschool.units import format_bytes

PREVIEWED_EXAMPLES = 3
LISTED_CUTS = 10
# Rendering takes about a millisecond an example: a plan looks at this many, chosen by the seed. A run counts them all.
SAMPLED_EXAMPLES = 2000


@dataclass(frozen=True)
class RoleTokens:
    """Tokens of one role in one epoch, and how many of them carry loss."""

    tokens: int
    trained: int


@dataclass(frozen=True)
class Cut:
    """An example that is longer than train.max_seq_len. `where` is `file:line`; `share` is of all its tokens."""

    where: str
    share: float
    trained_share: float


@dataclass(frozen=True)
class Plan:
    """Everything that `nightschool plan` says; plain values throughout, so that `asdict` is JSON.

    Token counts are those of one epoch. Where `examples_rendered` is less than all that would be trained, a sample was
    rendered, and the counts of tokens, cuts and steps are estimates. Times are extrapolated from micro-batches that were really computed.
    """

    name: str
    base: str
    method: str
    parameters_total: int
    parameters_trainable: int
    examples_new: int
    examples_replayed: int
    examples_held_out: int
    examples_known: int
    examples_without_loss: int
    examples_rendered: int
    duplicates: int
    formats: dict[str, list[str]]
    tokens: int
    tokens_trained: int
    tokens_by_role: dict[str, RoleTokens]
    cut_share: float
    cut_trained_share: float
    cut_examples: int
    cuts: list[Cut]
    epochs: int
    steps_per_epoch: int
    steps_total: int
    dtype: str
    device: str
    num_threads: int
    expected_peak_bytes: int
    expected_seconds: float
    measured_batches: int
    measured_tokens_per_second: float
    disk_needed_bytes: int
    disk_free_bytes: int
    notes: list[str]
    loss_masks: list[list[Span]]

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def make_plan(recipe: Recipe, home: Home, root: Path | None = None) -> Plan | PretrainPlan:
    """Plan a run without creating one. Loads the base and computes a few micro-batches; trains nothing.

    Args:
        recipe: What is wanted.
        home: Where versions and accepted examples are.
        root: Where relative paths begin; the working directory without it.

    Raises:
        NothingToTrain: If no token would carry loss, or more than train.max_cut_share of those that would is cut.
        DataError, ModelError, NotFound: If the data or the base cannot be read.
    """
    root = root or Path.cwd()
    if recipe.method == "pretrain":
        return pretrain_plan_of(prepare_pretraining(recipe, home, root=root), home, recipe.train.num_processes)
    whole = select_examples(recipe, home, root)
    sample = sample_of(whole, SAMPLED_EXAMPLES, seed=recipe.train.seed)
    return finetune_plan_of(prepare_finetune(recipe, sample, home, root=root), home, whole=whole)


def plan_of(prepared: PreparedRun, home: Home) -> Plan | PretrainPlan:
    """The plan of a run that is ready to start."""
    if isinstance(prepared, PreparedPretrain):
        return pretrain_plan_of(prepared, home)
    assert isinstance(prepared, PreparedFinetune), "a prepared is one of the two"
    return finetune_plan_of(prepared, home)


def finetune_plan_of(prepared: PreparedFinetune, home: Home, *, whole: Selection | None = None) -> Plan:
    """The plan of fine-tuning. Where `prepared` holds a sample of the `whole` selection, counts are scaled up."""
    whole = whole or prepared.selection
    scale = len(whole.train) / max(1, len(prepared.selection.train))
    recipe, task, rendered_data = prepared.recipe, prepared.task, prepared.rendered_data
    batches, count = task.batches, count_parameters(task.model)
    rendered = rendered_data.all
    steps_per_epoch = steps_in_epoch(round(batches.num_batches(0) * scale), recipe.train.accumulation_steps)
    steps_total = prepared.budget.steps_total
    if whole is not prepared.selection:
        steps_total = recipe.train.max_steps or steps_per_epoch * recipe.train.epochs
    probe = measure(task)
    cost = expected_peak_bytes(
        task.model,
        max(task.batch(0, index).input_ids.shape[-1] for index in range(min(64, batches.num_batches(0)))),
        gradient_checkpointing=recipe.train.gradient_checkpointing,
        compute=task.compute_dtype,
    )
    cuts = _cuts(prepared)
    all_tokens = sum(len(r.input_ids) + r.cut_tokens for r in rendered)
    cut_trained = sum(r.cut_trained for r in rendered)
    return Plan(
        name=recipe.name,
        base=recipe.base,
        method=recipe.method,
        parameters_total=count.total,
        parameters_trainable=count.trainable,
        examples_new=len(whole.new),
        examples_replayed=len(whole.replayed),
        examples_held_out=len(whole.held_out),
        examples_known=whole.num_left_out,
        examples_without_loss=round(batches.num_left_out * scale),
        examples_rendered=len(prepared.selection.train),
        duplicates=whole.num_duplicates,
        formats=whole.formats,
        tokens=round(batches.tokens * scale),
        tokens_trained=round(batches.tokens_trained * scale),
        tokens_by_role=tokens_by_role(rendered, scale),
        cut_share=sum(r.cut_tokens for r in rendered) / max(1, all_tokens),
        cut_trained_share=cut_trained / max(1, cut_trained + batches.tokens_trained),
        cut_examples=round(len(cuts) * scale),
        cuts=cuts[:LISTED_CUTS],
        epochs=recipe.train.epochs,
        steps_per_epoch=steps_per_epoch,
        steps_total=steps_total,
        dtype=prepared.dtype.why,
        device=task.device.type,
        num_threads=prepared.num_threads,
        expected_peak_bytes=cost.total,
        expected_seconds=batches.tokens * scale / probe.tokens_per_second * steps_total / max(1, steps_per_epoch),
        measured_batches=probe.batches,
        measured_tokens_per_second=probe.tokens_per_second,
        disk_needed_bytes=disk_needed(prepared, count.total, count.trainable),
        disk_free_bytes=disk_free(home.path),
        notes=_notes(prepared, whole),
        loss_masks=[
            loss_mask(prepared.loaded.tokenizer, r.input_ids, r.weights, r.roles) for r in rendered[:PREVIEWED_EXAMPLES]
        ],
    )


def tokens_by_role(rendered: list[Rendered], scale: float = 1.0) -> dict[str, RoleTokens]:
    """Count the tokens of each role, and those that carry loss, times `scale`; most frequent role first."""
    tokens: Counter[str] = Counter()
    trained: Counter[str] = Counter()
    for document in rendered:
        tokens.update(document.roles)
        trained.update(role for role, weight in zip(document.roles, document.weights, strict=True) if weight > 0)
    return {
        role: RoleTokens(round(count * scale), round(trained[role] * scale)) for role, count in tokens.most_common()
    }


def _cuts(prepared: PreparedFinetune) -> list[Cut]:
    """The examples that lose something, those that lose most of their answer first. Texts are split, never cut."""
    rendered_data = prepared.rendered_data
    cuts = [
        Cut(
            f"{example.source or 'an example'}:{example.line}",
            r.cut_tokens / (len(r.input_ids) + r.cut_tokens),
            r.cut_trained / max(1, r.cut_trained + r.trained_tokens),
        )
        for example, r in zip(rendered_data.chat_examples, rendered_data.chats, strict=True)
        if r.cut_tokens
    ]
    return sorted(cuts, key=lambda cut: (-cut.trained_share, -cut.share, cut.where))


def _notes(prepared: PreparedFinetune, whole: Selection) -> list[str]:
    path = prepared.task.path
    rendered, there = len(prepared.selection.train), len(whole.train)
    return [
        note
        for note in (
            ""
            if rendered == there
            else f"{rendered:,} of {there:,} examples were rendered: counts of tokens, cuts and steps are estimates.",
            path.why_padded and f"Documents are padded, not packed: {path.why_padded}.",
            path.why_padded and "Nor can such a model be examined or served here: the gate of its candidate will fail.",
            path.why_own_logits and f"All logits are computed: {path.why_own_logits}.",
            "" if prepared.held_out else "Nothing is held out, so no held-out loss is taken.",
        )
        if note
    ]


def render_plan(plan: Plan | PretrainPlan, console: Console) -> None:
    """Print the plan for people."""
    if isinstance(plan, PretrainPlan):
        render_pretrain_plan(plan, console)
        return
    console.print(Text(f"Plan: {plan.name} by method {plan.method} from {plan.base}", style="bold"), highlight=False)
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    for label, value in _facts(plan):
        table.add_row(label, value)
    console.print(table)
    for cut in plan.cuts:
        console.print(
            Text(f"  cut: {cut.where} loses {cut.share:.0%} of its tokens, {cut.trained_share:.0%} of its answer")
        )
    for note in plan.notes:
        console.print(Text(f"  {note}"))
    colour = console.color_system is not None and not console.no_color
    how = "bold green is trained, dim is context" if colour else "▏between bars▕ is trained, the rest is context"
    console.print(Text(f"Loss mask of the first examples ({how}):"))
    for spans in plan.loss_masks:
        console.print(render_mask(spans, colour=colour), soft_wrap=True)
        console.print()


def _facts(plan: Plan) -> list[tuple[str, str]]:
    roles = ", ".join(f"{role} {r.trained:,} of {r.tokens:,}" for role, r in plan.tokens_by_role.items())
    formats = "; ".join(f"{source}: {', '.join(names)}" for source, names in plan.formats.items())
    minutes, seconds = divmod(round(plan.expected_seconds), 60)
    return [
        ("parameters", f"{plan.parameters_total:,}, of which {plan.parameters_trainable:,} learn"),
        (
            "examples",
            f"{plan.examples_new} new, {plan.examples_replayed} replayed, {plan.examples_held_out} held out; "
            f"{plan.examples_known} known already, {plan.duplicates} duplicates, {plan.examples_without_loss} without loss",
        ),
        *([("formats", formats)] if formats else []),
        ("tokens", f"{plan.tokens:,} an epoch, of which {plan.tokens_trained:,} carry loss ({roles})"),
        (
            "cut",
            f"{plan.cut_share:.1%} of all tokens, {plan.cut_trained_share:.1%} of those that would carry loss, "
            f"in {plan.cut_examples} examples",
        ),
        ("steps", f"{plan.steps_total} in all, {plan.steps_per_epoch} an epoch"),
        ("computes", f"on {plan.device} with {plan.num_threads} threads in {plan.dtype}"),
        ("peak", f"about {format_bytes(plan.expected_peak_bytes)} of tensors"),
        (
            "time",
            f"about {minutes} min {seconds} s, {Probe(plan.measured_batches, plan.measured_tokens_per_second).how} "
            f"({plan.measured_tokens_per_second:,.0f} tokens/s)",
        ),
        ("disk", f"{format_bytes(plan.disk_needed_bytes)} needed at most, {format_bytes(plan.disk_free_bytes)} free"),
    ]
