"""Method `memory`: a frozen base learns to find and to read the entries of an explicit memory.

Three stages, one after the other or each for itself: `router` teaches the gate where entries lie, and what fits; `fusion` teaches
the reader, with a gate that stays; `joint` teaches both, the gate also by what the reader makes of its scores.

In each micro-batch the values are drawn anew (`data.memory_batches`), so that reading is the only way to lower the loss. Where the
right entry is not among the candidates, the target is what the base itself would say.

d  documents of a micro-batch    e  its entries    N  tokens of its row    k  candidates of a document
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, cast

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from nightschool.config.recipe import Memory, Recipe
from nightschool.data.batches import IGNORED, Batch
from nightschool.data.chat.render import ensure_template
from nightschool.data.chat.rendered_data import RenderedData, refuse_nothing_to_train
from nightschool.data.example import Example
from nightschool.data.memory_batches import MemoryBatch, MemoryBatches, MemoryDraw
from nightschool.data.memory_examples import FactRanges, entry_ids
from nightschool.errors import DataError, ModelError, NotFound, NothingToTrain, UsageError
from nightschool.layers.attention import lay_out
from nightschool.layers.forward import forward_hidden
from nightschool.layers.loss import chunked_token_losses
from nightschool.layers.memory_fit import PaddedTexts
from nightschool.layers.memory_fusion import copied_log_probs
from nightschool.layers.memory_gate import GateFeatures, reading_scores
from nightschool.layers.memory_reading import Candidate, MemoryReading
from nightschool.layers.memory_relation import ASKED_TOKENS, Told, places_asked, places_told
from nightschool.memory.store import MemoryStore
from nightschool.models.load import LoadedModel
from nightschool.models.memory_model import MemoryModel
from nightschool.models.memory_modules import MemoryModules, shape_for
from nightschool.models.memory_version import MemoryVersion, prove_memory_folder, save_memory_folder
from nightschool.models.version_folder import OnWritten
from nightschool.store.names import check_name, full_name, memory_path, split_name
from nightschool.store.versions import VersionKind
from nightschool.training.checkpoint.full_state import frozen_fingerprint
from nightschool.training.methods.figures_task import FiguresTask
from nightschool.training.methods.finetune import (
    HELD_OUT_TOKENS_PER_BATCH,
    Finetune,
    FinetuneData,
)
from nightschool.training.methods.prepared import MethodPlan, Setup
from nightschool.training.nearest_facts import nearest_facts
from nightschool.training.planning.plan_row import PlanRow
from nightschool.training.remembered_facts import as_remembered

FIGURES = ("loss_ce", "loss_sentinel", "loss_kept", "loss_similarity", "loss_diversity", "copied", "loss_fit")
# Of the contrast between candidates.
_TEMPERATURE = 0.05
# What is said with the sentinel at places where there is nothing to read counts half as much as what is read.
_SENTINEL_COEF = 0.5
# Of the entries that a question does not mean, so many that seem to fit it best.
_HARDEST = 4


class MemoryTask(FiguresTask):
    """Examples with what they may read. A loss is a mean over places that are learned or are to stay."""

    names: ClassVar[tuple[str, ...]] = FIGURES

    def __init__(self, memory: Memory, model: MemoryModel, *arguments: Any, **settings: Any) -> None:
        super().__init__(model, *arguments, **settings)
        self.memory_revision: int | None = None
        self._memory = memory
        self._reads = model
        self._features = GateFeatures(cast(Any, model.get_input_embeddings()).weight)
        if self.path.why_padded:
            raise ModelError(
                f"method: memory reads in packed rows, and this base cannot keep documents apart: {self.path.why_padded}."
            )

    def _forward(self, batch: Batch) -> tuple[Tensor, int]:
        batch = cast(MemoryBatch, batch)
        states = self._states(batch)
        subjects_de, relations_de, addresses = self._cosines(batch)
        similarity = self._similarity(batch, subjects_de, relations_de)
        scores_de = reading_scores(subjects_de, relations_de)
        diversity = _diversity(batch, scores_de, addresses)
        nothing = scores_de.sum() * 0.0
        parts = [nothing] * 3
        copied = nothing
        stage = self._memory.stage
        named_de, meant_de = self._named(batch), self._meant(batch, states)
        fit = self._fit_loss(batch, 0, named_de) + self._fit_loss(batch, 1, meant_de)
        total = similarity + self._memory.diversity_loss_coef * diversity + fit
        if stage != "router":
            ce, sentinel, kept, copied = self._read(
                batch, scores_de, F.logsigmoid(named_de) + F.logsigmoid(meant_de), states
            )
            parts = [ce, sentinel, kept]
            total = ce + _SENTINEL_COEF * sentinel + kept + fit
            if stage == "joint":
                total = (
                    total
                    + self._memory.similarity_loss_coef * similarity
                    + self._memory.diversity_loss_coef * diversity
                )
        units = batch.loss_units
        if batch.is_idle:
            return total * 0.0, 0
        figures = torch.stack([part.detach() for part in (*parts, similarity, diversity, copied, fit)])
        self._note(figures * units)
        return total * units, units

    # --- the gate -----------------------------------------------------------------------------------------------------

    def _cosines(self, batch: MemoryBatch) -> tuple[Tensor, Tensor, Tensor]:
        """Subject and relation cosines [d, e] of questions and entries, and the addresses of these [e, 2·half]."""
        gate = self._reads.memory.gate
        # In fp32: the contrast divides cosines by a small temperature, and 16 bits would be seen.
        learns = torch.is_grad_enabled() and self._memory.stage != "fusion"
        with torch.set_grad_enabled(learns), torch.autocast(self.device.type, enabled=False):
            asked = self._texts(batch.question_ids)
            subjects = gate.subject(*self._texts([entry.subject_ids for entry in batch.entries]))
            relations = gate.relation(*self._texts([entry.relation_ids for entry in batch.entries]))
            return (
                gate.subject(*asked) @ subjects.T,
                gate.relation(*asked) @ relations.T,
                torch.cat([subjects, relations], 1),
            )

    def _texts(self, texts: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor, list[int]]:
        ids = torch.tensor([token for text in texts for token in text], device=self.device)
        features, log_priors = self._features(ids)
        return features, log_priors, [len(text) for text in texts]

    def _similarity(self, batch: MemoryBatch, subjects_de: Tensor, relations_de: Tensor) -> Tensor:
        """InfoNCE over all entries of the micro-batch: of each head alone, where alike is right, and of both together."""
        answered = [number for number, right in enumerate(batch.right) if right >= 0]
        if not answered:
            return subjects_de.sum() * 0.0
        logits = (subjects_de + relations_de)[answered] / _TEMPERATURE
        loss = -(self._shares(batch, logits.shape[1])[answered] * logits.log_softmax(dim=1)).sum(dim=1).mean()
        for head, cosines in enumerate((subjects_de, relations_de)):
            keys = [entry.keys[head] for entry in batch.entries]
            alike = torch.tensor([[key == keys[batch.right[n]] for key in keys] for n in answered], device=self.device)
            log_probs = (cosines[answered] / _TEMPERATURE).log_softmax(dim=1)
            loss = loss - log_probs.masked_fill(~alike, -torch.inf).logsumexp(dim=1).mean()
        return loss / 3

    def _shares(self, batch: MemoryBatch, entries: int) -> Tensor:
        """How much of what a question means is each entry, [d, e]."""
        shares_de = torch.zeros(len(batch.question_ids), entries, device=self.device)
        for question, likely in enumerate(batch.likely):
            for number, share in likely:
                shares_de[question, number] += share
        return shares_de

    # --- the reader ---------------------------------------------------------------------------------------------------

    def _states(self, batch: MemoryBatch) -> dict[tuple[int, ...], Tensor]:
        """What the base makes of the entries of a micro-batch that have an address, and of what is asked; each text once."""
        texts = {entry.ids for entry in batch.entries if entry.has_address}
        texts |= {ids[-ASKED_TOKENS:] for ids in batch.question_ids}
        ordered = sorted(texts)
        return dict(zip(ordered, self._reads.encoder.states_of(ordered), strict=True))

    def _named(self, batch: MemoryBatch) -> Tensor:
        """Log-odds [d, e] that questions name the subjects of entries."""
        with torch.autocast(self.device.type, enabled=False):
            texts = (
                batch.question_ids,
                [entry.subject_ids for entry in batch.entries],
                [entry.relation_ids for entry in batch.entries],
            )
            padded = [PaddedTexts.of(self._features, one, self.device) for one in texts]
            logits: Tensor = self._reads.memory.reader.subject_fit(*padded)
            return logits

    def _meant(self, batch: MemoryBatch, states: Mapping[tuple[int, ...], Tensor]) -> Tensor:
        """Log-odds [d, e] that entries tell what questions ask, whosoever they are about."""
        questions = [question[-ASKED_TOKENS:] for question in batch.question_ids]
        names = [batch.entries[n].subject_ids if n >= 0 else () for n in batch.own[: len(questions)]]
        asked = [(states[ids][1:], places_asked(ids, name)) for ids, name in zip(questions, names, strict=True)]
        addressed = [n for n, entry in enumerate(batch.entries) if entry.has_address]
        meant_de = torch.zeros(len(questions), len(batch.entries), device=self.device)
        if not addressed:
            return meant_de
        entries = [batch.entries[n] for n in addressed]
        told = [(states[e.ids][1:], places_told(e.ids, e.subject_ids, e.told)) for e in entries]
        with torch.autocast(self.device.type, enabled=False):
            views = [Told.of(*zip(*one, strict=True)) for one in (asked, told)]
            return meant_de.index_copy(
                1, torch.tensor(addressed, device=self.device), self._reads.memory.reader.relation_fit(*views)
            )

    def _fit_loss(self, batch: MemoryBatch, half: int, fits_de: Tensor) -> Tensor:
        """Of each question the entry that is its own, and of the others those that seem to fit best; each half as heavy.

        Halves, so that what tells nothing makes all entries as likely as not, and closes none. `half` of an address, 0 the
        subject and 1 the relation, says which entries are others.
        """
        addressed = torch.tensor([entry.has_address for entry in batch.entries], device=self.device)
        keys = [entry.keys[half] for entry in batch.entries]
        own = list(batch.own[: len(batch.question_ids)])
        alike = torch.tensor([[n >= 0 and key == keys[n] for key in keys] for n in own], device=self.device)
        # What a label finds about as likely as the best may fit, too.
        shares_de = self._shares(batch, len(keys))
        alike = alike | ((shares_de > shares_de.amax(dim=1, keepdim=True) / 2) & (shares_de > 0))
        loss = fits_de.sum() * 0.0
        answered = [row for row, n in enumerate(own) if n >= 0 and batch.entries[n].has_address]
        if answered:
            loss = loss + F.softplus(-fits_de[answered, [own[row] for row in answered]]).mean() / 2
        others = fits_de.masked_fill(alike | ~addressed, -torch.inf)
        hardest = others.topk(min(_HARDEST, len(keys)), dim=1).values
        hardest = hardest[hardest.isfinite()]
        return loss + F.softplus(hardest).mean() / 2 if len(hardest) else loss

    def _read(
        self, batch: MemoryBatch, scores_de: Tensor, fits_de: Tensor, states: Mapping[tuple[int, ...], Tensor]
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The means of: loss of what is read; of the sentinel where nothing is; of what is to stay; the share that was copied."""
        layout = lay_out(batch.cu_seqlens, self.device)
        order = torch.arange(layout.num_tokens, device=self.device) if layout.restore is None else layout.restore
        bounds = batch.cu_seqlens.tolist()
        documents = [number for number, found in enumerate(batch.candidates) if found]
        # Keys and values of a prompt stay the base's own: only what predicts the answer reads.
        starts = [bounds[number] + batch.reads_from[number] for number in documents]
        spans = [
            (order[start : bounds[number + 1]], self._reading(batch, number, scores_de, fits_de))
            for number, start in zip(documents, starts, strict=True)
        ]
        self._reads.encoder.encode([reading for _, reading in spans], states)
        with self._reads.reading(spans) as traces:
            hidden, head = forward_hidden(self.model, self.path, batch)
        labels = batch.labels[0]
        # Where nothing is read, all is left to the base.
        sentinel = hidden.new_zeros(len(labels), dtype=torch.float32)
        copied = sentinel.new_full((len(labels),), -torch.inf)
        reads = torch.zeros(len(labels), dtype=torch.bool, device=self.device)
        for number, start, trace in zip(documents, starts, traces, strict=True):
            places = torch.arange(start, bounds[number + 1], device=self.device)
            sentinel = sentinel.index_copy(0, places, trace.pointed.sentinel)
            copied = copied.index_copy(0, places, copied_log_probs(trace.pointed, trace.token_ids, labels[places]))
            reads[places] = True
        learned = (labels != IGNORED).nonzero().squeeze(1)
        ce, share = sentinel.sum() * 0.0, sentinel.sum() * 0.0
        if len(learned):
            of_base = chunked_token_losses(hidden[learned], head, labels[learned])
            log_probs = torch.logaddexp(sentinel[learned] - of_base, copied[learned])
            weights = batch.weights[0][learned]
            ce = -(log_probs * weights).sum() / weights.sum()
            share = (copied[learned] - log_probs).exp().mean()
        silent = reads & (labels == IGNORED)
        closed = -sentinel[silent].mean() if bool(silent.any()) else sentinel.sum() * 0.0
        kept = sentinel.sum() * 0.0
        if len(batch.places):
            with torch.no_grad():
                own = head(hidden[batch.twins]).float().log_softmax(-1)
            read = head(hidden[batch.places]).float().log_softmax(-1)
            kept = F.kl_div(read, own, reduction="batchmean", log_target=True) - sentinel[batch.places].mean()
        return ce, closed, kept, share

    def _reading(self, batch: MemoryBatch, number: int, scores_de: Tensor, fits_de: Tensor) -> MemoryReading:
        found = batch.candidates[number]
        reading = MemoryReading.of((Candidate(str(n), n, batch.entries[n].ids, 0.0) for n in found), self.device)
        scores = scores_de[number, list(reading.rows)]
        addressed = torch.tensor([batch.entries[row].has_address for row in reading.rows], device=self.device)
        fits = torch.where(addressed, fits_de[number, list(reading.rows)], 0.0)
        if batch.misled[number] >= 0:
            # Neither score nor fit warns: what reads has to see for itself.
            wrong = torch.tensor([row == batch.misled[number] for row in reading.rows], device=self.device)
            scores, fits = torch.where(wrong, 1.0, scores), torch.where(wrong, 0.0, fits)
        reading.scores, reading.fits = scores, fits
        return reading


def _diversity(batch: MemoryBatch, scores_de: Tensor, addresses_ef: Tensor) -> Tensor:
    """How alike the addresses of candidates are, in pairs, each pair as heavy as the gate finds both likely; 0 where there are none."""
    alike = addresses_ef @ addresses_ef.T / 2  # of two unit vectors each
    alike = alike - torch.diag(alike.diagonal())
    found_de = torch.zeros(scores_de.shape, dtype=torch.bool, device=scores_de.device)
    for number in range(len(batch.question_ids)):
        found_de[number, list(batch.candidates[number])] = True
    several = found_de.sum(dim=1) > 1
    if not bool(several.any()):
        return scores_de.sum() * 0.0
    logits = (scores_de / _TEMPERATURE).masked_fill(~found_de, -torch.inf)[several]
    weights = logits.softmax(dim=1)
    return ((weights @ alike) * weights).sum(dim=1).mean()


def _revision_of(setup: Setup) -> int | None:
    """The revision of the memory that a run is for, as it begins or goes on; None where there is no such memory yet."""
    name = setup.recipe.memory.name
    if name is None:
        return None
    tenant, _ = split_name(setup.recipe.name)
    try:
        with MemoryStore.open(memory_path(setup.home, full_name(tenant, check_name(name, what="memory")))) as store:
            return store.revision
    except NotFound:
        return None


@dataclass(frozen=True, kw_only=True)
class MemoryTraining(Finetune):
    """Training of memory modules that is ready to start."""

    task: MemoryTask

    loss_unit: ClassVar[str] = "places"

    @classmethod
    def load(cls, recipe: Recipe, load: Callable[..., LoadedModel]) -> LoadedModel:
        """The base, frozen, with the modules of the version that it was named by, or fresh ones."""
        if recipe.base.startswith("new:"):
            raise UsageError(
                f"method: memory needs a base that speaks, and base: {recipe.base} is made of random weights. Train it first "
                "(method: full), and write its name as the base."
            )
        if recipe.train.gradient_checkpointing:
            raise UsageError("train.gradient_checkpointing would run layers again without what they read. Write false.")
        loaded = load()
        memory, base = recipe.memory, cast(Any, loaded.model)
        wanted: dict[str, Any] = {
            "encoder_layers": memory.encoder_layers,
            "fusion_layers": memory.fusion_layers,
            "knowledge_dim": memory.knowledge_dim,
            "gate_rank": memory.gate_rank or 0,
            "fusion_rank": memory.fusion_rank or 0,
        }
        modules = loaded.memory
        if modules is None:
            modules = MemoryModules(shape_for(base, loaded.tokenizer, **wanted), seed=recipe.train.seed)
        else:
            has = modules.shape.to_json()
            differing = [name for name, value in wanted.items() if value is not None and has[name] != value]
            if differing:
                raise ModelError(
                    f"{loaded.ref} was trained with "
                    + ", ".join(f"memory.{name}={json.dumps(has[name])}" for name in differing)
                    + ". Write the same, or start from its base."
                )
        modules.shape = replace(
            modules.shape,
            subject_closed_below=memory.subject_closed_below,
            relation_closed_below=memory.relation_closed_below,
        )
        model = MemoryModel(base, modules)
        model.memory.gate.requires_grad_(memory.stage != "fusion")
        model.memory.reader.requires_grad_(memory.stage != "router")
        # What fits is told before anything is read, so the stage in which nothing is read teaches it, too.
        for fit in (model.memory.reader.subject_fit, model.memory.reader.relation_fit):
            fit.requires_grad_(True)  # noqa: FBT003 - its only argument
        return replace(loaded, model=cast(Any, model), memory=modules)

    @classmethod
    def make_task(
        cls, setup: Setup, data: FinetuneData, loaded: LoadedModel, compute_dtype: torch.dtype
    ) -> tuple[FinetuneData, MemoryTask]:
        """Draw the examples into micro-batches.

        Raises:
            NothingToTrain: If no token would carry loss.
            DataError: If no example has a fact, or an entry is longer than `memory.knowledge_length`.
        """
        recipe, tokenizer = setup.recipe, loaded.tokenizer
        train, memory = recipe.train, recipe.memory
        ensure_template(tokenizer)
        examples = [as_remembered(example) for example in data.selection.train]
        _refuse_labels(examples, memory.stage)
        _refuse_facts(examples, tokenizer, memory.knowledge_length)
        size: dict[str, Any] = {"batch_size": train.batch_size, "tokens_per_batch": None}
        if train.tokens_per_batch is not None:
            size = {"batch_size": None, "tokens_per_batch": train.tokens_per_batch}
        draw = MemoryDraw(memory.irrelevant_share, memory.misled_share, memory.num_candidates, memory.redraw_values)
        ranges = FactRanges.of(examples)
        # Where the gate begins, so that a run that goes on draws the same.
        nearest = None
        if memory.stage != "router":
            nearest = partial(nearest_facts, cast(Any, loaded.model), tokenizer, ranges)
        batches = MemoryBatches(
            examples,
            tokenizer,
            draw,
            max_seq_len=train.max_seq_len,
            ranges=ranges,
            nearest=nearest,
            seed=train.seed,
            **size,
        )
        refuse_nothing_to_train(batches.rendered, train.max_seq_len, train.max_cut_share)
        task = MemoryTask(
            memory, cast(Any, loaded.model), batches, train, compute_dtype=compute_dtype, world=setup.world
        )
        task.memory_revision = _revision_of(setup)
        held_out = None
        if data.selection.held_out:
            try:
                held_out = MemoryBatches(
                    [as_remembered(example) for example in data.selection.held_out], tokenizer, draw, max_seq_len=train.max_seq_len, seed=0, batch_size=None,
                    tokens_per_batch=HELD_OUT_TOKENS_PER_BATCH,
                )  # fmt: skip
            except NothingToTrain:
                held_out = None
        whole = RenderedData(examples, batches.rendered, [])
        return replace(data, rendered=whole, held_out=held_out), task

    def plan_rows(self, num_processes: int) -> MethodPlan:
        """With the layers that read, and how many numbers learn."""
        plan = super().plan_rows(num_processes)
        model = cast(MemoryModel, self.task.model)
        shape, facts = model.memory.shape, sum(e.fact is not None for e in self.data.selection.train)
        learns = sum(parameter.numel() for parameter in self.task.trainable().values())
        text = (
            f"stage {self.recipe.memory.stage}: entries after {shape.encoder_layers} layers, read at "
            f"{', '.join(map(str, shape.fusion_layers))}; {learns:,} numbers learn; {facts} examples need a fact"
        )
        row = PlanRow("memory", text, {"memory": shape.to_json(), "memory_learns": learns, "examples_with_fact": facts})
        return replace(plan, rows=[row, *plan.rows])

    def numerics(self) -> dict[str, Any]:
        settings = self.recipe.memory.model_dump(mode="json").items()
        return super().numerics() | {f"memory.{key}": value for key, value in settings if key != "name"}

    def base_fingerprint(self) -> str | None:
        return frozen_fingerprint(self.task.model)

    @property
    def version_kind(self) -> VersionKind:
        return "memory"

    @property
    def stands_on(self) -> str:
        return self.loaded.base_ref

    def write_version(self, folder: Path, on_written: OnWritten | None = None) -> float:
        version = MemoryVersion(self.loaded.base_ref, self.recipe.memory.name, self.task.memory_revision)
        modules = cast(MemoryModel, self.task.model).memory
        save_memory_folder(modules, version, self.loaded.tokenizer, folder)
        if on_written is not None:
            on_written(folder)
        return prove_memory_folder(modules, version, folder)


def _refuse_labels(examples: Sequence[Example], stage: str) -> None:
    """Raise DataError if labelled questions are among the examples of a stage that learns to read."""
    labelled = next((example for example in examples if example.targets), None)
    if labelled is not None and stage != "router":
        raise DataError(
            f"{labelled.source}:{labelled.line}: this row says which facts a question means, which memory.stage: router learns from, and "
            f"has no answer, which memory.stage: {stage} needs. Write rows with an answer and its fact: nightschool memory label --facts "
            "makes them of conversations."
        )


def _refuse_facts(examples: Sequence[Example], tokenizer: Any, most: int) -> None:
    """Raise DataError if no example has a fact, or one has an entry of more than `most` tokens."""
    if not any(example.fact is not None for example in examples):
        raise DataError(
            "No example says which fact it needs, so there is nothing to learn to read. Write a fact beside the answer: "
            '"fact": {"subject": "Ada", "relation": "lives in", "value": "Oslo"}.'
        )
    # Of labelled questions nothing is read.
    read = [(example, example.fact) for example in examples if example.fact is not None and not example.targets]
    for example, fact in read:
        length = len(entry_ids(tokenizer, fact))
        if length > most:
            raise DataError(
                f"{example.source}:{example.line}: the entry {fact.text[:60]!r} has {length} tokens, and memory.knowledge_length is "
                f"{most}. Raise it (64 at most), or say less in one fact."
            )
