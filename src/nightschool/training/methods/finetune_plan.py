"""What a plan says of a run of fine-tuning: its examples, tokens and cuts, what is rehearsed and checked beside them."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Any

from nightschool.data.chat.loss_mask_preview import loss_mask
from nightschool.data.chat.rendered_data import tokens_by_role
from nightschool.training.loop import steps_in_epoch
from nightschool.training.methods.prepared import MethodPlan
from nightschool.training.optimizer_8bit import NO_PAGES
from nightschool.training.planning.plan_row import PlanRow
from nightschool.training.planning.study_rows import objective_rows, study_notes, study_rows
from nightschool.training.rehearsal import answers_beside, by_source

if TYPE_CHECKING:
    from nightschool.training.methods.finetune import Finetune

PREVIEWED_EXAMPLES = 3
LISTED_CUTS = 10


@dataclass(frozen=True)
class Cut:
    """An example that is longer than train.max_seq_len. `where` is `file:line`; `share` is of all its tokens."""

    where: str
    share: float
    trained_share: float


def finetune_plan(run: Finetune) -> MethodPlan:
    """What a plan says of a run of fine-tuning besides what it says of all."""
    train, batches, whole = run.recipe.train, run.task.batches, run.data.whole
    # A plan takes a sample of many examples, and scales what it finds of it.
    scale = len(whole.train) / max(1, len(run.data.selection.train))
    per_epoch = steps_in_epoch(round(batches.num_batches(0) * scale), train.accumulation_steps)
    steps_total = run.budget.steps_total
    if whole is not run.data.selection:
        steps_total = train.max_steps or per_epoch * train.epochs
    formats = "; ".join(f"{source}: {', '.join(names)}" for source, names in whole.formats.items())
    cuts = _cuts(run)
    rows = [
        _examples(run, scale),
        *(study_rows(whole, run.recipe.study, run.data.written) if _is_studied(run) else []),
        PlanRow("formats" if formats else "", formats, {"formats": whole.formats}),
        _tokens(run, scale),
        _row_of_cuts(run, scale, cuts),
        PlanRow(
            "steps",
            f"{steps_total} in all, {per_epoch} an epoch",
            {"epochs": train.epochs, "steps_per_epoch": per_epoch, "steps_total": steps_total},
        ),
        *_rehearsed(run, scale),
        *_spot_checks(run),
        *(objective_rows(run.data.lessons, run.task.teacher) if run.data.lessons is not None else []),
    ]
    return MethodPlan(
        rows=rows,
        tokens_computed=batches.tokens * scale * steps_total / max(1, per_epoch),
        steps_total=steps_total,
        largest_batch_tokens=max(
            batches.get(0, index).input_ids.shape[-1] for index in range(min(64, batches.num_batches(0)))
        ),
        loss_masks=[
            loss_mask(run.loaded.tokenizer, r.input_ids, r.weights, r.roles)
            for r in run.data.rendered.all[: PREVIEWED_EXAMPLES * run.documents_per_example]
        ],
        masked=run.noun,
        findings=[
            f"cut: {each.where} loses {each.share:.0%} of its tokens, {each.trained_share:.0%} of its answer"
            for each in cuts[:LISTED_CUTS]
        ],
        notes=[
            *_notes(run),
            *(study_notes(whole, run.recipe.name) if _is_studied(run) else []),
            *(run.data.rehearsed.chosen.notes if run.data.rehearsed is not None else ()),
        ],
    )


def _examples(run: Finetune, scale: float) -> PlanRow:
    whole = run.data.whole
    facts = {
        "examples_new": len(whole.new),
        "examples_replayed": len(whole.replayed),
        "examples_general": len(whole.general),
        "examples_held_out": len(whole.held_out),
        "examples_known": whole.num_left_out,
        "examples_without_loss": round(run.task.batches.num_left_out * scale),
        "examples_rendered": len(run.data.selection.train),
        "duplicates": whole.num_duplicates,
    }
    text = (
        "{examples_new} new, {examples_replayed} replayed, {examples_general} general, {examples_held_out} held out; "
        "{examples_known} known already, {duplicates} duplicates, {examples_without_loss} without loss"
    )
    return PlanRow(run.noun, text.format(**facts), facts)


def _tokens(run: Finetune, scale: float) -> PlanRow:
    batches, by_role = run.task.batches, tokens_by_role(run.data.rendered.all, scale)
    tokens, trained = round(batches.tokens * scale), round(batches.tokens_trained * scale)
    roles = ", ".join(f"{role} {r.trained:,} of {r.tokens:,}" for role, r in by_role.items())
    text = f"{tokens:,} an epoch, of which {trained:,} carry loss ({roles})"
    return PlanRow("tokens", text, {"tokens": tokens, "tokens_trained": trained, "tokens_by_role": by_role})


def _row_of_cuts(run: Finetune, scale: float, cuts: list[Cut]) -> PlanRow:
    rendered = run.data.rendered.all
    all_tokens = sum(len(r.input_ids) + r.cut_tokens for r in rendered)
    cut_trained = sum(r.cut_trained for r in rendered)
    facts: dict[str, Any] = {
        "cut_share": sum(r.cut_tokens for r in rendered) / max(1, all_tokens),
        "cut_trained_share": cut_trained / max(1, cut_trained + run.task.batches.tokens_trained),
        "cut_examples": round(len(cuts) * scale),
        "cuts": cuts[:LISTED_CUTS],
    }
    text = "{cut_share:.1%} of all tokens, {cut_trained_share:.1%} of those that would carry loss, in {cut_examples} examples"
    return PlanRow("cut", text.format(**facts), facts)


def _rehearsed(run: Finetune, scale: float) -> list[PlanRow]:
    rehearsed, rehearsal = run.data.rehearsed, run.task.rehearsal
    if rehearsed is None:
        return []
    asked, batches = rehearsed.first(run.room), run.task.batches.num_batches(0)
    beside = answers_beside(run.recipe.rehearse.ratio, len(run.data.selection.train) / max(1, batches))
    source = rehearsal or rehearsed.stand_in(run.loaded.tokenizer)
    more, trained = source.expected_tokens(round(beside * batches * scale))
    facts = {
        "prompts_rehearsed": len(asked),
        "prompts_by_source": dict(Counter(one.source for one in asked)),
        "tokens_rehearsed": more,
        "tokens_rehearsed_trained": trained,
    }
    text = (
        f"answers of {run.loaded.ref} to {by_source(asked)}, at most {more:,} tokens an epoch, of which "
        f"{trained:,} are learned from"
    )
    return [PlanRow("rehearsed", text, facts)]


def _is_studied(run: Finetune) -> bool:
    """Whether a plan has something to say of forms, or of what contradicts or waits."""
    whole = run.data.whole
    return bool(whole.forms or whole.contradictions or whole.num_waiting or run.recipe.study.write in ("self", "both"))


def _spot_checks(run: Finetune) -> list[PlanRow]:
    checked, enough = run.data.checked, run.budget.enough
    if checked is None or enough is None:
        return []
    facts = {"questions_checked": len(checked.questions), "prompts_checked": len(checked.prompts)}
    every = run.recipe.train.early_stopping.every
    text = "{questions_checked} questions and {prompts_checked} open prompts every ".format(**facts)
    return [PlanRow("spot checks", f"{text}{every}; the run ends at {enough.text}", facts)]


def _cuts(run: Finetune) -> list[Cut]:
    """The examples that lose something, those that lose most of their answer first. Texts are split, never cut."""
    documents = iter(run.data.rendered.chats)
    cuts = [
        Cut(
            f"{example.source or 'an example'}:{example.line}",
            r.cut_tokens / (len(r.input_ids) + r.cut_tokens),
            r.cut_trained / max(1, r.cut_trained + r.trained_tokens),
        )
        for example in run.data.rendered.chat_examples
        for r in islice(documents, run.documents_per_example)
        if r.cut_tokens
    ]
    return sorted(cuts, key=lambda cut: (-cut.trained_share, -cut.share, cut.where))


def _notes(run: Finetune) -> list[str]:
    path, stopping = run.task.path, run.recipe.train.early_stopping
    rendered, there = len(run.data.selection.train), len(run.data.whole.train)
    notes = (
        ""
        if rendered == there
        else f"{rendered:,} of {there:,} examples were rendered: counts of tokens, cuts and steps are estimates.",
        path.why_padded and f"Documents are padded, not packed: {path.why_padded}.",
        path.why_padded and "Nor can such a model be examined or served here: the gate of its candidate will fail.",
        path.why_own_logits and f"All logits are computed: {path.why_own_logits}.",
        run.task.note_on_experts,
        "" if run.data.held_out else "Nothing is held out, so no held-out loss is taken.",
        NO_PAGES if run.recipe.train.optimizer == "paged_adamw_8bit" and run.task.device.type != "cuda" else "",
        "train.early_stopping needs a held-out loss, and there is none: the run ends at its last step."
        if stopping.patience and not stopping.every and not run.data.held_out
        else "",
        "train.early_stopping.every: the gate could ask nothing of what is new, so nothing is spot-checked."
        if stopping.every and run.data.checked is None
        else "",
    )
    return [note for note in notes if note]
