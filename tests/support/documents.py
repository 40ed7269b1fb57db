"""Batches of random documents for tests, in the shape that `nightschool.data.batches` makes."""

from dataclasses import dataclass

import torch

ARCHITECTURES = ["tiny-gpt-neox", "tiny-llama", "tiny-qwen3", "tiny-qwen3-moe", "tiny-mixtral"]


@dataclass
class Documents:
    input_ids: torch.Tensor
    position_ids: torch.Tensor
    labels: torch.Tensor
    weights: torch.Tensor
    cu_seqlens: torch.Tensor


def documents_of(lengths, vocab_size, *, seed=0, untrained=0):
    """Random documents end to end; the first `untrained` positions of each carry no loss."""
    generator = torch.Generator().manual_seed(seed)
    rows = [torch.randint(0, vocab_size, (length,), generator=generator) for length in lengths]
    labels = [torch.cat([row[1:], torch.tensor([-100])]) for row in rows]
    places = torch.cat([torch.arange(length) for length in lengths])
    labels_n = torch.cat(labels)
    weights = ((labels_n >= 0) & (places >= untrained)).float()
    bounds = torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32)
    return Documents(torch.cat(rows)[None], places[None], labels_n[None], weights[None], bounds)
