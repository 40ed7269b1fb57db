"""From tokens to text, piece by piece, never half a character; and stop strings, which never show.

A token may be half a character: the bytes of an emoji are often two or three tokens. `Detokenizer` hands out text as soon
as it cannot change any more, so that the pieces together are what `tokenizer.decode` makes of all tokens at once.
"""

from __future__ import annotations

import codecs
from collections.abc import Sequence
from functools import cache
from typing import Any, Protocol

from transformers.convert_slow_tokenizer import bytes_to_unicode

_REPLACEMENT = "\ufffd"
# No character has more bytes than 4, so text that is still broken after twice as many tokens stays broken.
_MOST_HELD_TOKENS = 8


class Detokenizer(Protocol):
    """Text of one answer. This is all of it."""

    def add(self, token_id: int) -> str:
        """The text that the token settles; empty while it is half a character."""
        ...

    def end(self) -> str:
        """Whatever is held back when nothing follows."""
        ...


class Vocabulary:
    """Makes detokenizers of one tokenizer. Special tokens have no text."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        backend = getattr(tokenizer, "backend_tokenizer", None)
        self._bytes = _token_bytes(tokenizer) if backend is not None and _is_byte_level(backend) else None
        self._special = _special_ids(tokenizer)

    def detokenizer(self) -> Detokenizer:
        """A fresh one, for one answer."""
        if self._bytes is not None:
            return _ByteDetokenizer(self._bytes)
        return _WindowDetokenizer(self._tokenizer, self._special)

    def decode(self, token_ids: Sequence[int]) -> str:
        """All at once."""
        detokenizer = self.detokenizer()
        return "".join([*map(detokenizer.add, token_ids), detokenizer.end()])


class _ByteDetokenizer:
    """For byte-level vocabularies: bytes through an incremental UTF-8 decoder, a microsecond a token."""

    def __init__(self, token_bytes: dict[int, bytes]) -> None:
        self._bytes = token_bytes
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def add(self, token_id: int) -> str:
        return self._decoder.decode(self._bytes.get(token_id, b""))

    def end(self) -> str:
        return self._decoder.decode(b"", final=True)


class _WindowDetokenizer:
    """For all other vocabularies: what decoding a window of the last tokens shows that it did not show before.

    The window begins where text was last handed out, and holds the piece before it too, because decoders treat the
    first token in a text differently (leading spaces).
    """

    def __init__(self, tokenizer: Any, special: set[int]) -> None:
        self._tokenizer = tokenizer
        self._special = special
        self._ids: list[int] = []
        self._window = 0
        self._read = 0

    def add(self, token_id: int) -> str:
        if token_id in self._special:
            return ""
        self._ids.append(token_id)
        return self._advance(last=False)

    def end(self) -> str:
        return self._advance(last=True)

    def _advance(self, *, last: bool) -> str:
        shown = self._decode(self._ids[self._window : self._read])
        whole = self._decode(self._ids[self._window :])
        # A trailing replacement character may be the first bytes of a character that is still to come.
        may_change = whole.endswith(_REPLACEMENT) and len(self._ids) - self._read <= _MOST_HELD_TOKENS
        if len(whole) <= len(shown) or (may_change and not last):
            return ""
        self._window, self._read = self._read, len(self._ids)
        return whole[len(shown) :]

    def _decode(self, token_ids: list[int]) -> str:
        text = self._tokenizer.decode(token_ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        assert isinstance(text, str)
        return text


class StopText:
    """Lets text through up to the first stop string, which it swallows with everything after it."""

    def __init__(self, stop: Sequence[str]) -> None:
        self._stop = tuple(stop)
        self._held = ""
        self.stopped = False

    def add(self, text: str) -> str:
        """The part of `text`, and of what was held back before, that belongs to the answer for certain."""
        if not self._stop:
            return text
        if self.stopped or not text:
            return ""
        self._held += text
        found = [place for place in map(self._held.find, self._stop) if place >= 0]
        if found:
            self.stopped = True
            return self._release(min(found))
        return self._release(len(self._held) - self._undecided())

    def end(self) -> str:
        """What was held back, when the answer ends otherwise."""
        return self._release(len(self._held)) if not self.stopped else ""

    def _release(self, length: int) -> str:
        released, self._held = self._held[:length], self._held[length:]
        return released

    def _undecided(self) -> int:
        """The length of the longest end of the text that is the beginning of a stop string."""
        longest = min(len(self._held), max(map(len, self._stop)) - 1)
        return next((n for n in range(longest, 0, -1) if any(s.startswith(self._held[-n:]) for s in self._stop)), 0)


def _special_ids(tokenizer: Any) -> set[int]:
    added = getattr(tokenizer, "added_tokens_decoder", {})
    return {*tokenizer.all_special_ids, *(token_id for token_id, token in added.items() if token.special)}


def _is_byte_level(backend: Any) -> bool:
    return type(backend.decoder).__name__ == "ByteLevel"


def _token_bytes(tokenizer: Any) -> dict[int, bytes]:
    """The bytes of each token that has text, as the byte-level decoder of `tokenizers` sees them."""
    letters = byte_of_letter()
    special = _special_ids(tokenizer)
    table: dict[int, bytes] = {}
    for token, token_id in tokenizer.get_vocab().items():
        if token_id not in special:
            values = [letters.get(letter) for letter in token]
            # A token with a letter outside the table is an added one and stands for itself.
            table[token_id] = (
                token.encode() if None in values else bytes(value for value in values if value is not None)
            )
    return table


@cache
def byte_of_letter() -> dict[str, int]:
    """GPT-2's letters for bytes, in which byte-level vocabularies spell their tokens."""
    return {letter: byte for byte, letter in bytes_to_unicode().items()}  # type: ignore[no-untyped-call]
