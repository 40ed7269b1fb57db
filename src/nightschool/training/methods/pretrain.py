"""Method `pretrain`: all weights, from token shards, and the figures that are written down beside the loss."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from nightschool.config.recipe import Recipe
from nightschool.config.train import Lora
from nightschool.data.batches import Batch
from nightschool.data.chat.loss_mask_preview import Span, loss_mask
from nightschool.data.example import Example
from nightschool.data.shards.shard_sources import ShardSource, open_shards
from nightschool.data.shards.shards import check_index
from nightschool.data.shards.token_batches import TokenBatches
from nightschool.data.shards.tokenize import end_of_text_id, tokenizer_fingerprint
from nightschool.errors import Damaged, DataError, ModelError, UsageError
from nightschool.feedback.selection import Selection, select_shards
from nightschool.feedback.selection_files import read_selection, write_selection
from nightschool.models.cost import flops_per_token
from nightschool.models.load import LoadedModel, find_tokenizer, load_tokenizer
from nightschool.models.peak import peak_flops
from nightschool.store.home import Home
from nightschool.training.causal_task import CausalTask
from nightschool.training.continuation import continuation
from nightschool.training.loop import steps_in_epoch
from nightschool.training.methods.prepared import MethodPlan, PreparedRun, Setup
from nightschool.training.planning.plan_row import PlanRow
from nightschool.training.state import TrainState

SAMPLE_PROMPT_TOKENS = 16
SAMPLE_TEMPERATURE, SAMPLE_TOP = 0.8, 50
# Held-out sequences that the exam and the probes of the version see, as text.
EXAM_SEQUENCES = 64
PREVIEWED_TOKENS = 160


class PretrainTask(CausalTask[TokenBatches]):
    """Sequences of token shards. The position counts sequences, of all processes together."""

    @property
    def stride(self) -> int:
        return self.batch_size * self.world.size

    def epoch_length(self, epoch: int) -> int:  # noqa: ARG002 - all epochs are equally long
        return self.batches.num_sequences

    def batch(self, epoch: int, place: int) -> Batch:
        return self.batches.get(epoch, place, self.stride, self.world.portion)

    def where(self, epoch: int, place: int) -> str:
        return f"epoch {epoch}, sequence {place}: {self.batches.where(epoch, place)}"

    def heldout_loss(self) -> tuple[float, int]:
        """Loss in nats per token and tokens of the held-out sequences, with dropout off."""
        starts = range(0, self.batches.num_held_out, self.batch_size)
        return self._heldout_loss([partial(self.batches.held_out, start, self.batch_size) for start in starts])


@dataclass(frozen=True)
class PretrainData:
    """The shards; `selection`, in the process that began the run, says which they were then."""

    source: ShardSource
    selection: Selection | None


@dataclass(frozen=True, kw_only=True)
class Pretrain(PreparedRun[PretrainData]):
    """A pretraining run that is ready to start. A plan looks at all of the data: nothing has to be rendered."""

    task: PretrainTask

    # The position counts sequences, so their number in a step may change; the order that they come in may not.
    free_to_change = frozenset({"batch_size", "tokens_per_batch", "accumulation_steps"})

    @classmethod
    def read(cls, setup: Setup) -> tuple[PretrainData, PreTrainedTokenizerBase]:
        """The shards and their tokenizer.

        Raises:
            NotFound: If there are no shards.
            Damaged: If they are not those that were selected for the run.
            DataError: If they do not belong to the tokenizer.
            UsageError: If the recipe has settings that only examples know.
        """
        recipe, folder, selection = setup.recipe, setup.folder, None
        if folder is not None and setup.world.is_first and (setup.rerun is None or read_selection(folder) is None):
            selection = _selected_shards(recipe, setup.home, setup.root, folder)
        _refuse_settings_of_examples(recipe)
        source, tokenizer = open_source(recipe, setup.home, setup.root)
        return PretrainData(source, selection), tokenizer

    @classmethod
    def make_task(
        cls, setup: Setup, data: PretrainData, loaded: LoadedModel, compute_dtype: torch.dtype
    ) -> tuple[PretrainData, PretrainTask]:
        """Cut the shards into sequences.

        Raises:
            DataError: If the shards hold ids beyond the vocabulary, or are not those of process 0.
            ModelError: If the model is too short for the sequences.
        """
        recipe, world, shards = setup.recipe, setup.world, data.source.shards
        check_index(shards.index, loaded.vocab_size, recipe.data[0].path or "")
        _refuse_short_context(loaded, recipe.train.max_seq_len)
        batches = TokenBatches(
            shards,
            seq_len=recipe.train.max_seq_len,
            seed=recipe.train.seed,
            group_shards=recipe.pretrain.group_shards,
            held_out_share=recipe.held_out.share,
            held_out_tokens=recipe.pretrain.held_out_tokens,
            loss_across_documents=recipe.pretrain.loss_across_documents,
            vocab_size=loaded.vocab_size,
        )
        if world.from_first(batches.fingerprint) != batches.fingerprint:
            raise DataError(
                f"Process {world.rank} sees other shards at {recipe.data[0].path} than process 0, so they would learn different "
                "texts. Give all machines the same folder, and let nobody change it while a run begins."
            )
        if setup.folder is not None and data.selection is not None:
            held_out = held_out_texts(batches, loaded.tokenizer)
            write_selection(setup.folder, replace(data.selection, held_out=held_out))
        task = PretrainTask(
            loaded.model, batches, recipe.train, compute_dtype=compute_dtype, world=world, experts=recipe.experts
        )
        return data, task

    @property
    def num_files(self) -> int:
        return len(self.data.source.shards.index.shards)

    @property
    def examples(self) -> list[Example]:
        return held_out_texts(self.task.batches, self.loaded.tokenizer)

    @property
    def evaluate(self) -> Callable[[], tuple[float, int]] | None:
        return self.task.heldout_loss if self.task.batches.num_held_out else None

    def figures(self, state: TrainState) -> Callable[[dict[str, Any]], dict[str, Any]]:
        """What a row of metrics says beside loss and speed."""
        flops = flops_per_token(self.task.model, self.recipe.train.max_seq_len)
        peak, _ = peak_flops(self.task.device, self.task.compute_dtype)
        peak *= self.task.world.size
        bytes_per_token = self.data.source.shards.index.bytes_per_token
        heldout_bytes_per_token = self._heldout_bytes_per_token()
        begun_at = (state.step, state.seconds)

        def describe(row: dict[str, Any]) -> dict[str, Any]:
            more = {
                "perplexity": _perplexity(row["loss"]),
                "mfu": row["tokens_per_second"] * flops / peak,
            }
            steps = row["step"] - begun_at[0]
            if steps > 0:
                per_step = (row["seconds"] - begun_at[1]) / steps
                more["eta_seconds"] = (self.budget.steps_total - row["step"]) * per_step
            if bytes_per_token:
                more["bits_per_byte"] = row["loss"] / math.log(2) / bytes_per_token
            if "heldout_loss" in row:
                more |= self.task.heldout_figures
                more["heldout_perplexity"] = _perplexity(row["heldout_loss"])
                if heldout_bytes_per_token:
                    more["heldout_bits_per_byte"] = row["heldout_loss"] / math.log(2) / heldout_bytes_per_token
            return more

        return describe

    def _heldout_bytes_per_token(self) -> float | None:
        """Bytes of text for each held-out token that carries loss."""
        batches, num_bytes, tokens = self.task.batches, 0, 0
        for place in range(batches.num_held_out):
            batch = batches.held_out(place, 1)
            labels = [label for label in batch.labels[0].tolist() if label >= 0]
            num_bytes += len(_text(self.loaded.tokenizer, labels).encode())
            tokens += batch.tokens_trained
        return num_bytes / tokens if tokens else None

    def sample(self) -> tuple[str, str] | None:
        """The beginning of a held-out sequence and how the model goes on; None where none is wanted, or no process has all weights.

        No generator moves.
        """
        count = self.recipe.pretrain.sample_tokens
        if count == 0 or self.task.batches.num_held_out == 0 or self.task.is_sharded:
            return None
        prompt = self.task.batches.held_out(0, 1).input_ids[0, :SAMPLE_PROMPT_TOKENS].tolist()
        generator = torch.Generator().manual_seed(self.recipe.train.seed)

        def choose(logits: Tensor) -> int:
            top = (logits.cpu() / SAMPLE_TEMPERATURE).topk(min(SAMPLE_TOP, len(logits)))
            return int(top.indices[torch.multinomial(top.values.softmax(-1), 1, generator=generator)])

        ids = continuation(self.task.model, prompt, count, choose)
        return _text(self.loaded.tokenizer, prompt), _text(self.loaded.tokenizer, ids)

    def plan_rows(self, num_processes: int) -> MethodPlan:
        train, index, batches = self.recipe.train, self.data.source.shards.index, self.task.batches
        stride = train.batch_size * num_processes
        per_epoch = steps_in_epoch(batches.num_sequences, train.accumulation_steps, stride)
        steps_total = train.max_steps or per_epoch * train.epochs
        per_step = min(train.accumulation_steps * stride, batches.num_sequences) * train.max_seq_len
        documents = sum(shard.documents for shard in index.shards)
        rows = [
            PlanRow(
                "shards",
                f"{len(index.shards)} with {index.tokens:,} tokens of {documents:,} documents",
                {"shards": len(index.shards), "tokens": index.tokens, "documents": documents},
            ),
            PlanRow(
                "sequences",
                f"{batches.num_sequences:,} of {train.max_seq_len} tokens an epoch, {batches.num_held_out} held out; "
                f"{batches.tokens_left_over:,} tokens at the ends of shards fill none",
                {
                    "sequences": batches.num_sequences,
                    "sequences_held_out": batches.num_held_out,
                    "tokens_left_over": batches.tokens_left_over,
                    "max_seq_len": train.max_seq_len,
                },
            ),
            PlanRow("vocabulary", f"{self.loaded.vocab_size:,} ids", {"vocab_size": self.loaded.vocab_size}),
            PlanRow(
                "steps",
                f"{steps_total:,} in all, {per_epoch:,} an epoch, {per_step:,} tokens each",
                {
                    "tokens_per_step": per_step,
                    "epochs": train.epochs,
                    "steps_per_epoch": per_epoch,
                    "steps_total": steps_total,
                    "processes": num_processes,
                },
            ),
        ]
        return MethodPlan(
            rows=rows,
            tokens_computed=per_step * steps_total,
            steps_total=steps_total,
            largest_batch_tokens=train.batch_size * train.max_seq_len,
            loss_masks=[self._first_mask()],
            masked="tokens",
            findings=[],
            notes=[note for note in (self.task.note_on_experts,) if note],
            processes=num_processes,
            sequence_tokens=train.max_seq_len,
        )

    def _first_mask(self) -> list[Span]:
        """The beginning of the first sequence that is trained: each token by whether it is predicted."""
        batch = self.task.batches.get(0, 0, 1)
        ids = batch.input_ids[0, :PREVIEWED_TOKENS].tolist()
        # A weight stands at the place that predicts; shown is the token that is predicted.
        weights = [0.0, *batch.weights[0, : len(ids) - 1].tolist()]
        return loss_mask(self.loaded.tokenizer, ids, weights, ["text"] * len(ids))


def held_out_texts(batches: TokenBatches, tokenizer: Any) -> list[Example]:
    """The held-out sequences as texts, for whoever asks the finished version."""
    count = min(EXAM_SEQUENCES, batches.num_held_out)
    texts = (_text(tokenizer, batches.held_out(place, 1).input_ids[0].tolist()) for place in range(count))
    return [Example(text=text, source="held out", line=place) for place, text in enumerate(texts) if text.strip()]


def _text(tokenizer: Any, ids: list[int]) -> str:
    return str(tokenizer.decode(ids, skip_special_tokens=True))


# What only examples know, each with what to write instead.
_OF_EXAMPLES = {
    "data.0.format": "shards have one, so leave it out",
    "data.0.where": "leave it out",
    "data.0.since": "leave it out",
    "data.0.repeat": "write train.epochs",
    "held_out.path": "leave it out, and write held_out.share",
    "held_out.min_examples": "leave it out; held_out.share: 0 holds nothing out",
    "replay.ratio": "leave it out",
    "replay.minimum": "leave it out",
    "replay.path": "leave it out",
    "train.tokens_per_batch": "write train.batch_size, which counts sequences",
    "train.max_cut_share": "leave it out: what does not fit into a sequence goes on in the next one",
    "train.num_workers": "leave it out; `nightschool data tokenize` takes all processors",
    **{f"lora.{name}": "leave it out: all weights learn" for name in Lora.model_fields},
}


def _refuse_settings_of_examples(recipe: Recipe) -> None:
    """Refuse what only examples know, rather than ignore it."""
    settings = recipe.as_plain()
    plain = Recipe.model_validate({"base": recipe.base, "data": [{"path": "shards"}]}).as_plain()
    for name, remedy in _OF_EXAMPLES.items():
        value = _value_at(settings, name)
        if value != _value_at(plain, name):
            raise UsageError(f"{name} is {value}, and method: pretrain has no use for it: {remedy}.")


def _value_at(plain: Any, name: str) -> Any:
    for key in name.split("."):
        plain = plain[int(key) if key.isdigit() else key]
    return plain


def open_source(recipe: Recipe, home: Home, root: Path) -> tuple[ShardSource, PreTrainedTokenizerBase]:
    """The shards of a recipe and their tokenizer.

    Raises:
        DataError: If the recipe names no shards or several sources, or the tokenizer is not the shards' own.
        ModelError: If there is no tokenizer.
    """
    if any(source.dataset is not None for source in recipe.data):
        raise DataError(
            "method: pretrain learns from token shards, and `dataset` names questions with answers. Write method: full, which learns them "
            "with all weights (and train.max_steps: null, where the recipe counts steps)."
        )
    if len(recipe.data) != 1 or recipe.data[0].path is None:
        raise DataError(
            f"method: pretrain learns from one place with token shards, and data has {len(recipe.data)} sources. "
            "Write data: [{path: shards/}]; nightschool data tokenize makes one folder of many files."
        )
    place, cache = recipe.data[0].path, home.cache / "shards"
    given = None if recipe.tokenizer is None else find_tokenizer(recipe.tokenizer, home, root)
    opened = partial(
        open_shards,
        place,
        root=root,
        cache=cache,
        max_files=recipe.pretrain.max_files,
        group_shards=recipe.pretrain.group_shards,
        limit_bytes=recipe.pretrain.cache_limit,
    )
    source = opened(eos_token_id=None if given is None else end_of_text_id(given))
    if given is None and source.tokenizer_folder is None:
        raise ModelError(
            f"There is no tokenizer beside the shards of {place}, and without one nobody can read what the model writes. "
            "Write tokenizer: FOLDER or a hub id into the recipe."
        )
    tokenizer = given or load_tokenizer(cast(Path, source.tokenizer_folder), str(source.tokenizer_folder))
    if source.shards.index.eos_token_id is None:  # no index said it, and the tokenizer was found beside the shards
        source = opened(eos_token_id=end_of_text_id(tokenizer))
    stated = source.shards.index.tokenizer_fingerprint
    if stated is not None and isinstance(tokenizer, PreTrainedTokenizerFast):
        actual = tokenizer_fingerprint(tokenizer)
        if actual != stated:
            raise DataError(
                f"The shards of {place} were written with the tokenizer {stated[:12]}, and this one is {actual[:12]}. "
                "Take the tokenizer that lies beside the shards, or tokenize again."
            )
    return source, tokenizer


def _selected_shards(recipe: Recipe, home: Home, root: Path, folder: Path) -> Selection:
    """The shards as they are. Later, each checkpoint knows which ones it was trained on.

    Raises:
        Damaged: If they are not those that were selected for the run.
    """
    selected, now = read_selection(folder), select_shards(recipe, home, root)
    if selected is not None and selected.shards not in (None, now.shards):
        raise Damaged(
            f"The token shards at {recipe.data[0].path} have changed since they were selected for the run {folder.name}. "
            "Begin a new run."
        )
    return now


def _refuse_short_context(loaded: LoadedModel, seq_len: int) -> None:
    if seq_len > loaded.context_tokens:
        raise ModelError(
            f"train.max_seq_len is {seq_len}, and {loaded.ref} looks at {loaded.context_tokens} tokens. "
            f"Lower train.max_seq_len, or write shape: {{max_position_embeddings: {seq_len}}}."
        )


def _perplexity(loss: float) -> float | None:
    """E to the loss; None where that is not a number any more."""
    return math.exp(loss) if loss < 500 else None
