"""What the layers of a model may know of a step beside its tokens: whose each of them is."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from nightschool.engine.binding import Binding
from nightschool.engine.request import Attribution
from nightschool.engine.scheduler import Span


@dataclass
class StepContext:
    """One step. Its tokens lie end to end in the order of `spans`; `bindings` and `adapters` have one entry per span.

    `adapters` are the numbers that `ModelRunner` gave out; 0 is the base alone. Whoever knows what an answering token was
    read from writes it into `attribution` under the key of its span, and it goes out with the token.
    """

    spans: tuple[Span, ...]
    bindings: tuple[Binding, ...]
    adapters: tuple[int, ...]
    attribution: dict[int, tuple[Attribution, ...]] = field(default_factory=dict)

    def tokens(self) -> Iterator[tuple[Span, Binding, slice]]:
        """Every span with its binding and the places of its tokens in the step."""
        start = 0
        for span, binding in zip(self.spans, self.bindings, strict=True):
            yield span, binding, slice(start, start + span.length)
            start += span.length
