"""`nightschool memory why`: what an answer was read from."""

from __future__ import annotations

from typing import Annotated, Literal

from cyclopts import Parameter

from nightschool.cli.memory.shown_why import found_lines, token_lines
from nightschool.cli.output import answer
from nightschool.errors import UsageError
from nightschool.store.home import Home


def why(
    name: str,
    question: str,
    /,
    *,
    model: str,
    overlay: Annotated[list[str] | None, Parameter(negative=())] = None,
    read: Literal["layers", "prompt"] | None = None,
    max_new_tokens: int = 48,
) -> None:
    """Ask a model with a memory, and show of each token of its answer what it was read from.

    Beside each token: how likely it was, and how likely it would have been without the entry that counted most, and without any.

    Args:
        name: The memory.
        question: What is asked.
        model: NAME (its champion), NAME@VERSION, a folder, a GGUF file or a hub id.
        overlay: Another memory that lies over it: what it says or takes back hides what is beneath. Given several times, each lies
            over those before it.
        read: layers, where the model was trained by method: memory; prompt puts the entries before the question. Without it,
            layers where the model can.
        max_new_tokens: Longest answer in tokens.
    """
    from nightschool.engine.local_model import local_model
    from nightschool.engine.recall import MemoryChoice
    from nightschool.engine.why import explained_answer

    if max_new_tokens < 1:
        raise UsageError(f"--max-new-tokens is {max_new_tokens}, and an answer needs at least 1. Raise it.")
    home = Home.find()
    with local_model(home, model, memory=MemoryChoice(name, read, tuple(overlay or ()))) as local:
        told = explained_answer(local, question, max_new_tokens)
    answer(
        told.to_json(),
        "\n".join([told.text, "", *found_lines(told.recall.to_json(), told.why), "", *token_lines(told.why)]),
        quiet=told.text,
    )
