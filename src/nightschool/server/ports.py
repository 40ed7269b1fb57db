"""What the server needs of an engine; this is all of it.

`nightschool.engine.slot.Slot` is what serves. Fast tests hand in a slot without tensors.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from datetime import datetime
from pathlib import Path
from typing import Any, Protocol

from nightschool.engine.binding import Binding
from nightschool.engine.request import Chunk, GenerationRequest


class VersionPort(Protocol):
    """A published version (`nightschool.store.registry.Version`)."""

    @property
    def name(self) -> str: ...
    @property
    def id(self) -> str: ...
    @property
    def path(self) -> Path: ...
    @property
    def ref(self) -> str: ...


class HandlePort(Protocol):
    """An answer in the making. `stream` may be read again once it is finished."""

    def stream(self) -> AsyncIterator[Chunk]: ...
    async def finished(self) -> None: ...
    def cancel(self) -> None: ...


class EnginePort(Protocol):
    """Generates; `submit` may be called from any thread. `load` counts requests that wait and that are answered."""

    @property
    def context_tokens(self) -> int: ...
    def submit(self, request: GenerationRequest) -> HandlePort: ...
    def load(self) -> tuple[int, int]: ...


class GenerationPort(Protocol):
    """One version while it is served."""

    @property
    def version(self) -> VersionPort: ...
    @property
    def binding(self) -> Binding: ...
    @property
    def tokenizer(self) -> Any: ...
    @property
    def engine(self) -> EnginePort: ...
    @property
    def loaded_at(self) -> datetime: ...


class SlotPort(Protocol):
    """A served name whose version can be swapped."""

    @property
    def name(self) -> str: ...
    @property
    def current(self) -> GenerationPort | None: ...
    def refresh(self) -> bool: ...
    def swap(self, ref: str, *, commit: Callable[[], object]) -> object: ...
    def close(self) -> None: ...
