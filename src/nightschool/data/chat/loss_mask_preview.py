"""Which tokens carry loss, shown to people before step 1."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from rich.text import Text

from nightschool.units import printable

# Where there is no colour, these enclose what is trained.
OPEN, CLOSE = "▏", "▕"


@dataclass(frozen=True)
class Span:
    """Neighbouring tokens of one role that all carry loss, or all do not."""

    text: str
    role: str
    trained: bool
    tokens: int


def loss_mask(tokenizer: Any, input_ids: Sequence[int], weights: Sequence[float], roles: Sequence[str]) -> list[Span]:
    """Return the text of an example in spans; `weights` [N] are the loss weights of its `input_ids` [N].

    A character whose bytes lie in two spans shows as the replacement character in both; it is trained all the same.
    """
    spans: list[Span] = []
    tokens = zip(input_ids, (weight > 0 for weight in weights), roles, strict=True)
    for (trained, role), group in groupby(tokens, key=lambda token: (token[1], token[2])):
        ids = [token[0] for token in group]
        spans.append(Span(tokenizer.decode(ids), role, trained, len(ids)))
    return spans


def render_mask(spans: Sequence[Span], *, colour: bool) -> Text:
    """Return the spans with trained text bold and green, or between ▏ and ▕ where there is no colour."""
    text = Text()
    for span in spans:
        if colour:
            text.append(printable(span.text), style="bold green" if span.trained else "dim")
        else:
            text.append(f"{OPEN}{printable(span.text)}{CLOSE}" if span.trained else printable(span.text))
    return text
