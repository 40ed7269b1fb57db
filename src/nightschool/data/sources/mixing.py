"""Several sources → the data of one run: in the proportions that are wanted, without duplicates, without what is held out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from nightschool.data.sources.load import Loaded, without_duplicates


def mixed(sources: Sequence[Loaded], weights: Sequence[float | None]) -> list[Loaded]:
    """Leave out as many examples of each source as makes an epoch hold the sources in proportion to their weights.

    The source that has least for its weight keeps all; nothing is repeated that its source does not repeat. Which examples stay is
    decided by their digests, so that it is the same every night, and with more room those that stayed stay. Sources without a weight
    are left as they are.

    Args:
        sources: Each source, read.
        weights: Of each; None where it has none.
    """
    room = [
        sum(one.repeat for one in source.examples) / weight
        for source, weight in zip(sources, weights, strict=True)
        if weight is not None and source.examples
    ]
    if not room:
        return list(sources)
    return [
        source if weight is None else _fewer(source, weight * min(room))
        for source, weight in zip(sources, weights, strict=True)
    ]


def _fewer(source: Loaded, num_studied: float) -> Loaded:
    """At least one example, and as many as are studied so many times in an epoch."""
    if not source.examples:
        return source
    count = max(1, round(num_studied / source.examples[0].repeat))
    if count >= len(source.examples):
        return source
    stay = set(sorted(one.digest for one in source.examples)[:count])
    return replace(source, examples=[one for one in source.examples if one.digest in stay])


def joined(parts: Sequence[Loaded]) -> Loaded:
    """All of them as one. What a part holds out is in no other part's examples any more, in whatever style of prompts."""
    unique, duplicates = without_duplicates(example for part in parts for example in part.examples)
    held_out, _ = without_duplicates(example for part in parts for example in part.held_out)
    never = frozenset(example.digest for example in held_out).union(*(part.never for part in parts))
    trained = [example for example in unique if example.digest not in never]
    return Loaded(
        trained,
        [report for part in parts for report in part.sources],
        duplicates + sum(part.duplicates for part in parts),
        sum(part.bad for part in parts),
        sum(part.superseded for part in parts),
        held_out,
        frozenset().union(*(part.parted for part in parts)),
        never,
        len(unique) - len(trained) + sum(part.leaked for part in parts),
    )
