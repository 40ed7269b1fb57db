"""Where an engine's models look things up: a memory, asked with the tokens and by the embeddings of their base."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from tokenizers import Tokenizer

from nightschool.data.example import Message
from nightschool.engine.compute import COMPUTE
from nightschool.engine.engine import Engine
from nightschool.engine.pool import BoundEngine
from nightschool.errors import ModelError
from nightschool.layers.memory_reading import Address, Candidate, MemoryReading
from nightschool.memory.encoders.base import BaseEncoder
from nightschool.memory.encoders.embeddings import TokenEmbeddings
from nightschool.memory.encoders.heads import Heads
from nightschool.memory.encoders.names import Vocabulary
from nightschool.memory.memory import Found, Memory
from nightschool.models.memory_version import gate_heads


def open_memory(folder: Path, bound: BoundEngine) -> Memory:
    """A memory as a loaded model asks it, by the heads of its own gate if it has one. The index is opened, or made.

    Raises:
        NotFound: If there is no such memory.
        ModelError: If the model's tokenizer cannot be read apart from it.
    """
    vocabulary, embeddings = Vocabulary(_fast_tokenizer(bound.tokenizer)), _embeddings_of(bound)
    modules = bound.engine.memory_modules(bound.binding)
    heads = None
    if modules is not None:
        arrays = {name: tensor.numpy() for name, tensor in gate_heads(modules).items()}
        heads = Heads.of(arrays, embeddings.hidden_size, bound.binding.label)
    return Memory.open(folder, BaseEncoder(embeddings, vocabulary, heads), vocabulary, on_purge=forget_entries)


def forget_entries() -> None:
    """Let all engines of this process let go of what they keep of entries; requests that are being answered keep theirs to their end.

    After a purge nothing tells which of it was purged. Not from the compute thread.
    """

    def forget() -> None:
        for member in COMPUTE.members:
            if isinstance(member, Engine):
                member.forget_entries()

    if COMPUTE.members:
        COMPUTE.call(forget)


def reading_of(found: Iterable[Found]) -> MemoryReading:
    """Entries as the layers of a model read them. Each answer needs one of its own."""
    return MemoryReading.of(
        Candidate(
            one.id,
            one.entry.row,
            one.tokens,
            (one.subject_cosine + one.relation_cosine) / 2,
            None if one.address is None else Address(*one.address, one.told, one.asked),
        )
        for one in found
    )


def last_question(messages: Sequence[Message]) -> str:
    """What is asked: the last turn of a user. Nothing of an answer is in it."""
    return next((message.content for message in reversed(messages) if message.role == "user"), "")


def _fast_tokenizer(tokenizer: Any) -> Tokenizer:
    if not tokenizer.is_fast:
        raise ModelError(
            f"{type(tokenizer).__name__} is a slow tokenizer, and memories need a fast one (tokenizer.json)."
        )
    # A copy: encoding with other settings changes a tokenizer, and requests encode meanwhile.
    return Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())


def _embeddings_of(bound: BoundEngine) -> TokenEmbeddings:
    """The table of the base's tokens; it shares the model's bytes where numpy knows the type."""
    table = cast(Any, bound.engine.loaded.model).get_input_embeddings().weight.detach().cpu()
    if table.dtype == torch.bfloat16:
        return TokenEmbeddings(table.view(torch.uint16).numpy(), is_bfloat16=True)
    return TokenEmbeddings(table.numpy())
