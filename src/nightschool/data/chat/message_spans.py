"""Where a rendered conversation holds the content of each message, proven or not at all.

A template is free to trim contents, to move the system turn, to drop what was thought in earlier turns. So the
literal text around the contents is learned by rendering the same roles with sentinels as contents; then the true
rendering must be exactly these literals with the contents between them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from nightschool.data.chat.template import sentinels
from nightschool.data.example import Message

Span = tuple[int, int]
"""Half-open, in characters of the rendering."""

_THINK_END = "</think>"


def renderings_of(content: str) -> list[str]:
    """What templates make of a content: itself, or trimmed; for an answer that was thought out, its end alone."""
    wordings = [content]
    if _THINK_END in content:
        wordings.append(content.rpartition(_THINK_END)[2])
    trimmed = [
        cut
        for text in wordings
        for cut in (
            text,
            text.strip(),
            text.lstrip("\n"),
            text.rstrip("\n"),
            text.strip("\n"),
            text.lstrip(),
            text.rstrip(),
        )
    ]
    return list(dict.fromkeys(trimmed))


def spans_by_scaffold(scaffold: str, messages: Sequence[Message], text: str) -> list[Span | None] | None:
    """Spans of all contents from one sentinel rendering, or None where that does not explain the text.

    A message that the template does not show at all has the span None.
    """
    marks = sentinels(len(messages))
    if any(scaffold.count(mark) > 1 for mark in marks):
        return None
    order = sorted((scaffold.index(mark), index) for index, mark in enumerate(marks) if mark in scaffold)
    literals, end = [], 0
    for start, index in order:
        literals.append(scaffold[end:start])
        end = start + len(marks[index])
    literals.append(scaffold[end:])
    spans: list[Span | None] = [None] * len(messages)
    if not text.startswith(literals[0]):
        return None
    position = len(literals[0])
    for number, (_, index) in enumerate(order):
        following = literals[number + 1]
        is_last = number + 1 == len(order)
        for wording in renderings_of(messages[index].content):
            end = position + len(wording)
            rest_fits = text[end:] == following if is_last else text.startswith(following, end)
            if rest_fits and text.startswith(wording, position):
                spans[index] = (position, end)
                position = end + len(following)
                break
        else:
            return None
    return spans


def span_alone(
    render: Callable[[Sequence[Message]], str], messages: Sequence[Message], index: int, text: str
) -> Span | None:
    """The span of one content: render again with only this one changed; what stays before and after bounds it."""
    salt = "a"
    while (mark := sentinels(1, salt)[0]) in text:
        salt += "a"
    changed = render([replace(m, content=mark) if i == index else m for i, m in enumerate(messages)])
    if changed.count(mark) != 1:
        return None
    before, after = changed.split(mark)
    if len(before) + len(after) > len(text) or not text.startswith(before) or not text.endswith(after):
        return None
    span = len(before), len(text) - len(after)
    return span if text[span[0] : span[1]] in renderings_of(messages[index].content) else None


def spans_by_search(messages: Sequence[Message], text: str, known: Sequence[Span | None]) -> list[Span | None]:
    """Fill in spans of contents that carry no loss, by ordered search. For display only, never for a mask."""
    spans = list(known)
    position = 0
    for index, message in enumerate(messages):
        span = spans[index]
        if span is None and message.role != "assistant":
            content = message.content.strip()
            limit = next((s[0] for s in spans[index + 1 :] if s is not None), len(text))
            start = text.find(content, position, limit)
            if start >= 0:
                span = spans[index] = (start, start + len(content))
        if span is not None:
            position = max(position, span[1])
    return spans
