"""How a model that is being trained goes on with a prompt: for samples beside the loss, and for the probes of a version."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence

import torch
from torch import Tensor, nn


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
