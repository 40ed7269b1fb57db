"""Where each expert of a stock folder lies in its files.

Folders have gate, up and down of each expert by themselves, or the two matrices of all experts of a layer as two tensors
(`experts.gate_up_proj` [N,2E,D] and `experts.down_proj` [N,D,E]), as transformers has them in memory.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

import torch

from nightschool.checkpoint_writer.tensorfile_places import TensorPlace, tensor_places
from nightschool.errors import Damaged
from nightschool.layers.expert_streaming.stock import Piece, StockFile
from nightschool.layers.expert_streaming.stream import ExpertShape
from nightschool.models.folder import FolderInfo

# How stock folders name one matrix of one expert: gate and up, which are one here, and down.
_STOCK = {
    "mixtral": (".block_sparse_moe.experts.{}.w1.weight", ".block_sparse_moe.experts.{}.w3.weight", ".block_sparse_moe.experts.{}.w2.weight"),
}  # fmt: skip
_USUAL = (".mlp.experts.{}.gate_proj.weight", ".mlp.experts.{}.up_proj.weight", ".mlp.experts.{}.down_proj.weight")
_ONE_EXPERT = re.compile(r"\.experts\.\d+\.")
_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
}  # fmt: skip


def stock_names(model_type: str) -> tuple[str, str, str]:
    """How a stock folder names gate, up and down of an expert, below the name of its layer."""
    return _STOCK.get(model_type, _USUAL)


def layer_of(experts: str) -> str:
    """The name of the layer that a module of experts, `model.layers.0.mlp.experts`, is in."""
    return experts.removesuffix(".mlp.experts")


class ExpertFiles:
    """The experts of a folder: `records` has the pieces of each, gate, up and down, and `names` those of their tensors."""

    def __init__(self, facts: FolderInfo, shape: ExpertShape, model_type: str, ref: str) -> None:
        """Look at the headers of the files, and at nothing of the experts.

        Raises:
            Damaged: If a tensor is missing, unexpected, of another shape, or in no format of weights, or a file is broken.
        """
        self._facts, self._shape, self._patterns, self._ref = facts, shape, stock_names(model_type), ref
        self._file_of = {fact.name: fact.file for fact in facts.tensors}
        self._open: dict[str, tuple[StockFile, dict[str, TensorPlace]]] = {}
        self.names: set[str] = set()
        self.records = [record for layer in shape.layers for record in self._of_layer(layer)]
        more = [name for name in self._file_of if _ONE_EXPERT.search(name) and name not in self.names]
        if more:
            raise Damaged(
                f"The files of the base {ref!r} hold {more[0]}, and by its configuration there are {shape.num_experts} experts in "
                f"{len(shape.layers)} layers. Fetch it again."
            )

    def _of_layer(self, layer: str) -> Iterator[tuple[Piece, ...]]:
        n, d, e = self._shape.num_experts, self._shape.hidden_size, self._shape.expert_size
        if f"{layer}.gate_up_proj" in self._file_of:
            gate_up = self._pieces(f"{layer}.gate_up_proj", (n, 2 * e, d), n)
            yield from zip(gate_up, self._pieces(f"{layer}.down_proj", (n, d, e), n), strict=True)
            return
        for expert in range(n):
            gate, up, down = (layer_of(layer) + pattern.format(expert) for pattern in self._patterns)
            yield *self._pieces(gate, (e, d)), *self._pieces(up, (e, d)), *self._pieces(down, (d, e))

    def _pieces(self, name: str, shape: tuple[int, ...], count: int = 1) -> list[Piece]:
        """A tensor in so many equal pieces."""
        if name not in self._file_of:
            raise Damaged(f"The tensor {name} of the base {self._ref!r} is not in its files. Fetch it again.")
        file, places = self._opened(self._file_of[name])
        place = places[name]
        if place.shape != shape:
            raise Damaged(
                f"The tensor {name} of the base {self._ref!r} has the shape {list(place.shape)}, and its configuration says "
                f"{list(shape)}. Fetch it again."
            )
        if place.dtype not in _DTYPES:
            raise Damaged(
                f"The tensor {name} of the base {self._ref!r} is {place.dtype}, and experts are not. Fetch it again."
            )
        self.names.add(name)
        size = (place.end - place.begin) // count
        numbers, dtype = size // _DTYPES[place.dtype].itemsize, _DTYPES[place.dtype]
        return [Piece(file, place.begin + number * size, numbers, dtype) for number in range(count)]

    def _opened(self, name: str) -> tuple[StockFile, dict[str, TensorPlace]]:
        if name not in self._open:
            path = self._facts.path / name
            try:
                file = StockFile(path)
                self._open[name] = file, tensor_places(path)
            except (OSError, ValueError) as error:
                raise Damaged(f"{path} of the base {self._ref!r} cannot be read: {error}. Fetch it again.") from None
        return self._open[name]
