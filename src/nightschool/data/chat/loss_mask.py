"""Where the answers of a conversation stand in the text that the template makes of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from nightschool.data.chat.message_spans import Span, renderings_of, span_alone, spans_by_scaffold, spans_by_search
from nightschool.data.chat.template import render_text, scaffold, sentinels
from nightschool.data.example import Message
from nightschool.errors import DataError


@dataclass(frozen=True)
class Layout:
    """A conversation as text. `prompt` is its beginning up to the last answer; `answers` are spans that are trained."""

    text: str
    prompt: str
    contents: list[Span | None]
    answers: list[tuple[Span, float]]


def lay_out(tokenizer: Any, messages: Sequence[Message], stop_texts: list[str]) -> Layout:
    """Find the answers in the rendering.

    Raises:
        DataError: If the place of one cannot be proven.
    """
    for thinking in (False, True):
        text = render_text(tokenizer, messages, generation_prompt=False, thinking=thinking)
        prompt = render_text(tokenizer, messages[:-1], generation_prompt=True, thinking=thinking)
        marked = scaffold(
            tokenizer,
            tuple(m.role for m in messages),
            thinking=thinking,
            generation_prompt=False,
        )
        lead, tail = _around_last(tokenizer, messages, marked, thinking=thinking)
        if not text.startswith(prompt) or not _is_answer(text[len(prompt) :], lead, tail, messages[-1].content):
            continue
        contents = spans_by_scaffold(marked, messages, text)
        if contents is None:
            contents = _spans_one_by_one(tokenizer, messages, text, thinking=thinking)
        answers = []
        for index, message in enumerate(messages[:-1]):
            if message.role == "assistant" and message.weight > 0:
                span = contents[index]
                if span is None:
                    raise DataError(
                        f"the answer in turn {index + 1} cannot be found in what the model's chat template makes of the "
                        "conversation. Give that turn the weight 0, or use a template that shows it as it is."
                    )
                answers.append((_widened(text, span, lead, stop_texts), message.weight))
        if not any(stop in tail for stop in stop_texts):  # nothing ends the answer, so its own end does
            text = text[: len(text) - len(tail)]
        return Layout(text, prompt, contents, answers)
    raise DataError(
        "what the model's chat template makes of the whole conversation does not begin with what it makes of the question, "
        "so training would not fit serving. Use a template whose generation prompt is the beginning of the answer's turn."
    )


def _around_last(tokenizer: Any, messages: Sequence[Message], marked: str, *, thinking: bool) -> tuple[str, str]:
    """What the template puts between the prompt and the last answer, and after it."""
    before, _, tail = marked.rpartition(sentinels(len(messages))[-1])
    roles = tuple(m.role for m in messages[:-1])
    asked = scaffold(tokenizer, roles, thinking=thinking, generation_prompt=True)
    return (before[len(asked) :] if before.startswith(asked) else ""), tail


def _is_answer(rest: str, lead: str, tail: str, content: str) -> bool:
    """Whether what follows the prompt is the answer and nothing else."""
    if not rest.endswith(tail):
        return False
    body = rest[: len(rest) - len(tail)] if tail else rest
    if body.startswith(lead) and body[len(lead) :] in renderings_of(content):
        return True
    return "".join(body.split()) == "".join(content.split())  # thoughts are laid out anew, with other white space


def _spans_one_by_one(tokenizer: Any, messages: Sequence[Message], text: str, *, thinking: bool) -> list[Span | None]:
    def render(changed: Sequence[Message]) -> str:
        return render_text(tokenizer, changed, generation_prompt=False, thinking=thinking)

    known = [
        span_alone(render, messages, index, text) if message.role == "assistant" and index < len(messages) - 1 else None
        for index, message in enumerate(messages)
    ]
    return spans_by_search(messages, text, known)


def _widened(text: str, span: Span, lead: str, stop_texts: list[str]) -> Span:
    """An earlier answer, from what the server would have generated first to the token that ended it."""
    start, end = span
    if lead and text[:start].endswith(lead):
        start -= len(lead)
    after = text[end:]
    gap = len(after) - len(after.lstrip())
    for stop in stop_texts:
        if after.startswith(stop, gap):
            return start, end + gap + len(stop)
    return start, end
