"""The answer of one request while it grows: tokens in, chunks out, and when it ends."""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING

from nightschool.engine.detokenize import StopText, Vocabulary
from nightschool.engine.request import Chunk, FinishReason, GenerationRequest, TokenLogprob, Usage

if TYPE_CHECKING:
    from nightschool.layers.memory_reading import TokenSource


class Answer:
    """Turns the tokens of one answer into chunks.

    Args:
        request: What is answered.
        vocabulary: Of the model.
        stop_ids: Tokens that end an answer and are not part of it.
    """

    def __init__(self, request: GenerationRequest, vocabulary: Vocabulary, stop_ids: Collection[int]) -> None:
        self._request = request
        self._stop_ids = () if request.params.ignore_eos else stop_ids
        self._detokenizer = vocabulary.detokenizer()
        self._stop_text = StopText(request.params.stop)
        self.num_tokens = 0
        self.cached_tokens = 0

    def add(self, token_id: int, logprob: TokenLogprob | None = None, source: TokenSource | None = None) -> Chunk:
        """The chunk that the next token settles; the last one has a `finish_reason`."""
        if token_id in self._stop_ids:
            return self.end("stop")
        self.num_tokens += 1
        text = self._stop_text.add(self._detokenizer.add(token_id))
        reason: FinishReason | None = None
        if self._stop_text.stopped:
            reason = "stop"
        elif self.num_tokens >= self._request.params.max_new_tokens:
            text += self._held_back()
            reason = "stop" if self._stop_text.stopped else "length"
        logprobs = None if logprob is None else (logprob,)
        usage = self._usage() if reason else None
        return Chunk(text, (token_id,), logprobs, reason, usage, source=source)

    def end(self, reason: FinishReason, error: str | None = None) -> Chunk:
        """The last chunk, when no further token comes: text that was held back, and why."""
        return Chunk(self._held_back(), (), None, reason, self._usage(), error)

    def _held_back(self) -> str:
        return self._stop_text.add(self._detokenizer.end()) + self._stop_text.end()

    def _usage(self) -> Usage:
        return Usage(len(self._request.prompt_ids), self.num_tokens, self.cached_tokens)
