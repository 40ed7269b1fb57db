"""`nightschool eval --tasks`: a model on tasks of lm-eval, by its own harness."""

from __future__ import annotations

import json
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from nightschool.cli.output import answer, bold, note
from nightschool.errors import NotFound, UsageError
from nightschool.store.atomic import write_text
from nightschool.store.home import Home


def evaluate_tasks(
    model: str,
    tasks: str,
    *,
    task_dir: Path | None,
    num_fewshot: int | None,
    max_samples: int | None,
    max_seq_len: int | None,
    output_file: Path | None,
) -> None:
    """See `cli.evaluate.evaluate`."""
    from nightschool.engine.local_model import local_model
    from nightschool.evaluation.harness_tasks import ask_tasks, harness

    for option, value, least in (("--max-samples", max_samples, 1), ("--num-fewshot", num_fewshot, 0)):
        if value is not None and value < least:
            raise UsageError(f"{option} is {value}; it must be {least} or more.")
    names = [name.strip() for name in tasks.split(",") if name.strip()]
    if not names:
        raise UsageError("--tasks names no task. Write one of lm-eval, or of the folder that --task-dir names.")
    if task_dir is not None and not task_dir.is_dir():
        raise NotFound(f"--task-dir: {task_dir} is no folder. Name the one that has the files of your tasks.")
    harness()  # what is missing is said before a model is loaded
    with local_model(Home.find(), model, num_rows=1) as local:
        figures, versions = ask_tasks(
            local.loaded,
            names,
            folder=task_dir,
            max_samples=max_samples,
            num_fewshot=num_fewshot,
            max_seq_len=max_seq_len,
        )
        ref = local.ref
    data: dict[str, Any] = {
        "timestamp": datetime.now(UTC).isoformat(timespec="seconds"),
        "checkpoint": ref,
        "tasks": [asdict(one) for one in figures],
        "versions": versions,
        "settings": {"max_samples": max_samples, "num_fewshot": num_fewshot},
    }
    if output_file is not None:
        write_text(output_file, json.dumps(data, ensure_ascii=False, indent=2) + "\n")
        note(f"Wrote the figures to {output_file}.")

    def text() -> str:
        lines = [bold(ref)]
        for one in figures:
            spread = "" if one.stderr is None else f" ± {one.stderr:.4f}"
            filtered = "" if one.filter == "none" else f" ({one.filter})"
            lines.append(f"{one.task:<20}  {one.metric}{filtered} {one.value:.4f}{spread}  {one.samples} samples")
        return "\n".join(lines)

    answer(data, text, quiet="\n".join(f"{one.value:.4f}" for one in figures))
