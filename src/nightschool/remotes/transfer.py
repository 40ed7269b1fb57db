"""What happens to bytes on their way to a store: paced, counted, hashed, and stopped when somebody asks."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Protocol

from nightschool.errors import Damaged

# How much a paced transfer may send at once after a pause, in seconds of its rate.
_BURST_SECONDS = 0.25


class Digest(Protocol):
    """What `hashlib` and the CRC libraries have in common."""

    def update(self, data: bytes, /) -> None: ...


class Throttle:
    """Lets bytes through at most at a rate, over all transfers that share this object. None: as fast as it goes."""

    def __init__(
        self,
        bytes_per_second: float | None,
        *,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self._rate = bytes_per_second
        self._clock = clock
        self._sleep = sleep
        self._free_at = clock()

    def piece_bytes(self, wanted: int) -> int:
        """How much to read at once, so that pauses are short."""
        return wanted if self._rate is None else max(4096, min(wanted, int(self._rate * _BURST_SECONDS)))

    def wait_for(self, num_bytes: int) -> None:
        """Return when that many bytes may be sent."""
        if self._rate is None:
            return
        self._free_at = max(self._free_at, self._clock() - _BURST_SECONDS) + num_bytes / self._rate
        while (rest := self._free_at - self._clock()) > 0:
            self._sleep(min(rest, 0.5))


def _nothing(_: int) -> None:
    return


def _forget(_: str | None) -> None:
    return


@dataclass
class Transfer:
    """How one file goes to a store.

    Attributes:
        throttle: Paces it.
        on_bytes: Called with the number of bytes that go next; may raise, which ends the transfer.
        sha256: What the bytes must have, where they are hashed; None where nobody asks.
        session: What `on_session` was told by an earlier, interrupted transfer of the same file to the same key.
        on_session: Called with what a later process needs to go on, before bytes are sent; None when it is worthless.
    """

    throttle: Throttle = field(default_factory=lambda: Throttle(None))
    on_bytes: Callable[[int], None] = _nothing
    sha256: str | None = None
    session: str | None = None
    on_session: Callable[[str | None], None] = _forget


class SourceFile:
    """A local file as a stream for a store."""

    def __init__(self, path: Path, file: IO[bytes], size_bytes: int, transfer: Transfer) -> None:
        self.path = path
        self.size_bytes = size_bytes
        self._file = file
        self._transfer = transfer

    @property
    def sha256(self) -> str | None:
        """What the content should have, where it was asked for."""
        return self._transfer.sha256

    def pieces(self, chunk_bytes: int, *digests: Digest, start: int = 0) -> Iterator[bytes]:
        """Chunks of exactly `chunk_bytes` (the last one shorter) from `start`, after each went through `digests`.

        What comes before `start` is hashed too, but not yielded, paced or counted.

        Raises:
            Damaged: If the file became shorter while it was read, or its bytes are not what `sha256` says.
        """
        transfer = self._transfer
        whole = hashlib.sha256() if transfer.sha256 is not None else None
        everyone = digests if whole is None else (*digests, whole)
        position = 0 if everyone else start
        self._file.seek(position)
        while position < self.size_bytes:
            counted = position >= start
            end = min(position + chunk_bytes, self.size_bytes if counted else start)
            chunk = self._read(end - position, position, counted=counted)
            for digest in everyone:
                digest.update(chunk)
            position = end
            if position == self.size_bytes:
                # Before the last chunk leaves, so that the store never has the whole of a wrong file.
                self._compare(whole)
            if counted:
                yield chunk
        if self.size_bytes == 0:
            self._compare(whole)

    def _compare(self, whole: hashlib._Hash | None) -> None:
        if whole is not None and whole.hexdigest() != self._transfer.sha256:
            raise Damaged(
                f"{self.path} has the SHA-256 {whole.hexdigest()}, but its manifest says {self._transfer.sha256}. "
                f"It was altered on this disk, and is not uploaded; remove that checkpoint."
            )

    def _read(self, num_bytes: int, position: int, *, counted: bool) -> bytes:
        """Exactly that much from the file, in pieces that the throttle lets through."""
        pieces, missing = [], num_bytes
        while missing:
            wanted = missing
            if counted:
                wanted = self._transfer.throttle.piece_bytes(missing)
                self._transfer.throttle.wait_for(wanted)
                self._transfer.on_bytes(wanted)
            piece = self._file.read(wanted)
            if not piece:
                raise Damaged(
                    f"{self.path} ended at byte {position + num_bytes - missing}, but it had {self.size_bytes} bytes. "
                    f"It was cut while it was uploaded; remove that checkpoint."
                )
            pieces.append(piece)
            missing -= len(piece)
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)


@contextmanager
def source_of(path: Path, transfer: Transfer) -> Iterator[SourceFile]:
    """Open a file to be sent."""
    with path.open("rb", buffering=0) as file:
        yield SourceFile(path, file, path.stat().st_size, transfer)
