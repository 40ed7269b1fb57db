"""A model in this process, ready to answer. Imported only by verbs that need torch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch

from nightschool.data.chat.render import render_prompt
from nightschool.data.example import Message
from nightschool.engine.engine import Engine
from nightschool.engine.handle import Handle
from nightschool.engine.request import GenerationRequest, SamplingParams
from nightschool.models.dtype import probe_dtype, resolve_device
from nightschool.models.load import LoadedModel, load_base
from nightschool.models.quiet import quiet_libraries
from nightschool.store.home import Home


def serving_dtype(device: torch.device) -> torch.dtype:
    """bf16 on a GPU that computes it natively; fp32 elsewhere, as trained."""
    return probe_dtype(device) if device.type == "cuda" else torch.float32


class LocalModel:
    """A loaded model and the engine that answers with it.

    `ref` is `name@version` for a version of the registry, else what was asked for.
    """

    def __init__(self, home: Home, ref: str, *, num_rows: int = 1) -> None:
        with quiet_libraries():
            device = resolve_device()
            self.loaded: LoadedModel = load_base(ref, home, device=device, dtype=serving_dtype(device))
        self.ref = self.loaded.ref
        self.engine = Engine(self.loaded, self.ref, num_rows=num_rows)

    def ask(self, request_id: str, messages: Sequence[Message], params: SamplingParams) -> Handle:
        """Queue a conversation.

        Raises:
            PromptTooLong: If it does not fit the context.
        """
        prompt_ids = render_prompt(self.loaded.tokenizer, messages)
        return self.engine.submit(GenerationRequest(request_id, self.engine.binding, prompt_ids, params))

    def close(self) -> None:
        self.engine.close()


@contextmanager
def local_model(home: Home, ref: str, *, num_rows: int = 1) -> Iterator[LocalModel]:
    """Load a model for the time of a block."""
    model = LocalModel(home, ref, num_rows=num_rows)
    try:
        yield model
    finally:
        model.close()
