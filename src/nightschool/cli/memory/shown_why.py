"""How it is shown what an answer was read from: token by token, or in words."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

FROM_THE_WEIGHTS = "from the weights"


def found_lines(read: dict[str, Any], rows: Sequence[dict[str, Any]]) -> list[str]:
    """What a memory had for a question, how it came to the model, and whether any token was read from it."""
    lines = [f"{entry['id']}  {entry['text']}" for entry in read["entries"]]
    if not lines:
        return [f"{read['name']}, revision {read['revision']}, has nothing on it: the answer is the model's own."]
    ways = {"layers": "the model's layers had", "prompt": "the prompt had"}
    unread = [] if any(row["entries"] for row in rows) else ["No word came from them."]
    return [f"{ways[read['read']]} of {read['name']}, revision {read['revision']}:", *lines, *unread]


def token_lines(rows: Sequence[dict[str, Any]]) -> list[str]:
    """A table with a line for each token."""
    shown = [("TOKEN", "FROM", "ENTRIES", "LIKELY", "WITHOUT IT", "WITHOUT ANY")]
    for row in rows:
        heaviest = row["entries"][0]["id"] if row["entries"] else None
        without = row["without"].get(heaviest)
        shown.append(
            (
                repr(row["token"]),
                row["from"],
                _weights(row["entries"]),
                f"{row['probability']:.3f}",
                "-" if without is None else f"{without:.3f}",
                f"{row['without_memory']:.3f}",
            )
        )
    return _columns(shown)


def word_lines(rows: Sequence[dict[str, Any]]) -> list[str]:
    """A table with a line for each word that came from entries, and one for all words between them that came from the weights.

    Probabilities of a word are those of all its tokens, one after the other. `WITHOUT` of each entry that some word came from.
    """
    entries = sorted(
        {entry["id"] for row in rows for entry in row["entries"] if entry["id"] in row["without"]},
        key=lambda entry: (len(entry), entry),
    )
    shown = [("WORDS", "FROM", "ENTRIES", "LIKELY", *(f"WITHOUT {entry}" for entry in entries), "WITHOUT ANY")]
    spans = [(is_read, list(words)) for is_read, words in itertools.groupby(_words(rows), _is_read)]
    for is_read, words in spans:
        if not is_read:
            text = _text(itertools.chain.from_iterable(words))
            shown.append((text, FROM_THE_WEIGHTS, *("" for _ in shown[0][2:])))
            continue
        shown += [_word_line(word, entries) for word in words]
    return _columns(shown)


def _word_line(word: Sequence[dict[str, Any]], entries: Sequence[str]) -> tuple[str, ...]:
    """A word that came from entries, with its probability, and that without each of them and without any."""
    without = [math.prod(row["without"].get(entry, row["probability"]) for row in word) for entry in entries]
    alone = math.prod(row["without_memory"] for row in word)
    numbers = [math.prod(row["probability"] for row in word), *without, alone]
    kinds = dict.fromkeys(row["from"] for row in word if row["entries"])
    return (_text(word), " and ".join(kinds), _weights(_heaviest(word)), *(f"{number:.3f}" for number in numbers))


def _words(rows: Sequence[dict[str, Any]]) -> Iterator[list[dict[str, Any]]]:
    """Tokens up to the next one that begins a word."""
    word: list[dict[str, Any]] = []
    for row in rows:
        if word and row["token"][:1].isspace():
            yield word
            word = []
        word.append(row)
    if word:
        yield word


def _is_read(word: Sequence[dict[str, Any]]) -> bool:
    return any(row["entries"] for row in word)


def _heaviest(word: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """The entries of a word, each with the most that it had of one token, the heaviest first."""
    most: dict[str, float] = {}
    for row in word:
        for entry in row["entries"]:
            most[entry["id"]] = max(entry["weight"], most.get(entry["id"], 0.0))
    return [{"id": entry, "weight": weight} for entry, weight in sorted(most.items(), key=lambda one: -one[1])]


def _text(word: Iterable[dict[str, Any]]) -> str:
    return " ".join("".join(row["token"] for row in word).split()) or "(space)"


def _weights(entries: Iterable[dict[str, Any]]) -> str:
    return ", ".join(f"{entry['id']} {entry['weight']:.0%}" for entry in entries) or "-"


def _columns(shown: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(len(line[column]) for line in shown) for column in range(len(shown[0]))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in shown]
