"""`nightschool memory why`: what an answer was read from."""

from __future__ import annotations

from typing import Any, Literal

from nightschool.cli.output import answer
from nightschool.errors import UsageError
from nightschool.store.home import Home
from nightschool.store.names import memory_path


def why(
    name: str,
    question: str,
    /,
    *,
    model: str,
    read: Literal["layers", "prompt"] | None = None,
    max_new_tokens: int = 48,
) -> None:
    """Ask a model with a memory, and show of each token of its answer what it was read from.

    Beside each token: how likely it was, and how likely it would have been without the entry that counted most, and without any.

    Args:
        name: The memory.
        question: What is asked.
        model: NAME (its champion), NAME@VERSION, a folder, a GGUF file or a hub id.
        read: layers, where the model was trained by method: memory; prompt puts the entries before the question. Without it,
            layers where the model can.
        max_new_tokens: Longest answer in tokens.
    """
    from nightschool.engine.local_model import local_model
    from nightschool.engine.memory_lookup import open_memory
    from nightschool.engine.why import explained_answer

    if max_new_tokens < 1:
        raise UsageError(f"--max-new-tokens is {max_new_tokens}, and an answer needs at least 1. Raise it.")
    home = Home.find()
    with local_model(home, model) as local:
        memory = open_memory(memory_path(home, name), local.bound)
        try:
            told = explained_answer(local, memory, read, question, max_new_tokens)
        finally:
            memory.close()
    answer(
        {
            "model": local.ref,
            "question": question,
            "answer": told.text,
            "memory": told.recall.to_json(),
            "why": told.why,
        },
        "\n".join([told.text, "", *_found(told.recall.to_json()), "", *_table(told.why)]),
        quiet=told.text,
    )


def _found(read: dict[str, Any]) -> list[str]:
    lines = [f"{entry['id']}  {entry['text']}" for entry in read["entries"]]
    if not lines:
        return [f"{read['name']}, revision {read['revision']}, has nothing on it: the answer is the model's own."]
    ways = {"layers": "the model's layers read", "prompt": "the prompt had"}
    return [f"{ways[read['read']]} of {read['name']}, revision {read['revision']}:", *lines]


def _table(rows: list[dict[str, Any]]) -> list[str]:
    shown = [("TOKEN", "FROM", "ENTRIES", "LIKELY", "WITHOUT IT", "WITHOUT ANY")]
    for row in rows:
        heaviest = row["entries"][0]["id"] if row["entries"] else None
        without = row["without"].get(heaviest)
        shown.append(
            (
                repr(row["token"]),
                row["from"],
                ", ".join(f"{entry['id']} {entry['weight']:.0%}" for entry in row["entries"]) or "-",
                f"{row['probability']:.3f}",
                "-" if without is None else f"{without:.3f}",
                f"{row['without_memory']:.3f}",
            )
        )
    widths = [max(len(line[column]) for line in shown) for column in range(len(shown[0]))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in shown]
