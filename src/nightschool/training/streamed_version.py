"""A model whose experts are streamed as a stock folder: written expert by expert, and read again in the same way.

plain transformers could only read all of it at once, which may not fit here. So each tensor of the folder is compared
bit by bit with the one that was trained; that plain transformers makes the same model of such a folder is shown by tests.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nightschool.data.chat.render import stop_token_ids
from nightschool.errors import ModelError
from nightschool.layers.expert_streaming.record import WEIGHTS
from nightschool.layers.expert_streaming.store import Visit
from nightschool.layers.expert_streaming.stream import ExpertStream
from nightschool.models.expert_files import layer_of, stock_names
from nightschool.models.export import compare_tokenizers, save_version_folder
from nightschool.models.load import LoadedModel
from nightschool.models.streamed import stock_dense_name
from nightschool.models.strict import distinct_tensors
from nightschool.models.version_folder import OnWritten
from nightschool.training.checkpoint.checkpoint_reader import open_group
from nightschool.training.checkpoint.contents import CheckpointContents, TensorSource, sources_of


def write_streamed_version(
    loaded: LoadedModel, stream: ExpertStream, folder: Path, on_written: OnWritten | None = None
) -> float:
    """As `models.version_folder.write_version`; the tensors are equal or it fails, so the difference is 0.

    Raises:
        ModelError: If what is read again is not what was trained.
    """
    stream.flush()
    model: Any = loaded.model
    sources = [*_dense_sources(model), *_expert_sources(stream, str(model.config.model_type))]

    def write_weights(to: Path) -> None:
        for name, pieces in CheckpointContents({"model": sources}, {}, {}).stream():
            with (to / name).open("wb") as file:
                file.writelines(pieces)

    stop_ids = sorted(stop_token_ids(loaded.tokenizer))
    save_version_folder(model, loaded.tokenizer, folder, stop_ids=stop_ids, write_weights=write_weights)
    if on_written is not None:
        on_written(folder)
    _compare(sources, folder)
    compare_tokenizers(loaded.tokenizer, folder)
    return 0.0


def _dense_sources(model: Any) -> list[TensorSource]:
    model_type = str(model.config.model_type)
    return sources_of({stock_dense_name(name, model_type): tensor for name, tensor in distinct_tensors(model).items()})


def _expert_sources(stream: ExpertStream, model_type: str) -> Iterator[TensorSource]:
    """Gate, up and down of each expert. Files have them in the order of names, so those of one expert are side by side."""
    shape, last = stream.shape, _Last(stream)
    d, e = shape.hidden_size, shape.expert_size
    sizes = ((e, d), (e, d), (d, e))
    for layer, name in enumerate(shape.layers):
        for expert in range(shape.num_experts):
            index = stream.index(layer, expert)
            for part, (pattern, size) in enumerate(zip(stock_names(model_type), sizes, strict=True)):
                yield TensorSource(
                    layer_of(name) + pattern.format(expert), size, stream.store.layout.dtype, last.reader(index, part)
                )


class _Last:
    """The expert that was read last."""

    def __init__(self, stream: ExpertStream) -> None:
        self._stream = stream
        self._index, self._weights = -1, torch.empty(0)

    def reader(self, index: int, part: int) -> Any:
        """What reads gate (0), up (1) or down (2)."""

        def read() -> Tensor:
            if index != self._index:
                for _, record in self._stream.store.walk([Visit(index, (WEIGHTS,))]):
                    self._index, self._weights = index, record[WEIGHTS].clone()
            gate_up, down = self._stream.shape.matrices(self._weights)
            return (*gate_up.chunk(2), down)[part]

        return read


def _compare(sources: list[TensorSource], folder: Path) -> None:
    stored = open_group(folder, "model")
    names = {source.name for source in sources}
    differing = sorted(names ^ set(stored))
    differing += [
        source.name
        for source in sorted(sources, key=lambda source: source.name)
        if source.name in stored and not torch.equal(source.tensor().cpu(), stored[source.name])
    ]
    if differing:
        raise ModelError(
            f"The folder {folder} lost {len(differing)} of {len(names)} tensors of the trained model, such as {differing[0]}. "
            "It is not published; what it was made from is still whole."
        )
