"""How an answer looks in the chat and in the completions spelling, whole and in pieces."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from nightschool.engine.request import Chunk
from nightschool.server.generation import Answer
from nightschool.server.token_text import TokenText


class Shape(Protocol):
    """A spelling of answers. This is all of it."""

    object: str
    stream_object: str

    def opening(self, index: int) -> dict[str, Any] | None:
        """The choice that opens a stream, if there is one."""

    def piece(self, index: int, chunk: Chunk, words: TokenText, offset: int) -> dict[str, Any]:
        """The choice of one event; `offset` counts the characters sent before."""

    def choice(self, index: int, answer: Answer, words: TokenText) -> dict[str, Any]:
        """A whole answer."""


class ChatShape:
    """`message` and `delta`."""

    object = "chat.completion"
    stream_object = "chat.completion.chunk"

    def __init__(self, *, with_logprobs: bool) -> None:
        self._with_logprobs = with_logprobs

    def opening(self, index: int) -> dict[str, Any] | None:
        delta = {"role": "assistant", "content": ""}
        return {"index": index, "delta": delta, "logprobs": None, "finish_reason": None}

    def piece(self, index: int, chunk: Chunk, words: TokenText, offset: int) -> dict[str, Any]:  # noqa: ARG002
        delta = {"content": chunk.text} if chunk.text else {}
        return {
            "index": index,
            "delta": delta,
            "logprobs": self._logprobs([chunk], words),
            "finish_reason": chunk.finish_reason,
        }

    def choice(self, index: int, answer: Answer, words: TokenText) -> dict[str, Any]:
        return {
            "index": index,
            "message": {"role": "assistant", "content": answer.text, "refusal": None},
            "logprobs": self._logprobs(answer.chunks, words),
            "finish_reason": answer.finish_reason,
        }

    def _logprobs(self, chunks: Sequence[Chunk], words: TokenText) -> dict[str, Any] | None:
        if not self._with_logprobs:
            return None
        content = [
            words.described(token.token_id, token.logprob)
            | {"top_logprobs": [words.described(other, logprob) for other, logprob in token.top]}
            for chunk in chunks
            for token in chunk.logprobs or ()
        ]
        return {"content": content, "refusal": None}


class CompletionShape:
    """`text`."""

    object = "text_completion"
    stream_object = "text_completion"

    def __init__(self, *, with_logprobs: bool) -> None:
        self._with_logprobs = with_logprobs

    def opening(self, index: int) -> dict[str, Any] | None:  # noqa: ARG002
        return None

    def piece(self, index: int, chunk: Chunk, words: TokenText, offset: int) -> dict[str, Any]:
        return {
            "index": index,
            "text": chunk.text,
            "logprobs": self._logprobs([chunk], words, offset),
            "finish_reason": chunk.finish_reason,
        }

    def choice(self, index: int, answer: Answer, words: TokenText) -> dict[str, Any]:
        return {
            "index": index,
            "text": answer.text,
            "logprobs": self._logprobs(answer.chunks, words, 0),
            "finish_reason": answer.finish_reason,
        }

    def _logprobs(self, chunks: Sequence[Chunk], words: TokenText, offset: int) -> dict[str, Any] | None:
        if not self._with_logprobs:
            return None
        tokens: list[str] = []
        logprobs: list[float] = []
        tops: list[dict[str, float]] = []
        offsets: list[int] = []
        for chunk in chunks:
            # Tokens of one chunk may share its text (half characters); they all begin where it begins.
            for token in chunk.logprobs or ():
                tokens.append(words.text(token.token_id))
                logprobs.append(token.logprob)
                tops.append({words.text(other): logprob for other, logprob in token.top})
                offsets.append(offset)
            offset += len(chunk.text)
        return {"tokens": tokens, "token_logprobs": logprobs, "top_logprobs": tops, "text_offset": offsets}
