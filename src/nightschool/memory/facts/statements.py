"""Facts in their canonical form: subject, relation, value, in this order, and the sentence that says so."""

from __future__ import annotations

import re
from datetime import datetime
from typing import NamedTuple

from nightschool.errors import DataError
from nightschool.memory.entry import NewEntry, micros_of
from nightschool.memory.facts.normalise import key_of, relation_key_of, sentence_key_of
from nightschool.memory.facts.retractions import PREFIX, StatementKey, behind_prefix, retraction_key, taken_back
from nightschool.memory.facts.sentences import Triple, split_sentence, statement_of

MOST_CHARACTERS = 4000
"""Of a statement. An entry is one fact; longer texts are documents."""
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]+")
_SURROGATE = re.compile(r"[\ud800-\udfff]")


class Fact(NamedTuple):
    """A new entry as it is stored. `text_key` stands for sentences whose subject and relation cannot be told, and for what they take back.

    `retracts` is the statement that a sentence says is no longer so.
    """

    text: str
    wording: str | None
    subject: str | None
    relation: str | None
    value: str | None
    subject_key: str | None
    relation_key: str | None
    text_key: int | None
    source: str
    valid_from: int | None
    valid_to: int | None
    retracts: StatementKey | None = None


def as_fact(new: NewEntry) -> Fact:
    """Clean a new entry, tell what it is about, and write its statement.

    Raises:
        DataError: If it is empty, too long, no text, has one or two of subject, relation and value, or ends before it begins.
    """
    stated, source = behind_prefix(new.text), clean(new.source, "source")
    text = clean(new.text, "text") if stated is None else PREFIX + clean(stated, "text")
    given = [new.subject, new.relation, new.value]
    if all(part is None for part in given):
        if not text:
            raise DataError("The fact is empty. Write a sentence, or a subject, a relation and a value.")
        triple = split_sentence(text) if stated is None else None
    else:
        triple = _whole(new)
    valid_from, valid_to = _period(new.valid_from, new.valid_to)
    if triple is None:
        gone = taken_back(text)
        key = sentence_key_of(text) if gone is None else retraction_key(gone)
        return Fact(text, None, None, None, None, None, None, key, source, valid_from, valid_to, gone)
    subject, relation, value = triple
    statement = statement_of(subject, relation, value)
    if text and key_of(text) == key_of(statement):
        statement = text
    if len(statement) > MOST_CHARACTERS:
        raise DataError(_too_long(statement))
    return Fact(
        statement,
        text if text and text != statement else None,
        subject,
        relation,
        value,
        key_of(subject),
        relation_key_of(relation),
        None,
        source,
        valid_from,
        valid_to,
    )


def clean(text: str, what: str) -> str:
    """Text on one line, without control characters.

    Raises:
        DataError: If it is no text, or too long.
    """
    if text.isascii() and text.isprintable():
        text = text.strip()
    else:
        if _SURROGATE.search(text):
            raise DataError(f"The {what} is not UTF-8: {text[:60]!a}. Save it as UTF-8 and try again.")
        text = " ".join(_CONTROL.sub(" ", text).split())
    if len(text) > MOST_CHARACTERS:
        raise DataError(_too_long(text))
    return text


def _whole(new: NewEntry) -> Triple:
    parts = {"subject": new.subject, "relation": new.relation, "value": new.value}
    cleaned = {name: clean(part or "", name) for name, part in parts.items()}
    missing = [name for name, part in cleaned.items() if not part]
    if missing:
        raise DataError(
            f"The fact has no {' and no '.join(missing)}: {', '.join(f'{n}={p!r}' for n, p in cleaned.items())}. "
            f"Give all three of subject, relation and value, or a sentence alone."
        )
    return Triple(cleaned["subject"], cleaned["relation"], cleaned["value"])


def _period(begin: datetime | None, end: datetime | None) -> tuple[int | None, int | None]:
    valid_from, valid_to = micros_of(begin), micros_of(end)
    if valid_from is not None and valid_to is not None and valid_to <= valid_from:
        raise DataError(f"The fact ends ({end}) before it begins ({begin}). Let valid_to be later than valid_from.")
    return valid_from, valid_to


def _too_long(text: str) -> str:
    return (
        f"The fact has {len(text)} characters and an entry holds {MOST_CHARACTERS}: {text[:60]!r}…. "
        f"Write one entry for each fact that it states."
    )
