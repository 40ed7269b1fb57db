"""How a model that is being trained goes on with a prompt: for samples beside the loss, and for the probes of a version."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from transformers import StoppingCriteria, StoppingCriteriaList

from nightschool.data.chat.render import stop_token_ids
from nightschool.layers.forward import causal_lm


def continuation(
    model: nn.Module, prompt_ids: Sequence[int], max_new_tokens: int, choose: Callable[[Tensor], int | None]
) -> list[int]:
    """Go on with a prompt, one token at a time with a cache. The model is left in the mode that it was in.

    Args:
        model: Of transformers, bare or with adapters.
        prompt_ids: What it goes on with.
        max_new_tokens: Tokens at most.
        choose: Gets the next logits [V] in fp32 and says which token follows; None ends the continuation before it.
    """
    device, training = next(model.parameters()).device, model.training
    model.eval()
    ids: list[int] = []
    try:
        with torch.no_grad():
            cache, next_ids = None, torch.tensor([list(prompt_ids)], device=device)
            while len(ids) < max_new_tokens:
                output = model(input_ids=next_ids, past_key_values=cache, use_cache=True)
                cache = output.past_key_values
                chosen = choose(output.logits[0, -1].float())
                if chosen is None:
                    break
                ids.append(chosen)
                next_ids = torch.tensor([[chosen]], device=device)
    finally:
        model.train(training)
    return ids


def greedy_continuation(
    model: nn.Module,
    prompt_ids: Sequence[int],
    max_new_tokens: int,
    *,
    stop_ids: Collection[int] = (),
    min_margin: float = 0.0,
) -> list[int]:
    """Go on by the likeliest token.

    Ends before a token of `stop_ids`, and before the first token whose logit leads the second by less than
    `min_margin`.
    """

    def choose(logits: Tensor) -> int | None:
        top = logits.topk(2)
        token_id = int(top.indices[0])
        return None if token_id in stop_ids or float(top.values[0] - top.values[1]) < min_margin else token_id

    return continuation(model, prompt_ids, max_new_tokens, choose)


class Sampling(NamedTuple):
    """How an answer is drawn: at a temperature above 0, from the likeliest tokens that have `top_p` of the probability together."""

    temperature: float
    top_p: float


def greedy_answers(
    model: nn.Module, tokenizer: Any, prompts: Sequence[Sequence[int]], max_new_tokens: int
) -> list[tuple[int, ...]]:
    """As `answers_of`; nothing is drawn at random."""
    return answers_of(model, tokenizer, prompts, max_new_tokens)


def answers_of(
    model: nn.Module,
    tokenizer: Any,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    sampling: Sampling | None = None,
    *,
    until: float | None = None,
) -> list[tuple[int, ...]]:
    """Answers to several prompts at once, each with the token that ends it, if it came to its end; greedy ones without `sampling`.

    At the moment `until` of the monotonic clock all of them end where they are: whoever sets it looks at the clock after.
    The model is to be in the mode in which it shall answer. What is drawn comes from torch's generator of the model's device.
    """
    inner = causal_lm(model)
    device, stops = next(model.parameters()).device, stop_token_ids(tokenizer)
    filler, longest = next(iter(stops)), max(map(len, prompts))
    ids = torch.tensor([[filler] * (longest - len(one)) + list(one) for one in prompts], device=device)
    mask = torch.tensor([[0] * (longest - len(one)) + [1] * len(one) for one in prompts], device=device)
    # Packed attention knows no padding.
    packed = inner.config._attn_implementation
    inner.set_attn_implementation("sdpa" if inner._supports_sdpa else "eager")
    drawn: dict[str, Any] = (
        {"do_sample": False} if sampling is None else {"do_sample": True, "top_k": 0, **sampling._asdict()}
    )
    try:
        found = cast(Any, model).generate(
            input_ids=ids, attention_mask=mask, max_new_tokens=max_new_tokens, eos_token_id=sorted(stops), pad_token_id=filler,
            stopping_criteria=None if until is None else StoppingCriteriaList([_Until(until)]), **drawn,
        )  # fmt: skip
    finally:
        inner.set_attn_implementation(packed)
    return [_to_end(row, stops) for row in found[:, longest:].tolist()]


class _Until(StoppingCriteria):
    """Ends all answers at a moment of the monotonic clock."""

    def __init__(self, moment: float) -> None:
        self._moment = moment

    def __call__(self, input_ids: Any, scores: Any, **_: Any) -> Any:  # noqa: ARG002 - as transformers calls it
        return torch.full(input_ids.shape[:1], time.monotonic() >= self._moment, device=input_ids.device)


def _to_end(ids: Sequence[int], stops: Any) -> tuple[int, ...]:
    end = next((place + 1 for place, token in enumerate(ids) if token in stops), len(ids))
    return tuple(ids[:end])
