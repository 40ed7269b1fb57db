"""How clearly a model prefers the better answer of a pair: the log-likelihoods of both, and their difference.

P  preference pairs
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from nightschool.data.chat.render_examples import render_examples
from nightschool.data.example import Example
from nightschool.data.pairs import PairBatches
from nightschool.errors import NothingToTrain
from nightschool.evaluation.heldout import as_found, autocast, on_device
from nightschool.evaluation.scores import PairMargin
from nightschool.layers.forward import ForwardPath, document_log_probs, prepare
from nightschool.models.load import LoadedModel

_TOKENS_PER_BATCH = 2048


def pair_log_probs(
    model: nn.Module,
    path: ForwardPath,
    batches: PairBatches,
    *,
    device: torch.device,
    compute_dtype: torch.dtype = torch.float32,
) -> Tensor:
    """The log-likelihoods [P, 2] in nats of the better and the worse answer of each pair, float32 on the CPU.

    The model is asked as it is, without dropout and without gradients, and left as it was found.
    """
    said_p2 = torch.empty_like(batches.reference)
    with as_found(model), torch.no_grad(), autocast(device, compute_dtype):
        for index in range(batches.num_batches(0)):
            log_probs_p2 = document_log_probs(model, path, on_device(batches.get(0, index), device)).view(-1, 2)
            said_p2[batches.examples_of(0, index)] = log_probs_p2.float().cpu()
    return said_p2


def pair_margins(loaded: LoadedModel, pairs: Sequence[Example], max_seq_len: int) -> tuple[PairMargin, ...]:
    """The margin of each pair; those of which an answer does not fit into `max_seq_len` tokens are left out.

    Raises:
        DataError: If a pair cannot be rendered for this model.
    """
    if not pairs:
        return ()
    try:
        batches = PairBatches(
            render_examples(loaded.tokenizer, pairs, max_seq_len), tokens_per_batch=_TOKENS_PER_BATCH, seed=0
        )
    except NothingToTrain:
        return ()
    with as_found(loaded.model):
        said_p2 = pair_log_probs(
            loaded.model, prepare(loaded.model), batches, device=next(loaded.model.parameters()).device
        )
    margins = (said_p2[:, 0] - said_p2[:, 1]).tolist()
    return tuple(
        PairMargin(one.digest, one.question or "", one.answer or "", one.rejected, margin)
        for one, margin in zip((pairs[number] for number in batches.kept), margins, strict=True)
    )
