"""How far a candidate moved from the champion where nobody taught anything: the champion's drift."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from transformers import PreTrainedTokenizerBase

from nightschool.data.batches import Batches
from nightschool.data.chat.render import Rendered, render_prompt
from nightschool.data.example import Message
from nightschool.errors import PromptTooLong
from nightschool.evaluation.examiner import Answer, Examinee
from nightschool.evaluation.heldout import as_found, on_device
from nightschool.evaluation.scores import OpenPair
from nightschool.layers.forward import document_logits, prepare, trained_places
from nightschool.models.quiet import quiet_libraries

MAX_ANSWER_TOKENS = 32
# Logits of a pass, before those of the prompts are dropped: 64 MiB in fp32.
_NUMBERS_PER_PASS = 1 << 24

Found = TypeVar("Found")


@dataclass(frozen=True)
class ChampionAnswer:
    """What the champion answers to one prompt, greedily, and how likely it finds every token at each place of it.

    `log_probs_tv`: [tokens of the answer, vocabulary], fp32 on the CPU.
    """

    prompt: str
    text: str
    answer_ids: Sequence[int]
    log_probs_tv: torch.Tensor


@dataclass(frozen=True)
class ChampionAnswers:
    """The answers, and the vocabulary in which they are written: text of a token → its id."""

    answers: Sequence[ChampionAnswer]
    vocabulary: dict[str, int]


def champion_answers(champion: Examinee, prompts: Sequence[str]) -> ChampionAnswers:
    """Ask the champion the prompts. One that its context does not hold is left out."""
    said = [(prompt, answer) for prompt, answer in _asked(champion, prompts) if answer.token_ids]
    asked = [(prompt, tuple(answer.token_ids)) for prompt, answer in said]
    log_probs = _of_log_probs(champion, asked, lambda _, log_probs_tv: log_probs_tv.clone())
    answers = [
        ChampionAnswer(prompt, answer.text, tuple(answer.token_ids), log_probs_tv)
        for (prompt, answer), log_probs_tv in zip(said, log_probs, strict=True)
    ]
    return ChampionAnswers(answers, champion.loaded.tokenizer.get_vocab())


def open_answers(candidate: Examinee, champion: ChampionAnswers, drifts: Sequence[float]) -> list[OpenPair]:
    """What both say to the prompts that the champion answered, those that drifted most first; `drifts` are those of each."""
    said = dict(_asked(candidate, [one.prompt for one in champion.answers[: len(drifts)]]))
    pairs = [
        OpenPair(one.prompt, one.text, said[one.prompt].text if one.prompt in said else "", nats)
        for one, nats in zip(champion.answers, drifts, strict=False)
    ]
    # What is no number is worse than any.
    return sorted(pairs, key=lambda pair: -math.inf if pair.drift is None or math.isnan(pair.drift) else -pair.drift)


def _asked(model: Examinee, prompts: Sequence[str]) -> Iterator[tuple[str, Answer]]:
    """The prompts with their answers; one that the context does not hold is left out."""
    pending = []
    for number, prompt in enumerate(prompts):
        try:
            pending.append(
                (prompt, model.ask_greedily(f"drift-{number}", [Message("user", prompt)], MAX_ANSWER_TOKENS))
            )
        except PromptTooLong:
            continue
    for prompt, asked in pending:
        yield prompt, asked.result()


def drift(candidate: Examinee, champion: ChampionAnswers) -> tuple[float | None, int]:
    """The mean KL divergence of the candidate from the champion, in nats a token of the champion's answers, and how many.

    None where they have different vocabularies, or nothing was answered.
    """
    return mean_drift(champion, drift_by_prompt(candidate, champion))


def drift_by_prompt(candidate: Examinee, champion: ChampionAnswers) -> list[float]:
    """KL(champion ‖ candidate) for each answer of the champion, in nats a token; none where they have different vocabularies.

    Teacher-forced: both are given the champion's answer up to each place, after the prompt in their own template.
    """
    if candidate.loaded.tokenizer.get_vocab() != champion.vocabulary:
        return []
    answers = champion.answers

    def divergence(place: int, q_tv: torch.Tensor) -> float:
        return _divergence(answers[place].log_probs_tv, q_tv) / len(answers[place].answer_ids)

    return _of_log_probs(candidate, [(one.prompt, one.answer_ids) for one in answers], divergence)


def mean_drift(champion: ChampionAnswers, drifts: Sequence[float]) -> tuple[float | None, int]:
    """The mean over all tokens of the answers with these drifts, and how many; None where there are none."""
    if not drifts:
        return None, 0
    tokens = [len(one.answer_ids) for one in champion.answers]
    return sum(map(operator.mul, drifts, tokens)) / sum(tokens), sum(tokens)


def _divergence(p_tv: torch.Tensor, q_tv: torch.Tensor) -> float:
    """KL(p ‖ q), summed over places."""
    size = min(q_tv.shape[1], p_tv.shape[1])  # rows beyond the vocabulary fill up a multiple of 64
    p_tv = p_tv[:, :size]
    return float((p_tv.exp() * (p_tv - q_tv[:, :size])).sum(dtype=torch.float64))


def _of_log_probs(
    model: Examinee, said: Sequence[tuple[str, Sequence[int]]], find: Callable[[int, torch.Tensor], Found]
) -> list[Found]:
    """What `find` makes of each prompt and answer, by its number and [tokens of the answer, vocabulary], without a cache.

    As many documents a pass as fit, and no more log-probabilities at once than those of a pass, unless `find` keeps them.
    """
    loaded = model.loaded
    device = next(loaded.model.parameters()).device
    documents = [_document(loaded.tokenizer, *one) for one in said]
    found: list[Found] = []
    with quiet_libraries(), as_found(loaded.model), torch.no_grad():
        path = prepare(loaded.model)
        for packed in _in_passes(documents, _NUMBERS_PER_PASS // loaded.vocab_size):
            plain = Batches(packed, batch_size=1, seed=0, documents_per_example=len(packed)).get(0, 0)
            batch = on_device(plain, device)
            logits_mv = document_logits(loaded.model, path, batch)[trained_places(batch)]
            log_probs_mv = logits_mv.float().log_softmax(-1).cpu()
            for log_probs_tv in torch.split(log_probs_mv, [document.trained_tokens for document in packed]):
                found.append(find(len(found), log_probs_tv))
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
