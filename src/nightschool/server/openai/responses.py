"""How an answer looks in the chat and in the completions spelling, whole and in pieces."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from nightschool.engine.request import Chunk
from nightschool.server.generation import Answer
from nightschool.server.token_text import TokenText


@dataclass(frozen=True)
class ChatShape:
    """`message` and `delta`."""

    object: ClassVar[str] = "chat.completion"
    stream_object: ClassVar[str] = "chat.completion.chunk"

    with_logprobs: bool

    def opening(self, index: int) -> dict[str, Any] | None:
        """The choice that opens a stream, if there is one."""
        delta = {"role": "assistant", "content": ""}
        return {"index": index, "delta": delta, "logprobs": None, "finish_reason": None}

    def piece(self, index: int, chunk: Chunk, words: TokenText, offset: int) -> dict[str, Any]:  # noqa: ARG002
        """The choice of one event; `offset` counts the characters sent before."""
        delta = {"content": chunk.text} if chunk.text else {}
        return {
            "index": index,
            "delta": delta,
            "logprobs": self._logprobs([chunk], words),
            "finish_reason": chunk.finish_reason,
        }

    def choice(self, index: int, answer: Answer, words: TokenText) -> dict[str, Any]:
        """A whole answer."""
        return {
            "index": index,
            "message": {"role": "assistant", "content": answer.text, "refusal": None},
            "logprobs": self._logprobs(answer.chunks, words),
            "finish_reason": answer.finish_reason,
        }

    def _logprobs(self, chunks: Sequence[Chunk], words: TokenText) -> dict[str, Any] | None:
        if not self.with_logprobs:
            return None
        content = [
            words.described(token.token_id, token.logprob)
            | {"top_logprobs": [words.described(other, logprob) for other, logprob in token.top]}
            for chunk in chunks
            for token in chunk.logprobs or ()
        ]
        return {"content": content, "refusal": None}


@dataclass(frozen=True)
class CompletionShape:
    """`text`."""

    object: ClassVar[str] = "text_completion"
    stream_object: ClassVar[str] = "text_completion"

    with_logprobs: bool

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
        if not self.with_logprobs:
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


Shape = ChatShape | CompletionShape
