"""What processes that train together leave to each other when an error ends one of them.

What they do together cannot be done any more then, and whoever waits in it would only hear that somebody is gone. So each writes down
what it has to say in the store in which they met, which is process 0's, and then leaves the group, which wakes the others.
"""

from __future__ import annotations

import base64
import json
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

_POLL_SECONDS = 0.02
_ALL_IS_DONE = "last words/done"
# Process 0 may have to write a whole checkpoint meanwhile.
_LONGEST_SAVE = timedelta(minutes=10)

# As `checkpoint.rng.capture` returns it.
CapturedRandomState = tuple[dict[str, Any], dict[str, Tensor]]


@dataclass(frozen=True)
class LastWords:
    """What one process says.

    `error` is what ended it, and empty where it ends because of another one. `step` is the one after which its state is whole; None
    where it is not, or is not worth to be saved. `random_state` is that after this step, and `parts` are its parts of figures that are sums over processes.
    """

    rank: int
    error: str = ""
    step: int | None = None
    random_state: CapturedRandomState | None = None
    parts: list[float] = field(default_factory=list)

    def to_bytes(self) -> bytes:
        plain: dict[str, Any] = {"rank": self.rank, "error": self.error, "step": self.step, "parts": self.parts}
        if self.random_state is not None:
            values, tensors = self.random_state
            plain["values"] = values
            plain["tensors"] = {
                name: base64.b64encode(tensor.numpy().tobytes()).decode() for name, tensor in tensors.items()
            }
        return json.dumps(plain).encode()

    @classmethod
    def from_bytes(cls, raw: bytes) -> LastWords:
        plain = json.loads(raw)
        random_state = None
        if "values" in plain:
            tensors = {
                name: torch.frombuffer(bytearray(base64.b64decode(text)), dtype=torch.uint8)
                for name, text in plain["tensors"].items()
            }
            random_state = plain["values"], tensors
        return cls(plain["rank"], plain["error"], plain["step"], random_state, plain["parts"])


def any_failed(words: Mapping[int, LastWords]) -> bool:
    """Whether one of them says why."""
    return any(one.error for one in words.values())


def _key(rank: int) -> str:
    return f"last words/{rank}"


class Board:
    """Where they are written down. What was read once is kept; the first words of a process stay its last ones."""

    def __init__(self, store: Any, rank: int, size: int) -> None:
        self._store, self._rank, self._size = store, rank, size
        self._read: dict[int, LastWords] = {}
        self._waited_in_vain = False

    @property
    def has_spoken(self) -> bool:
        return self._rank in self._read

    def write(self, words: LastWords) -> None:
        """Say it, if nothing was said before. If process 0 is gone, nobody can hear it."""
        if self.has_spoken:
            return
        self._read[self._rank] = words
        with suppress(dist.DistError):
            self._store.set(_key(self._rank), words.to_bytes())

    def read(
        self, patience_seconds: float, enough: Callable[[Mapping[int, LastWords]], bool] = lambda _: False
    ) -> Mapping[int, LastWords]:
        """The words of all, by rank, or of those who spoke within so long, or until it is enough. Nobody is waited for in vain twice."""
        deadline = time.monotonic() + (0.0 if self._waited_in_vain else patience_seconds)
        while not self._look() and not enough(self._read) and not self._waited_in_vain:
            time.sleep(_POLL_SECONDS)
            self._waited_in_vain = time.monotonic() > deadline
        return dict(sorted(self._read.items()))

    def _look(self) -> bool:
        """Whether nobody else will say anything."""
        try:
            for rank in range(self._size):
                if rank not in self._read and self._store.check([_key(rank)]):
                    self._read[rank] = LastWords.from_bytes(self._store.get(_key(rank)))
        except dist.DistError:  # process 0 is gone, and the store with it
            self._waited_in_vain = True
        return len(self._read) == self._size

    def close(self) -> None:
        """Say, as process 0, that nothing is done any more that a process must live for."""
        self._store.set(_ALL_IS_DONE, b"1")

    def wait_until_closed(self, patience_seconds: float) -> None:
        """Live on while process 0 saves, if it hears of the end within so long: whoever started the processes may end all as soon as one is gone."""
        if 0 in self.read(patience_seconds, lambda words: 0 in words):
            with suppress(dist.DistError):
                self._store.wait([_ALL_IS_DONE], _LONGEST_SAVE)
