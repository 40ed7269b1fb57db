"""From logits to tokens: all rows of a step at once.

S rows, V entries of the vocabulary, K likeliest of them.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from nightschool.engine.request import SamplingParams, TokenLogprob

# Of rows with top_p and no top_k, this many likeliest tokens are looked at before the whole vocabulary is sorted.
_FIRST_LOOK = 256
# Temperatures below it are zero in 32 bits, and nothing may be divided by them; at this one only the likeliest is left.
_LOWEST_TEMPERATURE = torch.finfo(torch.float32).tiny


class RowSampling:
    """What choosing the tokens of one answer needs to remember: its random numbers, and which tokens it has seen.

    The random numbers are the row's own, so that the same seed gives the same answer whatever else is in the batch.
    """

    def __init__(
        self, params: SamplingParams, prompt_ids: Sequence[int], vocab_size: int, device: torch.device
    ) -> None:
        self.params = params
        self._random = random.Random(params.seed)
        self._drawn: float | None = None
        self._seen: Tensor | None = None
        self._counts: Tensor | None = None
        if params.has_penalties:
            self._seen = torch.zeros(vocab_size, dtype=torch.bool, device=device)
            self._seen[torch.tensor(list(prompt_ids), device=device)] = True
            self._counts = torch.zeros(vocab_size, device=device)

    def draw(self) -> float:
        """The random number in [0, 1) for the next token: the same until it is noted, so that a step can be repeated."""
        if self._drawn is None:
            self._drawn = self._random.random()
        return self._drawn

    def note(self, token_id: int) -> None:
        """The answer goes on with this token."""
        self._drawn = None
        if self._seen is not None and self._counts is not None:
            self._seen[token_id] = True
            self._counts[token_id] += 1

    def penalise(self, logits_v: Tensor) -> Tensor:
        """The logits after the penalties of this row."""
        params = self.params
        if self._seen is None or self._counts is None:
            return logits_v
        if params.repetition_penalty != 1:
            lower = torch.where(
                logits_v > 0, logits_v / params.repetition_penalty, logits_v * params.repetition_penalty
            )
            logits_v = torch.where(self._seen, lower, logits_v)
        return logits_v - params.frequency_penalty * self._counts - params.presence_penalty * (self._counts > 0)


@dataclass(frozen=True, slots=True)
class Choice:
    """The next token of one row. `is_finite` says whether its logits were numbers at all."""

    token_id: int
    is_finite: bool = True
    logprob: TokenLogprob | None = None


def choose(logits_sv: Tensor, rows: Sequence[RowSampling]) -> list[Choice]:
    """The next token of every row, in order."""
    if all(row.params.is_plain_greedy for row in rows):
        return [Choice(token_id, math.isfinite(value)) for token_id, value in _likeliest(logits_sv)]
    logits_sv = logits_sv.float()
    finite_s = logits_sv.amax(dim=-1).isfinite()
    # Rows that are not numbers fail anyway; zeros keep them from failing the others with them.
    logits_sv = torch.where(finite_s[:, None], logits_sv, 0.0)
    adjusted_sv = logits_sv
    if any(row.params.has_penalties for row in rows):
        adjusted_sv = torch.stack([row.penalise(logits_v) for row, logits_v in zip(rows, logits_sv, strict=True)])
        # A penalty can make infinities of huge logits.
        finite_s = finite_s & adjusted_sv.amax(dim=-1).isfinite()
        adjusted_sv = torch.where(finite_s[:, None], adjusted_sv, 0.0)
    token_ids_s = adjusted_sv.argmax(dim=-1)
    finite = finite_s.tolist()
    sampled = [place for place, row in enumerate(rows) if row.params.temperature > 0]
    # Whether a row is restricted to its likeliest tokens depends on its own settings only, so that its choice does too.
    for restricted in (False, True):
        members = [place for place in sampled if _is_restricted(rows[place].params) == restricted]
        if members:
            index = torch.tensor(members, device=logits_sv.device)
            draws = torch.tensor(
                [rows[place].draw() for place in members], dtype=torch.float64, device=logits_sv.device
            )
            params = [rows[place].params for place in members]
            temperatures = [max(p.temperature, _LOWEST_TEMPERATURE) for p in params]
            scaled_sv = adjusted_sv.index_select(0, index)
            # Divided after the likeliest became 0, no temperature makes two infinities, whose difference is not a number.
            scaled_sv = (scaled_sv - scaled_sv.amax(dim=-1, keepdim=True)) / _column(temperatures, logits_sv.device)
            pick = _sample_restricted if restricted else _sample_all
            token_ids_s[index] = pick(scaled_sv, params, draws)
    chosen: list[int] = token_ids_s.tolist()
    logprobs = _logprobs(logits_sv, rows, chosen)
    return [Choice(chosen[place], finite[place], logprobs.get(place)) for place in range(len(rows))]


def _likeliest(logits_sv: Tensor) -> list[tuple[int, float]]:
    """The token with the highest logit of each row, and that logit, which is not a number if any is not."""
    if logits_sv.device.type == "cpu" and logits_sv.dtype == torch.float32:
        # NumPy's search is vectorised and PyTorch's is not (measured, 16 rows of 32,768: 40 µs against 228).
        array = logits_sv.numpy()
        token_ids = array.argmax(axis=-1)
        return list(zip(token_ids.tolist(), array[np.arange(len(array)), token_ids].tolist(), strict=True))
    values_s, token_ids_s = logits_sv.max(dim=-1)
    return list(zip(token_ids_s.tolist(), values_s.tolist(), strict=True))


def _is_restricted(params: SamplingParams) -> bool:
    return params.top_k > 0 or params.top_p < 1


def _sample_all(scaled_sv: Tensor, params: Sequence[SamplingParams], draws_s: Tensor) -> Tensor:
    """Token ids [S] drawn from the whole vocabulary, less what `min_p` leaves out."""
    weights_sv = scaled_sv.exp()  # the likeliest has weight 1, because its scaled logit is 0
    if any(p.min_p > 0 for p in params):
        weights_sv = weights_sv * (weights_sv >= _column([p.min_p for p in params], scaled_sv.device))
    return _invert(weights_sv, draws_s)


def _sample_restricted(scaled_sv: Tensor, params: Sequence[SamplingParams], draws_s: Tensor) -> Tensor:
    """Token ids [S] drawn from the likeliest `top_k`, of them `top_p` of the probability, of them `min_p`."""
    vocab_size = scaled_sv.shape[1]
    num_looked = min(vocab_size, max(p.top_k or _FIRST_LOOK for p in params))
    total_s1 = scaled_sv.exp().sum(dim=-1, keepdim=True)
    top_p_s1 = _column([p.top_p for p in params], scaled_sv.device)
    while True:
        values_sk, ids_sk = scaled_sv.topk(num_looked, dim=-1)
        weights_sk = values_sk.exp()
        is_covered = (weights_sk.sum(dim=-1, keepdim=True) >= total_s1 * top_p_s1)[:, 0].tolist()
        if num_looked == vocab_size or all(c or p.top_k > 0 for c, p in zip(is_covered, params, strict=True)):
            break
        num_looked = vocab_size
    rank_k = torch.arange(num_looked, device=scaled_sv.device)
    top_k = torch.tensor([min(p.top_k, vocab_size) or num_looked for p in params], device=scaled_sv.device)
    weights_sk = weights_sk * (rank_k < top_k[:, None])
    bounded = torch.tensor([p.top_k > 0 for p in params], device=scaled_sv.device)[:, None]
    mass_s1 = torch.where(bounded, weights_sk.sum(dim=-1, keepdim=True), total_s1)
    before_sk = weights_sk.cumsum(dim=-1) - weights_sk
    # The token that crosses top_p is the last one in, so the likeliest always is, even if top_p is zero in 32 bits.
    weights_sk = weights_sk * ((before_sk < mass_s1 * top_p_s1) | (rank_k == 0))
    weights_sk = weights_sk * (weights_sk >= _column([p.min_p for p in params], scaled_sv.device))
    return ids_sk.gather(1, _invert(weights_sk, draws_s)[:, None])[:, 0]


def _invert(weights_sk: Tensor, draws_s: Tensor) -> Tensor:
    """The place [S] at which the running sum of the weights passes the drawn share of it; never one of weight 0."""
    sums_sk = weights_sk.double().cumsum(dim=-1)
    total_s1 = sums_sk[:, -1:].contiguous()  # else searchsorted warns, and copies
    place_s1 = torch.searchsorted(sums_sk, draws_s[:, None] * total_s1, right=True)
    last_s1 = torch.searchsorted(sums_sk, total_s1)
    return torch.minimum(place_s1, last_s1)[:, 0]


def _logprobs(logits_sv: Tensor, rows: Sequence[RowSampling], token_ids: Sequence[int]) -> dict[int, TokenLogprob]:
    """Log-probabilities for the rows that want them, by place."""
    wanting = [place for place, row in enumerate(rows) if row.params.logprobs is not None]
    if not wanting:
        return {}
    index = torch.tensor(wanting, device=logits_sv.device)
    log_sv = logits_sv.index_select(0, index).log_softmax(dim=-1)
    chosen = log_sv.gather(1, torch.tensor([[token_ids[place]] for place in wanting], device=logits_sv.device))
    most = min(max(rows[place].params.logprobs or 0 for place in wanting), logits_sv.shape[1])
    values, ids = log_sv.topk(most, dim=-1)
    found = zip(wanting, chosen[:, 0].tolist(), ids.tolist(), values.tolist(), strict=True)
    return {
        place: TokenLogprob(
            token_ids[place], logprob, tuple(zip(tops, values, strict=True))[: rows[place].params.logprobs or 0]
        )
        for place, logprob, tops, values in found
    }


def _column(values: Sequence[float], device: torch.device) -> Tensor:
    return torch.tensor(values, dtype=torch.float32, device=device)[:, None]
