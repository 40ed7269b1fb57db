"""All examples of a run → rendered documents, in as many processes as are asked for."""

from __future__ import annotations

import multiprocessing
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from typing import Any

from nightschool.data.chat.render import Rendered, render_pieces
from nightschool.data.example import Example
from nightschool.data.sources.problems import Problems
from nightschool.errors import DataError

CHUNK_EXAMPLES = 512
"""Examples that one process takes at a time; with fewer than two such chunks, starting processes costs more."""

_worker: tuple[Any, int] | None = None


def render_examples(
    tokenizer: Any, examples: Sequence[Example], max_seq_len: int, *, num_workers: int = 1
) -> list[Rendered]:
    """Render examples in their order; a long text becomes several documents.

    Args:
        tokenizer: A fast Hugging Face tokenizer.
        examples: What is trained.
        max_seq_len: Longest document in tokens.
        num_workers: Processes; the result does not depend on it.

    Raises:
        DataError: If examples cannot be rendered: the first twenty of them, together.
    """
    chunks = [examples[start : start + CHUNK_EXAMPLES] for start in range(0, len(examples), CHUNK_EXAMPLES)]
    if num_workers == 1 or len(chunks) < 2:
        outcomes = [_render_chunk(tokenizer, chunk, max_seq_len) for chunk in chunks]
    else:
        with ProcessPoolExecutor(
            min(num_workers, len(chunks)),
            mp_context=multiprocessing.get_context("spawn"),
            initializer=_start_worker,
            initargs=(tokenizer, max_seq_len),
        ) as pool:
            outcomes = list(pool.map(_render_in_worker, chunks))
    problems = Problems()
    for _, wrong in outcomes:
        for problem in wrong:
            problems.add(problem)
    problems.check()
    return [document for documents, _ in outcomes for document in documents]


def _render_chunk(tokenizer: Any, examples: Sequence[Example], max_seq_len: int) -> tuple[list[Rendered], list[str]]:
    documents: list[Rendered] = []
    wrong: list[str] = []
    for example in examples:
        try:
            documents.extend(render_pieces(tokenizer, example, max_seq_len))
        except DataError as error:
            wrong.append(str(error))
    return documents, wrong


def _start_worker(tokenizer: Any, max_seq_len: int) -> None:
    global _worker
    _worker = tokenizer, max_seq_len


def _render_in_worker(examples: Sequence[Example]) -> tuple[list[Rendered], list[str]]:
    assert _worker is not None
    return _render_chunk(_worker[0], examples, _worker[1])
