"""A copy of a checkpoint's contents in memory that a writer shares.

The training loop stands still for that copy and for nothing else, so the memory is made ready beforehand and used again:
a copy into pages that exist runs at 6.5 GB/s here, one into fresh pages at 1.2 GB/s. On a GPU the memory is page-locked,
so that the copy runs at the speed of the bus.
"""

from __future__ import annotations

import ctypes
import os
import threading
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor

from nightschool.checkpoint_writer.client import order_bytes
from nightschool.checkpoint_writer.commit import Order
from nightschool.checkpoint_writer.disk import PAGE_BYTES
from nightschool.checkpoint_writer.shared_buffer import SharedMemory
from nightschool.checkpoint_writer.tensorfile import TensorFile
from nightschool.training.checkpoint.contents import CheckpointContents, TensorSource

# Where to, where from, and how many bytes.
_Move = tuple[int, int, int]
_SHARE_BYTES = 8 << 20
_WAITING_BYTES = 1 << 30
_NUM_THREADS = min(4, os.cpu_count() or 1)


class _Moves:
    """Copies that are due, carried out many at a time by several threads: one alone uses half of what two cores get from
    the memory (6.5 against 11.6 GB/s here). The training stands still meanwhile, so its cores are free.

    A tensor that was read from a file lives until it is copied, so that at most about `_WAITING_BYTES` of them do.
    """

    def __init__(self) -> None:
        self._waiting: list[tuple[int, Tensor]] = []
        self._bytes = 0

    def add(self, place: int, source: Tensor) -> None:
        self._waiting.append((place, source))
        self._bytes += source.numel() * source.element_size()
        if self._bytes >= _WAITING_BYTES:
            self.carry_out()

    def carry_out(self) -> None:
        _move([(place, s.data_ptr(), s.numel() * s.element_size()) for place, s in self._waiting])
        self._waiting.clear()
        self._bytes = 0


def _move(moves: list[_Move]) -> None:
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

    def take(self, contents: CheckpointContents, order: Order) -> tuple[list[tuple[str, int, int]], int]:
        """Copy the state into the memory.

        Returns:
            The name, offset and size of each file, and where the memory behind them begins; room for the order is there.
        """
        tensor_files, texts = contents.files()
        files: list[tuple[str, int, int]] = []
        end = 0
        encoded = {name: text.encode() for name, text in texts.items()}
        sizes = [(file.name, file.size_bytes) for file, _ in tensor_files]
        for name, size in sizes + [(name, len(text)) for name, text in encoded.items()]:
            files.append((name, end, size))
            end += size + -size % PAGE_BYTES
        self.make_room(end + len(order_bytes(order, files)), page_locked=contents.on_gpu)
        assert self._flat is not None
        places = {name: offset for name, offset, _ in files}
        moves = _Moves()
        for file, sources in tensor_files:
            self._copy_file(file, sources, places[file.name], moves)
        moves.carry_out()
        with memoryview(self._memory.view) as view:
            for name, text in encoded.items():
                view[places[name] : places[name] + len(text)] = text
        if contents.on_gpu:
            torch.cuda.synchronize()
        return files, end

    @torch.no_grad()
    def _copy_file(self, file: TensorFile, sources: dict[str, TensorSource], offset: int, moves: _Moves) -> None:
        """Copy the header, and what is not a plain run of bytes on the host; leave the rest to `moves`."""
        assert self._flat is not None
        with memoryview(self._memory.view) as view:
            view[offset : offset + len(file.header)] = file.header
        offset += len(file.header)
        for info in file.tensors:
            source = sources[info.name].tensor()
            if source.device.type == "cpu" and source.is_contiguous():
                moves.add(self._flat.data_ptr() + offset, source)
            else:
                place = self._flat[offset : offset + info.size_bytes].view(source.dtype).view(source.shape)
                place.copy_(source, non_blocking=True)
            offset += info.size_bytes

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
