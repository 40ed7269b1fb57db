"""What is new to a run: which of the loaded examples the weights that it starts from have not learned."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple

from nightschool.data.example import CONVERSATIONS, Example
from nightschool.feedback.lineage import line_of, start_of
from nightschool.feedback.replay_pool import Accepted, AcceptedExamples, Context, current, origin_of
from nightschool.store.home import Home
from nightschool.store.registry import Registry


class Novelty(NamedTuple):
    """Examples to study: those that are new, and all of them, for whom nothing is new and who studies all the same.

    Neither holds what was replaced by a correction.
    """

    new: list[Example]
    all: list[Example]


def novelty_for(
    accepted: AcceptedExamples,
    home: Home,
    name: str,
    base: str,
    examples: Sequence[Example],
    *,
    unlearned: Mapping[str, str],
) -> Novelty:
    """Part what is new to a run of `name` that starts from `base`; everything is, if that is none of its versions.

    Raises:
        NotFound: If `base` names a version that does not exist.
    """
    return novelty(examples, accepted.rows(name), learned_by(home, name, base), unlearned)


def learned_by(home: Home, name: str, base: str) -> Callable[[str], bool]:
    """Whether the weights that a run starts from have learned what this version learned.

    Raises:
        NotFound: If `base` names a version that does not exist.
    """
    registry = Registry(home)
    start = start_of(registry, name, base)
    return (lambda _: False) if start is None else line_of(registry, start).may_hold


def novelty(
    examples: Sequence[Example],
    rows: Iterable[Accepted],
    learned: Callable[[str], bool],
    unlearned: Mapping[str, str] | None = None,
) -> Novelty:
    """Drop what was replaced, then what was learned.

    An example that a newer accepted one replaced stays away while the sources still hold that one. Later it is new
    again: somebody took the correction back. Only a file cannot take back what a person said in a conversation, since
    it said so before the person did. What is `unlearned` was not learned by the version named there, nor by any before it.
    """
    rows = list(rows)
    now = current(rows)
    replaced = {row.digest for row in rows if row.active} - {row.digest for row in now}
    answers: dict[Context, list[Accepted]] = {}
    for row in now:
        if row.context is not None:
            answers.setdefault(row.context, []).append(row)
    contexts = {row.digest: row.context for row in rows if row.digest in replaced}
    loaded = {example.digest for example in examples}

    def taken_back(example: Example) -> bool:
        newer = answers[contexts[example.digest] or ()]
        return all(row.digest not in loaded for row in newer) and (
            example.source == CONVERSATIONS or all(origin_of(Example.from_json(row.example)) is None for row in newer)
        )

    unknown = unlearned or {}
    learned_digests = {row.digest for row in rows if learned(row.version) and row.version > unknown.get(row.digest, "")}
    everything, new = [], []
    for example in examples:
        again = example.digest in replaced
        if again and not taken_back(example):
            continue
        everything.append(example)
        if again or example.digest not in learned_digests:
            new.append(example)
    return Novelty(new, everything)
