"""The sentences of a passage, as they are written."""

from __future__ import annotations

import re

# A full stop behind a capital, or behind a capital and one more letter, is of an initial or a title: J. Smith, Dr. Who.
_BETWEEN = re.compile(r"(?<=[.!?…])(?<!\b[A-Z]\.)(?<!\b[A-Z][a-z]\.)(?<!\bMrs\.)[ \t]+(?=[^a-z\s])")


def sentences_of(passage: str) -> list[str]:
    """The sentences of a passage in their order, with their closing signs; a line's end ends one, too. Blank ones are left out."""
    found = [sentence.strip() for line in passage.splitlines() for sentence in _BETWEEN.split(line)]
    return [sentence for sentence in found if sentence]
