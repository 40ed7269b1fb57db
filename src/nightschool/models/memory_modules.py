"""The memory modules of a model: what they are made from, and whether they fit a base."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn

from nightschool.errors import ModelError
from nightschool.layers.forward import causal_lm
from nightschool.layers.memory_fusion import MemoryReader
from nightschool.layers.memory_gate import MemoryGate

SUBJECT_CLOSED_BELOW, RELATION_CLOSED_BELOW = 0.5, 0.3
"""An entry whose subject or relation is less likely than this to be its question's is not read, unless a shape says otherwise."""


@dataclass(frozen=True)
class MemoryShape:
    """What the memory modules of a model are made from. A rank of 0 means the full width.

    Entries are read as the states after the first `encoder_layers` layers of the base; `fusion_layers` are the layers, counted from 0,
    whose output the fusion adds to. `anchor_id` is put before each entry: the first token of a text is a sink of attention, and
    its state says little of it. An entry is not read whose subject is the question's with a probability below `subject_closed_below`, or
    whose relation with one below `relation_closed_below`.
    """

    hidden_size: int
    encoder_layers: int
    fusion_layers: tuple[int, ...]
    anchor_id: int
    knowledge_dim: int = 1536
    gate_rank: int = 128
    fusion_rank: int = 128
    subject_closed_below: float = SUBJECT_CLOSED_BELOW
    relation_closed_below: float = RELATION_CLOSED_BELOW

    @property
    def layers(self) -> tuple[int, ...]:
        """The layers whose output the memory looks at, or adds to."""
        return tuple(sorted({self.encoder_layers - 1, *self.fusion_layers}))

    def to_json(self) -> dict[str, Any]:
        """Plain values that `MemoryShape(**values)` takes back."""
        return asdict(self) | {"fusion_layers": list(self.fusion_layers)}


def shape_for(
    model: nn.Module,
    tokenizer: Any,
    *,
    encoder_layers: int | None = None,
    fusion_layers: Sequence[int] | None = None,
    knowledge_dim: int | None = None,
    gate_rank: int = 128,
    fusion_rank: int = 128,
) -> MemoryShape:
    """The shape for a base: entries are read after four fifths of its layers, and fused there and half-way from there to the end.

    Without `knowledge_dim` it is 1536, or twice the width of a base where that is less.

    Raises:
        ModelError: If a layer does not exist, or a fusion layer lies before the entries are read.
    """
    count = len(decoder_layers(model))
    depth = encoder_layers if encoder_layers is not None else max(1, round(0.8 * count))
    if not 1 <= depth <= count:
        raise ModelError(f"memory.encoder_layers is {depth}, and the base has {count} layers. Write 1 to {count}.")
    fused = tuple(fusion_layers) if fusion_layers is not None else (depth - 1, (depth + count) // 2 - 1)
    fused = tuple(sorted(set(fused)))
    if not fused or fused[0] < depth - 1 or fused[-1] >= count:
        raise ModelError(
            f"memory.fusion_layers is {list(fused)}: entries are read after {depth} layers, so fusion layers lie from {depth - 1} to "
            f"{count - 1}. Correct it, or leave it out."
        )
    anchors = (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id)
    width = int(causal_lm(model).config.get_text_config().hidden_size)
    return MemoryShape(
        hidden_size=width,
        encoder_layers=depth,
        fusion_layers=fused,
        anchor_id=next((int(token) for token in anchors if token is not None), 0),
        knowledge_dim=min(1536, 2 * width) if knowledge_dim is None else knowledge_dim,
        gate_rank=gate_rank,
        fusion_rank=fusion_rank,
    )


class MemoryModules(nn.Module):
    """All that learns: the gate, which finds entries, and the reader. The same seed gives the same weights."""

    def __init__(self, shape: MemoryShape, *, seed: int = 0) -> None:
        super().__init__()
        self.shape = shape
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.gate = MemoryGate(shape.hidden_size, shape.knowledge_dim, shape.gate_rank)
            self.reader = MemoryReader(shape.hidden_size, shape.fusion_rank, len(shape.fusion_layers))


def decoder_layers(model: nn.Module) -> nn.ModuleList:
    """The decoder layers of a causal language model of transformers.

    Raises:
        ModelError: If it has no such list.
    """
    inner = causal_lm(model)
    count = int(inner.config.get_text_config().num_hidden_layers)
    for module in inner.modules():
        if isinstance(module, nn.ModuleList) and len(module) == count:
            return module
    raise ModelError(f"{type(inner).__name__} has no list of its {count} layers, so no memory can be attached to it.")


def check_fits(model: nn.Module, shape: MemoryShape) -> None:
    """Refuse a base that the modules were not made for. Raises ModelError with both sizes."""
    layers = decoder_layers(model)
    width = int(causal_lm(model).config.get_text_config().hidden_size)
    if shape.hidden_size != width:
        raise ModelError(
            f"The memory modules are made for a base of width {shape.hidden_size}, and this one has {width}. "
            "Load them on the base that they were trained on."
        )
    if max(shape.layers) >= len(layers):
        raise ModelError(
            f"The memory modules read at layer {max(shape.layers)}, and this base has {len(layers)} layers. "
            "Load them on the base that they were trained on."
        )
