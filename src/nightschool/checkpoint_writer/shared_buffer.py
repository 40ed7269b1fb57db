"""Memory that two processes share by a file descriptor: it has no name, and lives as long as one of them holds it.

A named segment could be removed by a resource tracker when the trainer dies, just when the writer needs it most.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import tempfile

_HUGE_PAGE_BYTES = 2 << 20


class SharedMemory:
    """One buffer that grows, never shrinks, and is used again for every snapshot.

    `view` is writable; whoever made objects upon it (a tensor, say) must drop them before it grows.
    """

    def __init__(self, handle: int) -> None:
        self.handle = handle
        self.size_bytes = 0
        self._map: mmap.mmap | None = None

    @classmethod
    def create(cls) -> SharedMemory:
        """Anonymous memory; where the kernel has none to give by descriptor, a file without a name."""
        if hasattr(os, "memfd_create"):
            with contextlib.suppress(OSError):
                return cls(os.memfd_create("nightschool-checkpoint"))
        with tempfile.TemporaryFile() as file:
            return cls(os.dup(file.fileno()))

    @property
    def view(self) -> mmap.mmap:
        assert self._map is not None, "nothing was reserved yet"
        return self._map

    @property
    def allocated_bytes(self) -> int:
        """How much of it exists already, whoever made it exist."""
        return os.fstat(self.handle).st_blocks * 512

    def reserve(self, size_bytes: int) -> None:
        """Make sure of `size_bytes` whose pages exist: touching a fresh page costs more than the copy into it.

        Raises:
            OSError: If there is no such memory.
        """
        if size_bytes <= self.size_bytes:
            return
        size_bytes += -size_bytes % _HUGE_PAGE_BYTES
        # `posix_fallocate` fails where there is no room; touching a page that cannot be had would kill the process.
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(self.handle, 0, size_bytes)
        else:
            os.ftruncate(self.handle, size_bytes)
        self.attach(size_bytes)

    def attach(self, size_bytes: int) -> None:
        """Map what the other process reserved."""
        if size_bytes <= self.size_bytes:
            return
        flags = mmap.MAP_SHARED | getattr(mmap, "MAP_POPULATE", 0)
        self._map = mmap.mmap(self.handle, size_bytes, flags=flags)
        self.size_bytes = size_bytes

    def close(self) -> None:
        """Give it back, as soon as nobody looks at it any more."""
        if self._map is not None:
            # Whoever still has a view (a tensor) keeps the mapping; the last one of them lets it go.
            with contextlib.suppress(BufferError):
                self._map.close()
            self._map = None
        os.close(self.handle)
        self.handle = -1
        self.size_bytes = 0
