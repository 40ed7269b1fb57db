"""What a checkpoint will hold: texts, and tensors wherever they lie, in memory, on a GPU, or in a file."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from nightschool.checkpoint_writer.disk import Pieces
from nightschool.checkpoint_writer.tensorfile import TensorFile, TensorInfo, index_name, index_of, plan_files

DTYPE_CODES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64",
    torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
    torch.uint16: "U16", torch.uint32: "U32", torch.uint64: "U64", torch.complex64: "C64",
    torch.float8_e4m3fn: "F8_E4M3", torch.float8_e5m2: "F8_E5M2",
}  # fmt: skip


@dataclass(frozen=True)
class TensorSource:
    """A named tensor that is read when its turn comes, so that a state larger than the memory can be saved.

    `read` returns the tensor as it is now, with this shape and dtype: the run's own, or a fresh copy from wherever it
    lies. What has `pieces` in its place is read in rows along its first dimension, each of which is there until the next is
    asked for, so that the whole never is. `on_gpu` says that it is found there.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    read: Callable[[], Tensor] | None = None
    on_gpu: bool = False
    pieces: Callable[[], Iterator[Tensor]] | None = None

    @property
    def info(self) -> TensorInfo:
        """The tensor as a safetensors file describes it."""
        return TensorInfo(self.name, DTYPE_CODES[self.dtype], self.shape)

    def tensor(self) -> Tensor:
        """The tensor; fails if it is not the one that was announced, because the file's header is written by then."""
        tensor = torch.stack([piece.clone() for piece in self.pieces()]) if self.pieces else self._whole()
        assert (tuple(tensor.shape), tensor.dtype) == (self.shape, self.dtype), f"{self.name} is another tensor now"
        return tensor

    def parts(self) -> Iterator[Tensor]:
        """The tensor as it can be had, whole or in rows, each of which is there until the next is asked for."""
        if self.pieces is None:
            yield self.tensor()
            return
        count = 0
        for piece in self.pieces():
            same = (tuple(piece.shape), piece.dtype) == (self.shape[1:], self.dtype)
            assert same, f"{self.name} is another tensor now"
            count += 1
            yield piece
        assert count == self.shape[0], f"{self.name} has {count} rows now"

    def _whole(self) -> Tensor:
        assert self.read is not None, f"{self.name} comes from nowhere"
        return self.read().detach()


def sources_of(tensors: Mapping[str, Tensor]) -> list[TensorSource]:
    """Tensors that lie in memory; they are read where they are, not copied."""
    return [
        TensorSource(name, tuple(tensor.shape), tensor.dtype, tensor.detach, tensor.is_cuda)
        for name, tensor in tensors.items()
    ]


@dataclass(frozen=True)
class CheckpointContents:
    """What a checkpoint will hold: `tensors` by group (`model`, `optimizer`, …), `texts` by file name.

    The tensors are those of the run itself, which the next step changes: write or copy them before.
    """

    tensors: dict[str, list[TensorSource]]
    texts: dict[str, str]
    facts: dict[str, Any]

    def files(self) -> tuple[list[tuple[TensorFile, dict[str, TensorSource]]], dict[str, str]]:
        """The tensor files with what is in them, and all texts, the indices of groups in several files among them."""
        files, texts = [], dict(self.texts)
        for stem, sources in self.tensors.items():
            by_name = {source.name: source for source in sources}
            planned = plan_files(stem, [source.info for source in sources])
            files += [(file, by_name) for file in planned]
            if len(planned) > 1:
                texts[index_name(stem)] = index_of(planned)
        return files, texts

    @property
    def tensor_bytes(self) -> int:
        return sum(source.info.size_bytes for group in self.tensors.values() for source in group)

    @property
    def on_gpu(self) -> bool:
        return any(source.on_gpu for group in self.tensors.values() for source in group)

    def stream(self) -> Iterator[tuple[str, Pieces]]:
        """The files as streams straight from the tensors, for a writer in this process."""
        files, texts = self.files()
        for file, sources in files:
            yield file.name, _pieces(file, sources)
        for name, text in texts.items():
            yield name, [text.encode()]


def _pieces(file: TensorFile, sources: dict[str, TensorSource]) -> Pieces:
    yield file.header
    for info in file.tensors:
        yield from map(tensor_bytes, sources[info.name].parts())


def tensor_bytes(tensor: Tensor) -> memoryview:
    """The bytes of a tensor; a copy only where it is not contiguous, or not in the memory of the host."""
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    array: Any = flat.view(torch.uint8).numpy()
    return memoryview(array) if flat.numel() else memoryview(b"")
