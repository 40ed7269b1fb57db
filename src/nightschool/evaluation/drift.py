"""How far a candidate moved from the champion where nobody taught anything: the champion's drift."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from transformers import PreTrainedTokenizerBase

from nightschool.data.batches import Batches
from nightschool.data.chat.render import Rendered, render_prompt
from nightschool.data.example import Message
from nightschool.errors import PromptTooLong
from nightschool.evaluation.examiner import Examinee
from nightschool.evaluation.heldout import as_found, on_device
from nightschool.layers.forward import document_logits, prepare
from nightschool.models.quiet import quiet_libraries

MAX_ANSWER_TOKENS = 32
# Logits of a pass, before those of the prompts are dropped: 64 MiB in fp32.
_NUMBERS_PER_PASS = 1 << 24


@dataclass(frozen=True)
class ChampionAnswer:
    """What the champion answers to one prompt, greedily, and how likely it finds every token at each place of it.

    `log_probs_tv`: [tokens of the answer, vocabulary], fp32 on the CPU.
    """

    prompt: str
    answer_ids: Sequence[int]
    log_probs_tv: torch.Tensor


@dataclass(frozen=True)
class ChampionAnswers:
    """The answers, and the vocabulary in which they are written: text of a token → its id."""

    answers: Sequence[ChampionAnswer]
    vocabulary: dict[str, int]


def champion_answers(champion: Examinee, prompts: Sequence[str]) -> ChampionAnswers:
    """Ask the champion the prompts. One that its context does not hold is left out."""
    pending = []
    for number, prompt in enumerate(prompts):
        try:
            asked = champion.ask_greedily(f"drift-{number}", [Message("user", prompt)], MAX_ANSWER_TOKENS)
        except PromptTooLong:
            continue
        pending.append((prompt, asked))
    said = [(prompt, tuple(ids)) for prompt, asked in pending if (ids := asked.result().token_ids)]
    log_probs = _log_probs(champion, said)
    answers = [ChampionAnswer(*one, log_probs_tv) for one, log_probs_tv in zip(said, log_probs, strict=True)]
    return ChampionAnswers(answers, champion.loaded.tokenizer.get_vocab())


def drift(candidate: Examinee, champion: ChampionAnswers) -> tuple[float | None, int]:
    """The mean KL divergence of the candidate from the champion, in nats a token of the champion's answers, and how many.

    KL(champion ‖ candidate), teacher-forced: both are given the champion's answer up to each place, after the prompt in
    their own template. None where they have different vocabularies, or nothing was answered.
    """
    if not champion.answers or candidate.loaded.tokenizer.get_vocab() != champion.vocabulary:
        return None, 0
    total, tokens = 0.0, 0
    ours = _log_probs(candidate, [(one.prompt, one.answer_ids) for one in champion.answers])
    for one, q_tv in zip(champion.answers, ours, strict=True):
        size = min(q_tv.shape[1], one.log_probs_tv.shape[1])  # rows beyond the vocabulary fill up a multiple of 64
        p_tv = one.log_probs_tv[:, :size]
        total += float((p_tv.exp() * (p_tv - q_tv[:, :size])).sum(dtype=torch.float64))
        tokens += len(one.answer_ids)
    return total / tokens, tokens


def _log_probs(model: Examinee, said: Sequence[tuple[str, Sequence[int]]]) -> list[torch.Tensor]:
    """For each prompt and answer: [tokens of the answer, vocabulary], without a cache, as many documents a pass as fit."""
    loaded = model.loaded
    device = next(loaded.model.parameters()).device
    documents = [_document(loaded.tokenizer, *one) for one in said]
    found: list[torch.Tensor] = []
    with quiet_libraries(), as_found(loaded.model), torch.no_grad():
        path = prepare(loaded.model)
        for packed in _in_passes(documents, _NUMBERS_PER_PASS // loaded.vocab_size):
            batch = Batches(packed, batch_size=1, seed=0, documents_per_example=len(packed)).get(0, 0)
            logits_nv = document_logits(loaded.model, path, on_device(batch, device))
            log_probs_tv = logits_nv[(batch.weights[0] > 0).to(device)].float().log_softmax(-1).cpu()
            found += torch.split(log_probs_tv, [document.trained_tokens for document in packed])
    return found


def _document(tokenizer: PreTrainedTokenizerBase, prompt: str, answer_ids: Sequence[int]) -> Rendered:
    prompt_ids = render_prompt(tokenizer, [Message("user", prompt)])
    weights = [0.0] * len(prompt_ids) + [1.0] * len(answer_ids)
    roles = ["user"] * len(prompt_ids) + ["assistant"] * len(answer_ids)
    return Rendered([*prompt_ids, *answer_ids], weights, roles)


def _in_passes(documents: Sequence[Rendered], most_tokens: int) -> Iterator[list[Rendered]]:
    """The documents in their order, at most so many tokens together, or a single one."""
    packed: list[Rendered] = []
    for document in documents:
        if packed and sum(len(one.input_ids) for one in [*packed, document]) > most_tokens:
            yield packed
            packed = []
        packed.append(document)
    if packed:
        yield packed
