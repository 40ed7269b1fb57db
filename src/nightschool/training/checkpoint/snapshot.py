"""The state of a run at one moment, on its way to a checkpoint: named tensors and texts.

`Snapshot` copies it into memory that a writer shares. The training loop stands still for that copy and for nothing
else, so the memory is made ready beforehand and used again: a copy into pages that exist runs at 6.5 GB/s here, one
into fresh pages at 1.2 GB/s. On a GPU the memory is page-locked, so that the copy runs at the speed of the bus.
"""

from __future__ import annotations

import ctypes
import os
import threading
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from nightschool.checkpoint_writer.client import order_bytes
from nightschool.checkpoint_writer.commit import Contents, Order
from nightschool.checkpoint_writer.disk import PAGE_BYTES, Pieces
from nightschool.checkpoint_writer.shared_buffer import SharedMemory
from nightschool.checkpoint_writer.tensorfile import (
    TensorFile,
    TensorInfo,
    index_name,
    index_of,
    plan_files,
)

DTYPE_CODES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64",
    torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
    torch.uint16: "U16", torch.uint32: "U32", torch.uint64: "U64", torch.complex64: "C64",
    torch.float8_e4m3fn: "F8_E4M3", torch.float8_e5m2: "F8_E5M2",
}  # fmt: skip


@dataclass(frozen=True)
class State:
    """What a checkpoint will hold: `tensors` by group (`model`, `optimizer`, …) and name, `texts` by file name.

    The tensors are those of the run itself, which the next step changes: write or copy them before.
    """

    tensors: dict[str, dict[str, Tensor]]
    texts: dict[str, str]
    facts: dict[str, Any]

    def files(self) -> tuple[list[tuple[str, TensorFile]], dict[str, str]]:
        """The tensor files, each with its group, and all texts, the indices of groups in several files among them."""
        files, texts = [], dict(self.texts)
        for stem, tensors in self.tensors.items():
            facts = [TensorInfo(name, DTYPE_CODES[t.dtype], tuple(t.shape)) for name, t in tensors.items()]
            planned = plan_files(stem, facts)
            files += [(stem, file) for file in planned]
            if len(planned) > 1:
                texts[index_name(stem)] = index_of(planned)
        return files, texts

    @property
    def tensor_bytes(self) -> int:
        return sum(t.numel() * t.element_size() for group in self.tensors.values() for t in group.values())

    def contents(self) -> Contents:
        """The files as streams straight from the tensors, for a writer in this process."""
        files, texts = self.files()

        def contents() -> Iterator[tuple[str, Pieces]]:
            for stem, file in files:
                yield file.name, self._stream(self.tensors[stem], file)
            for name, text in texts.items():
                yield name, [text.encode()]

        return contents

    def _stream(self, tensors: dict[str, Tensor], file: TensorFile) -> Pieces:
        yield file.header
        for facts in file.tensors:
            yield tensor_bytes(tensors[facts.name])


def tensor_bytes(tensor: Tensor) -> memoryview:
    """The bytes of a tensor; a copy only where it is not contiguous, or not in the memory of the host."""
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    array: Any = flat.view(torch.uint8).numpy()
    return memoryview(array) if flat.numel() else memoryview(b"")


# Where to, where from, and how many bytes.
_Move = tuple[int, int, int]
_SHARE_BYTES = 8 << 20
_NUM_THREADS = min(4, os.cpu_count() or 1)


def _move(moves: list[_Move]) -> None:
    """Copy memory with several threads: one alone uses half of what two cores get from it (6.5 against 11.6 GB/s here).

    The training stands still meanwhile, so its cores are free.
    """
    shares = [
        (to + start, source + start, min(_SHARE_BYTES, count - start))
        for to, source, count in moves
        for start in range(0, count, _SHARE_BYTES)
    ]
    if sum(count for _, _, count in shares) <= _SHARE_BYTES or _NUM_THREADS == 1:
        for share in shares:
            ctypes.memmove(*share)
        return
    waiting = iter(shares)

    def work() -> None:
        for share in waiting:  # a list's iterator hands each item to one thread
            ctypes.memmove(*share)  # without the interpreter's lock

    threads = [threading.Thread(target=work) for _ in range(_NUM_THREADS - 1)]
    for thread in threads:
        thread.start()
    work()
    for thread in threads:
        thread.join()


class Snapshot:
    """Shared memory with the newest state in it."""

    def __init__(self, memory: SharedMemory) -> None:
        self._memory = memory
        self._flat: Tensor | None = None
        self._page_locked = False

    def make_room(self, size_bytes: int, *, page_locked: bool) -> None:
        """Map at least so much of the memory; `page_locked` for copies from a GPU.

        Raises:
            OSError: If there is no such memory.
        """
        if size_bytes > self._memory.size_bytes or self._flat is None:
            self._let_go()
            self._memory.reserve(size_bytes)
            self._flat = torch.frombuffer(self._memory.view, dtype=torch.uint8)
        if page_locked and not self._page_locked:
            # Without it the copy would pass through a small buffer of the driver, piece by piece.
            cudart: Any = torch.cuda.cudart()  # type: ignore[no-untyped-call]
            locked = cudart.cudaHostRegister(self._flat.data_ptr(), self._flat.numel(), 0)
            self._page_locked = int(locked) == 0
            if not self._page_locked:  # then the copy is slower, and as right
                with suppress(RuntimeError):
                    torch.zeros(1, device="cuda")  # takes the error with it that the next kernel would report

    def take(self, state: State, order: Order) -> tuple[list[tuple[str, int, int]], int]:
        """Copy the state into the memory.

        Returns:
            The name, offset and size of each file, and where the memory behind them begins; room for the order is there.
        """
        tensor_files, texts = state.files()
        on_gpu = any(t.is_cuda for group in state.tensors.values() for t in group.values())
        files: list[tuple[str, int, int]] = []
        end = 0
        encoded = {name: text.encode() for name, text in texts.items()}
        sizes = [(file.name, file.size_bytes) for _, file in tensor_files]
        for name, size in sizes + [(name, len(text)) for name, text in encoded.items()]:
            files.append((name, end, size))
            end += size + -size % PAGE_BYTES
        self.make_room(end + len(order_bytes(order, files)), page_locked=on_gpu)
        assert self._flat is not None
        places = {name: offset for name, offset, _ in files}
        moves: list[_Move] = []
        for stem, file in tensor_files:
            moves += self._copy_file(state.tensors[stem], file, places[file.name])
        _move(moves)
        with memoryview(self._memory.view) as view:
            for name, text in encoded.items():
                view[places[name] : places[name] + len(text)] = text
        if on_gpu:
            torch.cuda.synchronize()
        return files, end

    @torch.no_grad()
    def _copy_file(self, tensors: dict[str, Tensor], file: TensorFile, offset: int) -> list[_Move]:
        """Copy the header, and what is no plain run of bytes on the host; return the moves for the rest."""
        assert self._flat is not None
        moves = []
        with memoryview(self._memory.view) as view:
            view[offset : offset + len(file.header)] = file.header
        offset += len(file.header)
        for facts in file.tensors:
            source = tensors[facts.name].detach()
            if source.device.type == "cpu" and source.is_contiguous():
                moves.append((self._flat.data_ptr() + offset, source.data_ptr(), facts.size_bytes))
            else:
                place = self._flat[offset : offset + facts.size_bytes].view(source.dtype).view(source.shape)
                place.copy_(source, non_blocking=True)
            offset += facts.size_bytes
        return moves

    def close(self) -> None:
        """Let go of the memory, which then is given back."""
        self._let_go()
        self._memory.close()

    def _let_go(self) -> None:
        if self._flat is not None and self._page_locked:
            cudart: Any = torch.cuda.cudart()  # type: ignore[no-untyped-call]
            cudart.cudaHostUnregister(self._flat.data_ptr())
            self._page_locked = False
        self._flat = None
