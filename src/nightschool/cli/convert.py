"""`nightschool data convert`: files of other programs → rows that a recipe studies."""

from __future__ import annotations

import json
import os
from pathlib import Path

from nightschool.cli.output import answer, note
from nightschool.data.conversion import convert as converted
from nightschool.data.conversion import refuse_nothing
from nightschool.data.sources.problems import SHOWN_PROBLEMS, Problems
from nightschool.errors import Conflict
from nightschool.store.atomic import replacing

_NO_LIMIT = 2**63


def convert(
    input: Path,  # noqa: A002  the documents' name
    *,
    from_: str,
    output: Path,
    max_samples: int | None = None,
    skip_bad: bool = False,
    force: bool = False,
) -> None:
    """Turn a file of another program into rows that a recipe studies.

    `omcq`: JSON with {"target": [{"question", "options", "correct_answer"}]} → {"conversations": […]}.

    Args:
        input: The file.
        from_: What it is: omcq.
        output: Where the rows go, JSON Lines.
        max_samples: Stop after so many rows.
        skip_bad: Leave out what cannot be converted, and say how much that is. Without it, nothing is written.
        force: Replace the output if it is there.
    """
    if output.exists() and not force:
        raise Conflict(f"{output} is there already. Choose another name, or add --force.")
    problems = Problems(_NO_LIMIT if skip_bad else SHOWN_PROBLEMS)
    rows = converted(from_, input, max_samples=max_samples, problems=problems)
    count = 0
    with replacing(output.absolute()) as handle, os.fdopen(os.dup(handle), "w", encoding="utf-8") as out:
        for count, row in enumerate(rows, start=1):  # noqa: B007  counted for what follows
            out.write(json.dumps(row, ensure_ascii=False) + "\n")
        if not skip_bad:
            problems.check()
        refuse_nothing(count, input)
    bad = problems.found
    for problem in bad[:SHOWN_PROBLEMS]:
        note(problem)
    left_out = f"; {len(bad):,} left out" if bad else ""
    answer(
        {"path": str(output), "rows": count, "bad": len(bad), "problems": bad[:SHOWN_PROBLEMS]},
        f"Wrote {count:,} rows to {output}{left_out}.",
        quiet=str(output),
    )
