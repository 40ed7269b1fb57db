"""Loss and accuracy of a model on tokens that carry loss."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from nightschool.data.batches import Batches
from nightschool.data.chat.render_examples import render_examples
from nightschool.data.example import Example
from nightschool.evaluation.heldout import as_found, heldout_sum
from nightschool.layers.forward import document_loss, prepare
from nightschool.models.load import LoadedModel
from nightschool.models.quiet import quiet_libraries

_TOKENS_PER_BATCH = 2048
LARGEST_PERPLEXITY_LOSS = 20.0
"""`perplexity` is that of at most this loss in nats, so that one data set cannot bury the mean of all."""


@dataclass(frozen=True)
class TokenFigures:
    """Over `tokens` that carry loss, of `samples` examples: the loss in nats a token, and how many were the likeliest of all.

    `cut_tokens` would have carried loss, and lay beyond the longest length.
    """

    loss: float
    tokens: int
    correct: int
    samples: int
    cut_tokens: int

    @property
    def accuracy(self) -> float:
        return self.correct / self.tokens

    @property
    def perplexity(self) -> float:
        return math.exp(min(self.loss, LARGEST_PERPLEXITY_LOSS)) if math.isfinite(self.loss) else self.loss

    @property
    def perplexity_uncapped(self) -> float:
        return math.exp(min(self.loss, 700.0)) if math.isfinite(self.loss) else self.loss


def token_figures(loaded: LoadedModel, examples: Sequence[Example], max_seq_len: int) -> TokenFigures | None:
    """The figures of a model, each answer after its question; None if no token carries loss.

    Raises:
        DataError: If examples cannot be rendered in the model's chat template.
    """
    rendered = render_examples(loaded.tokenizer, examples, min(max_seq_len, loaded.context_tokens))
    cut = sum(document.cut_trained for document in rendered)
    rendered = [document for document in rendered if document.trained_tokens]
    if not rendered:
        return None
    batches = Batches(rendered, tokens_per_batch=_TOKENS_PER_BATCH, seed=0)
    model = loaded.model
    device = next(model.parameters()).device
    correct = torch.zeros((), dtype=torch.int64, device=device)
    with quiet_libraries(), as_found(model):
        path = prepare(model)
        total, tokens = heldout_sum(
            model,
            (batches.get(0, index) for index in range(batches.num_batches(0))),
            forward=lambda batch: document_loss(model, path, batch, likeliest=correct),
            device=device,
        )
    return TokenFigures(total / tokens, tokens, int(correct), len(rendered), cut)
