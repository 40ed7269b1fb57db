"""Control tokens that somebody typed: they are text, and must not end a turn or begin one in another's name.

A tokenizer takes `<|im_end|>` for the end of a turn wherever it stands, so a question that holds it could go on with a
made-up turn of the system. Such a text is broken up by a word joiner (U+2060), which nobody sees: the model reads the
characters, and no token of control.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache
from typing import Any

from nightschool.data.example import Message

WORD_JOINER = "\u2060"


def disarmed(tokenizer: Any, messages: Sequence[Message]) -> Sequence[Message]:
    """The same messages, without control tokens in what people and models wrote."""
    pattern = _pattern(tuple(sorted(_control_tokens(tokenizer))))
    if pattern is None or not any(pattern.search(message.content) for message in messages):
        return messages
    return [replace(message, content=pattern.sub(_broken, message.content)) for message in messages]


def _control_tokens(tokenizer: Any) -> set[str]:
    return {token.content for token in tokenizer.added_tokens_decoder.values() if token.special and token.content}


@lru_cache(maxsize=16)
def _pattern(tokens: tuple[str, ...]) -> re.Pattern[str] | None:
    if not tokens:
        return None
    # Longest first: of two that begin alike the tokenizer takes the longer one, too.
    return re.compile("|".join(re.escape(token) for token in sorted(tokens, key=len, reverse=True)))


def _broken(found: re.Match[str]) -> str:
    return found[0][:1] + WORD_JOINER + found[0][1:]
