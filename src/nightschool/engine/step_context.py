"""What the layers of a model may know of a step beside its tokens: whose each of them is, and what it reads."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from nightschool.engine.binding import Binding
from nightschool.engine.scheduler import Span

if TYPE_CHECKING:
    from nightschool.layers.memory_reading import MemoryReading, TokenSource

# Where the token with this id came from, which was chosen with this log-probability.
SourceOf = Callable[[int, float], "TokenSource"]


@dataclass(frozen=True)
class SpanReading:
    """What is read: by the memory modules of a number, by the tokens of a request from the place `start` on."""

    modules: int
    reading: MemoryReading
    start: int


@dataclass
class StepContext:
    """One step. Its tokens lie end to end in the order of `spans`; `bindings` and `adapters` have one entry per span.

    `adapters` are the numbers that `ModelRunner` gave out; 0 is the base alone. `readings` has, by the key of a span of which
    tokens read entries of a memory, what reads them. Whoever knows what an answering token was read
    from writes into `sources` under the key of its span how to tell, and it goes out with the token.
    """

    spans: tuple[Span, ...]
    bindings: tuple[Binding, ...]
    adapters: tuple[int, ...]
    readings: Mapping[int, SpanReading] = field(default_factory=dict)
    sources: dict[int, SourceOf] = field(default_factory=dict)

    def tokens(self) -> Iterator[tuple[Span, Binding, slice]]:
        """Every span with its binding and the places of its tokens in the step."""
        start = 0
        for span, binding in zip(self.spans, self.bindings, strict=True):
            yield span, binding, slice(start, start + span.length)
            start += span.length
