"""Control tokens that somebody typed: they are text, and must not end a turn or begin one in another's name.

A tokenizer takes `<|im_end|>` for the end of a turn wherever it stands, so a question that holds it could go on with a
made-up turn of the system. That holds for every added token that the template writes, whether or not the tokenizer
calls it special; one that the template never writes, such as a word that somebody added, stays what it is. Such a text is broken up by a word joiner (U+2060), which nobody sees: the model reads the
characters, and no token of control.
"""

from __future__ import annotations

import contextlib
import itertools
import re
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import lru_cache
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

from nightschool.data.chat.template import scaffold
from nightschool.data.example import Message, Role
from nightschool.errors import DataError

WORD_JOINER = "\u2060"


class _Markers(NamedTuple):
    """The added tokens that are broken up in answers, and in everything else."""

    in_answers: tuple[str, ...]
    in_others: tuple[str, ...]


_CONVERSATIONS: tuple[tuple[Role, ...], ...] = (
    ("system", "user", "assistant", "user"),
    ("user", "assistant", "tool", "assistant"),
    ("user", "assistant", "user"),
)
_known: WeakKeyDictionary[Any, tuple[str, int, _Markers]] = WeakKeyDictionary()


def disarmed(tokenizer: Any, messages: Sequence[Message]) -> Sequence[Message]:
    """The same messages, without control tokens in what people and models wrote."""
    markers = _markers_of(tokenizer)
    patterns = [_pattern(markers.in_answers if m.role == "assistant" else markers.in_others) for m in messages]
    pairs = list(zip(messages, patterns, strict=True))
    if not any(pattern is not None and pattern.search(message.content) for message, pattern in pairs):
        return messages
    return [
        message if pattern is None else replace(message, content=pattern.sub(_broken, message.content))
        for message, pattern in pairs
    ]


def _markers_of(tokenizer: Any) -> _Markers:
    template, num_tokens = tokenizer.get_chat_template(), len(tokenizer)
    known = _known.get(tokenizer)
    if known is None or known[:2] != (template, num_tokens):
        known = _known[tokenizer] = (template, num_tokens, _find_markers(tokenizer, template))
    return known[2]


def _find_markers(tokenizer: Any, template: str) -> _Markers:
    added = [token for token in tokenizer.added_tokens_decoder.values() if token.content.strip()]
    special = {token.content for token in added if token.special}
    written = template + "".join(_scaffolds(tokenizer, _CONVERSATIONS, (False, True)))
    around = "".join(_scaffolds(tokenizer, (("system", "user"), ("user",)), (False,)))
    in_others = special | {token.content for token in added if token.content in written}
    # A model may think and call tools in its answers, by markers that are written around no turn.
    in_answers = special | {token.content for token in added if token.content in around}
    return _Markers(tuple(sorted(in_answers)), tuple(sorted(in_others)))


def _scaffolds(tokenizer: Any, conversations: Sequence[tuple[Role, ...]], prompts: Sequence[bool]) -> Iterator[str]:
    """What the template writes around contents, wherever it does not refuse the roles."""
    for roles, generation_prompt in itertools.product(conversations, prompts):
        with contextlib.suppress(DataError):
            yield scaffold(tokenizer, roles, thinking=False, generation_prompt=generation_prompt)


@lru_cache(maxsize=16)
def _pattern(tokens: tuple[str, ...]) -> re.Pattern[str] | None:
    if not tokens:
        return None
    # Longest first: of two that begin alike the tokenizer takes the longer one, too.
    return re.compile("|".join(re.escape(token) for token in sorted(tokens, key=len, reverse=True)))


def _broken(found: re.Match[str]) -> str:
    return found[0][:1] + WORD_JOINER + found[0][1:]
