"""What a run rehearses: the answers that the model gave to general prompts before it learned, with the distribution that it had.

Rehearsing the words teaches those answers; rehearsing the distribution keeps what made them, also for prompts that are
never rehearsed (learning without forgetting, Li and Hoiem 2016, arXiv 1606.09282; of what a model itself says, on-policy
distillation, Agarwal et al. 2024, arXiv 2306.13649). The teacher is asked once: its likeliest tokens at each place are kept.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from nightschool.config.recipe import Recipe, Rehearse
from nightschool.data.batches import Batch, Batches
from nightschool.data.chat.render import Rendered, render_prompt
from nightschool.data.example import Message
from nightschool.errors import Damaged
from nightschool.evaluation.heldout import as_found, autocast, on_device
from nightschool.evaluation.rehearsed import choose_prompts
from nightschool.feedback.rehearsed_prompts import (
    ANSWERS_FILE,
    ChosenPrompts,
    RehearsedPrompt,
    cache_of,
    read_chosen,
    write_chosen,
)
from nightschool.feedback.selection import Selection
from nightschool.layers.distillation import TopTokens, document_divergence
from nightschool.layers.forward import ForwardPath, document_logits, trained_places
from nightschool.models.adapters import adapter_left_out, fresh_adapter_left_out
from nightschool.models.load import LoadedModel
from nightschool.models.quiet import quiet_libraries
from nightschool.store.atomic import write_bytes
from nightschool.store.home import Home
from nightschool.training.continuation import greedy_answers
from nightschool.training.metrics import say
from nightschool.training.planning.asking import seconds_of, seconds_to_answer

# What they leave out counts as one event.
KEPT_TOKENS = 64
_PROMPTS_PER_PASS = 16
_SHORTEST_ANSWER = 2


@dataclass(frozen=True)
class Rehearsed:
    """One prompt and answer as tokens, and what the teacher gave each place of the answer: [tokens of the answer, K]."""

    prompt_ids: tuple[int, ...]
    answer_ids: tuple[int, ...]
    teacher: TopTokens

    @property
    def document(self) -> Rendered:
        weights = [0.0] * len(self.prompt_ids) + [1.0] * len(self.answer_ids)
        roles = ["user"] * len(self.prompt_ids) + ["assistant"] * len(self.answer_ids)
        return Rendered([*self.prompt_ids, *self.answer_ids], weights, roles)


class Rehearsal:
    """Answers to rehearse, some of them beside each micro-batch, in an order of its own.

    Args:
        rows: At least one.
        ratio: Of them for each example of a micro-batch.
        weight: Of the divergence beside the loss.
        seed: Of the order.
        stands_in: Whether nobody gave these answers, and they are there to be measured.
    """

    def __init__(
        self, rows: Sequence[Rehearsed], *, ratio: float, weight: float, seed: int, stands_in: bool = False
    ) -> None:
        assert rows, "there is something to rehearse"
        self._rows, self._ratio, self.weight, self.stands_in = list(rows), ratio, weight, stands_in
        self._order = np.random.default_rng(seed).permutation(len(rows))

    @property
    def documents(self) -> list[Rendered]:
        """All that may be rehearsed."""
        return [row.document for row in self._rows]

    def expected_tokens(self, answers: int) -> tuple[int, int]:
        """Tokens of so many answers with their prompts, and those that are learned from."""
        learned = sum(len(row.answer_ids) for row in self._rows) / len(self._rows)
        read = sum(len(row.prompt_ids) for row in self._rows) / len(self._rows)
        return round(answers * (read + learned)), round(answers * learned)

    def _chosen(self, batch: Batch, number: int) -> list[Rehearsed]:
        count = min(len(self._rows), answers_beside(self._ratio, len(batch.cu_seqlens) - 1))
        return [self._rows[self._order[(number * count + i) % len(self._rows)]] for i in range(count)]

    def tokens_beside(self, batch: Batch, number: int) -> int:
        """How many tokens are learned from beside a micro-batch."""
        return sum(len(row.answer_ids) for row in self._chosen(batch, number))

    def beside(self, batch: Batch, number: int) -> tuple[Batch, TopTokens]:
        """What is rehearsed beside a micro-batch, the `number`th of the run; equal for equal arguments."""
        chosen = self._chosen(batch, number)
        documents = [row.document for row in chosen]
        packed = Batches(documents, batch_size=1, seed=0, documents_per_example=len(documents)).get(0, 0)
        teacher = TopTokens(
            torch.cat([row.teacher.ids for row in chosen]), torch.cat([row.teacher.log_probs for row in chosen])
        )
        return packed, teacher

    def divergence(self, model: nn.Module, path: ForwardPath, batch: Batch, number: int, dtype: torch.dtype) -> Tensor:
        """KL(teacher ‖ model) in nats, a mean over the tokens of what is rehearsed beside a micro-batch."""
        packed, teacher = self.beside(batch, number)
        device = next(model.parameters()).device
        with autocast(device, dtype):
            total = document_divergence(model, path, on_device(packed, device), teacher.to(device))
        return total / packed.tokens_trained


def answers_beside(ratio: float, examples: float) -> int:
    """How many answers lie beside a micro-batch of so many examples."""
    return max(1, round(ratio * examples))


def ask(
    model: nn.Module,
    path: ForwardPath,
    tokenizer: Any,
    prompts: Sequence[str],
    max_new_tokens: int,
    teacher: Literal["champion", "base"] = "champion",
) -> list[Rehearsed]:
    """Let the model, as it is now or without its adapter, answer prompts greedily, and note what it gave each place of its answers."""
    left_out = adapter_left_out if teacher == "base" else fresh_adapter_left_out
    asked = [tuple(render_prompt(tokenizer, [Message("user", prompt)])) for prompt in prompts]
    said: list[tuple[tuple[int, ...], tuple[int, ...]]] = []
    with quiet_libraries(), as_found(model), left_out(model), torch.no_grad():
        for start in range(0, len(asked), _PROMPTS_PER_PASS):
            some = asked[start : start + _PROMPTS_PER_PASS]
            said += zip(some, greedy_answers(model, tokenizer, some, max_new_tokens), strict=True)
        rows = []
        for prompt_ids, answer_ids in said:
            if len(answer_ids) >= _SHORTEST_ANSWER:
                rows.append(Rehearsed(prompt_ids, answer_ids, _teacher(model, path, prompt_ids, answer_ids)))
    return rows


def _teacher(model: nn.Module, path: ForwardPath, prompt_ids: Sequence[int], answer_ids: Sequence[int]) -> TopTokens:
    document = Rehearsed(tuple(prompt_ids), tuple(answer_ids), TopTokens(torch.empty(0), torch.empty(0))).document
    device = next(model.parameters()).device
    batch = on_device(Batches([document], batch_size=1, seed=0).get(0, 0), device)
    return TopTokens.of(document_logits(model, path, batch)[trained_places(batch)], KEPT_TOKENS).to(torch.device("cpu"))


@dataclass(frozen=True)
class RehearsedPrompts:
    """What a run rehearses, before the model was asked."""

    chosen: ChosenPrompts
    settings: Rehearse
    seed: int
    home: Home

    @classmethod
    def of(
        cls, recipe: Recipe, home: Home, root: Path, folder: Path | None, selection: Selection, tokenizer: Any
    ) -> RehearsedPrompts | None:
        """What was chosen for the run in a folder, or is chosen now; a plan keeps nothing of it.

        None where nothing is to be rehearsed: the recipe says so, or new weights know nothing yet.

        Raises:
            NotFound, DataError, UsageError: As `choose_prompts`.
            Damaged: If the folder holds other prompts than were chosen.
        """
        if recipe.rehearse.prompts is None or recipe.base.startswith("new:"):
            return None
        chosen = None if folder is None else read_chosen(folder)
        if chosen is None:
            room = recipe.train.max_seq_len - recipe.rehearse.max_new_tokens
            chosen = choose_prompts(
                recipe, home, root, selection, lambda prompt: len(_rendered(tokenizer, prompt)) <= room
            )
            if folder is not None:
                write_chosen(folder, chosen)
        return cls(chosen, recipe.rehearse, recipe.train.seed, home) if chosen.prompts else None

    def first(self, room: int | None) -> tuple[RehearsedPrompt, ...]:
        """Those that are asked where there is `room` for so many; all of them without it.

        The answers of a base serve all nights, whatever room each of them has, but for those to what users asked by day.
        """
        prompts = self.chosen.prompts
        if not self._of_base:
            return prompts[:room]
        return tuple(one for at, one in enumerate(prompts) if room is None or at < room or not one.conversations)

    def answered(self, folder: Path, loaded: LoadedModel, task: Any, room: int | None) -> Rehearsal | None:
        """The answers: those in the run's folder, or of an earlier run with the same weights, or new ones.

        No more prompts are asked than there is `room` for; all of them without it. None where the model says nothing to any of them.
        """
        path = folder / ANSWERS_FILE
        rows = read(path)
        if rows is None:
            rows = self._of_cache_or_asked(loaded, task, self.first(room))
            write(path, rows)
            rows = read(path)  # what a resumed run has: numbers rounded as they are kept
        if not rows:
            say(f"{loaded.ref} says nothing to the general prompts, so nothing is rehearsed")
            return None
        return Rehearsal(rows, ratio=self.settings.ratio, weight=self.settings.weight, seed=self.seed)

    def _of_cache_or_asked(self, loaded: LoadedModel, task: Any, asked: Sequence[RehearsedPrompt]) -> list[Rehearsed]:
        """The answers to what users asked, which is something else every night, lie apart from those to other prompts."""
        rows: list[Rehearsed] = []
        for by_users in (False, True):
            some = [one for one in asked if bool(one.conversations) is by_users]
            if not some:
                continue
            prompts = [one.question for one in some]
            kept = cache_of(self.home, some) / f"{self._digest(loaded, prompts)}.safetensors"
            found = read(kept)
            if found is None:
                whom = "what stands below the adapter" if self._of_base else loaded.ref
                say(f"Asking {whom} {by_source(some)}, whose answers are rehearsed")
                longest, teacher = self.settings.max_new_tokens, self.settings.teacher
                found = ask(task.model, task.path, loaded.tokenizer, prompts, longest, teacher)
                write(kept, found)
            rows += found
        return rows

    def num_asked(self, room: int | None) -> int:
        """How many prompts are asked where there is `room` for so many answers."""
        return len(self.first(room))

    def asking_seconds(self, loaded: LoadedModel, task: Any, room: int | None) -> float:
        """About how long it takes to ask for the answers that are wanted, none of which ends early, where nobody kept them."""
        prompts = [_rendered(loaded.tokenizer, one.question) for one in self.chosen.prompts]
        asked, longest = self.num_asked(room), self.settings.max_new_tokens
        with fresh_adapter_left_out(task.model):
            answering = seconds_to_answer(task.model, loaded.tokenizer, prompts, longest, _PROMPTS_PER_PASS)
            with as_found(task.model), torch.no_grad():
                noting = seconds_of(lambda: _teacher(task.model, task.path, prompts[0], [0] * longest))
        return answering * asked / len(prompts) + noting * asked

    def stand_in(self, tokenizer: Any) -> Rehearsal:
        """What takes as much time and room as the answers would, none of which ends early: for a plan, before anybody is asked."""
        count, kept = self.settings.max_new_tokens, min(KEPT_TOKENS, len(tokenizer))
        any_tokens = TopTokens(torch.arange(kept).repeat(count, 1), torch.full((count, kept), -10.0))
        rows = [
            Rehearsed(tuple(_rendered(tokenizer, one.question)), (0,) * count, any_tokens)
            for one in self.chosen.prompts
        ]
        settings = self.settings
        return Rehearsal(rows, ratio=settings.ratio, weight=settings.weight, seed=self.seed, stands_in=True)

    def _digest(self, loaded: LoadedModel, prompts: Sequence[str]) -> str:
        """Of all that answers depend on, the weights among it."""
        ref = "" if self._of_base else loaded.ref
        facts = [ref, list(prompts), self.settings.max_new_tokens, KEPT_TOKENS]
        return digest_of_weights(loaded, json.dumps(facts), with_adapter=not self._of_base)

    @property
    def _of_base(self) -> bool:
        return self.settings.teacher == "base"


def by_source(prompts: Sequence[RehearsedPrompt]) -> str:
    """How many there are of whom: `7 general prompts (4 of default, 3 of conversations)`."""
    counts = Counter(one.source for one in prompts)
    return f"{len(prompts)} general prompts ({', '.join(f'{count} of {source}' for source, count in counts.items())})"


def _rendered(tokenizer: Any, prompt: str) -> list[int]:
    return render_prompt(tokenizer, [Message("user", prompt)])


def digest_of_weights(loaded: LoadedModel, facts: str, *, with_adapter: bool = True) -> str:
    """A digest of weights and of what was done with them."""
    digest = hashlib.sha256(facts.encode())
    for name, tensor in sorted(loaded.model.state_dict().items()):
        if not with_adapter and ".lora_" in name:
            continue
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


# --- on disk ------------------------------------------------------------------------------------------------------------


def write(path: Path, rows: Sequence[Rehearsed]) -> None:
    """Keep answers."""
    lengths = torch.tensor([[len(row.prompt_ids), len(row.answer_ids)] for row in rows])
    tensors = {
        "lengths": lengths,
        "ids": torch.tensor([token for row in rows for token in (*row.prompt_ids, *row.answer_ids)], dtype=torch.int32),
        "teacher_ids": _joined([row.teacher.ids for row in rows]).to(torch.int32),
        "teacher_log_probs": _joined([row.teacher.log_probs for row in rows]).half(),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    write_bytes(path, save(tensors))


def _joined(parts: Sequence[Tensor]) -> Tensor:
    return torch.cat(list(parts)) if parts else torch.empty(0, KEPT_TOKENS)


def read(path: Path) -> list[Rehearsed] | None:
    """The answers that were kept; None if none were.

    Raises:
        Damaged: If the file is broken.
    """
    if not path.is_file():
        return None
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in ("lengths", "ids", "teacher_ids", "teacher_log_probs")}
        lengths = tensors["lengths"].tolist()
        ids = tensors["ids"].split([size for pair in lengths for size in pair])
        answers = [answer for _, answer in lengths]
        teacher_ids = tensors["teacher_ids"].long().split(answers)
        log_probs = tensors["teacher_log_probs"].float().split(answers)
    except (SafetensorError, OSError, RuntimeError, ValueError) as error:
        raise Damaged(f"{path} cannot be read ({error}). Remove it; the next run asks the model again.") from None
    return [
        Rehearsed(tuple(prompt.tolist()), tuple(answer.tolist()), TopTokens(one, given))
        for prompt, answer, one, given in zip(ids[::2], ids[1::2], teacher_ids, log_probs, strict=True)
    ]
