"""`nightschool runs`: what training runs did, and what they do now."""

from __future__ import annotations

import json
import sys
import time
from typing import Annotated, Any

from cyclopts import Parameter

from nightschool.cli.formatting import duration, figure, moment, sparkline
from nightschool.cli.output import Columns, Row, answer, answer_rows, confirm, session, table
from nightschool.cli.trade_off import trade_off
from nightschool.errors import NotFound
from nightschool.jobs.processes import ask_to_stop
from nightschool.store import checkpoints
from nightschool.store.atomic import folder_bytes
from nightschool.store.home import Home
from nightschool.store.runs import Run, RunStore
from nightschool.units import format_bytes, printable
from nightschool.views.metrics_rows import is_number, read_rows
from nightschool.views.runs import (
    POLL_SECONDS,
    figures_by_step,
    follow_metrics,
    published_step,
    run_summary,
    seconds_left,
    settings_that_differ,
    spot_checks_of,
    tried,
    without_colours,
)


def ls(*, name: str | None = None) -> None:
    """List runs, newest first.

    Args:
        name: Only runs of this name.
    """
    rows = [run_summary(run) for run in RunStore(Home.find()).ls() if name is None or run.name == name]
    columns: Columns = {
        "RUN": "run_id",
        "STATE": "state",
        "STEP": lambda row: f"{row['step']}/{row['steps_total']}" if row["steps_total"] else row["step"],
        "LOSS": lambda row: figure(row["loss"]),
        "HELD-OUT": lambda row: figure(row["heldout_loss"]),
        "STARTED": lambda row: moment(row["started_at"]),
        "CANDIDATE": "candidate",
    }
    answer_rows(rows, columns, none="No runs yet. Start one with nightschool train RECIPE.", quiet="run_id")


def show(run_id: str | None = None, /) -> None:
    """Show one run: state, figures, checkpoints, recipe, and what spot checks found by step.

    Args:
        run_id: The run; the newest without it.
    """
    run = RunStore(Home.find()).find(run_id)
    rows = read_rows(run.metrics_path)
    points = [point.name for point in checkpoints.ls(run)]
    checks, published = spot_checks_of(rows), published_step(run)
    data = {**run_summary(run, rows), "checkpoints": points, "path": str(run.path), "recipe": run.recipe()}
    places, where = _places(run)
    data["facts"] = places
    data["spot_checks"] = [dict(zip(("step", "learned", "drift"), check, strict=True)) for check in checks]

    def text() -> str:
        facts = [
            (key, value)
            for key, value in data.items()
            if key not in ("recipe", "checkpoints", "error", "spot_checks", "facts")
        ]
        lines = [f"{key:<16} {figure(value, 6)}" for key, value in facts if value is not None]
        losses = [loss for _, loss in figures_by_step(rows, "loss")]
        if len(losses) > 1:
            lines.append(f"{'loss curve':<16} {sparkline(losses)}")
        lines += [f"{'checkpoint':<16} {name}" for name in points]
        if data["error"]:
            lines.append(f"{'error':<16} {data['error']}")
        lines.append(f"{'recipe':<16} {run.recipe_path}")
        lines += where
        lines += ["", trade_off(checks, published)] if checks else []
        return "\n".join(lines)

    answer(data, text, quiet=run.id)


def _places(run: Run) -> tuple[dict[str, Any] | None, list[str]]:
    """Where the facts of a run are known, for programs and for people; nothing where the gate asked none, or all that is gone."""
    from nightschool.store.registry import Registry
    from nightschool.views.places import lines_of_places, places_of

    candidate = run.status.candidate
    if candidate is None:
        return None, []
    registry = Registry(run.home)
    version = tried(lambda: registry.resolve(candidate), None)
    places = None if version is None else tried(lambda: places_of(registry, version), None)
    return places, [] if version is None or places is None else lines_of_places(places, version)


def watch(run_id: str | None = None, /) -> int:
    """Follow a run's metrics until it ends. Exits as the run does.

    Args:
        run_id: The run; the newest without it.
    """
    run = RunStore(Home.find()).find(run_id)
    for row in follow_metrics(run):
        print(json.dumps(row, ensure_ascii=False) if session().json else _metrics_line(run, row), flush=True)
    status = run.status
    if not session().json:
        print(f"{run.id}: {run.status.effective_state}" + (f": {status.error}" if status.error else ""))
    return status.exit_code or 0


def logs(
    run_id: str | None = None,
    /,
    *,
    follow: Annotated[bool, Parameter(name=["--follow", "-f"])] = False,
    rank: int = 0,
) -> None:
    """Print the log of a run.

    Args:
        run_id: The run; the newest without it.
        follow: Go on until the run ends.
        rank: Which of its processes, where several train together; 0 tells what the run does.
    """
    run = RunStore(Home.find()).find(run_id)
    path = run.log_path if rank == 0 else run.path / f"log-rank{rank}.txt"
    if not path.exists():
        raise NotFound(f"The run {run.id} has no log yet: {path} is missing. Its state is {run.status.state}.")
    coloured = sys.stdout.isatty()
    with path.open(encoding="utf-8", errors="replace") as file:
        while True:
            lives = follow and run.status.find_process() is not None
            for line in file:
                print(
                    printable(line, colours=coloured) if coloured else printable(without_colours(line)),
                    end="",
                    flush=follow,
                )
            if not lives:
                return
            time.sleep(POLL_SECONDS)


def stop(run_id: str | None = None, /) -> None:
    """Ask a run to finish its step, save a checkpoint and end. It can be resumed.

    Args:
        run_id: The run; the newest without it.
    """
    run = RunStore(Home.find()).find(run_id)
    pid = ask_to_stop(run)
    answer(
        {"run_id": run.id, "pid": pid, "signal": "SIGTERM"},
        f"Asked {run.id} (pid {pid}) to stop. It saves, then ends; go on with nightschool train --resume {run.id}.",
        quiet=run.id,
    )


# The figures of a run that `compare` shows, in order; those that no run has are left out.
_COMPARED = (
    "state",
    "step",
    "loss",
    "best_loss",
    "heldout_loss",
    "best_heldout_loss",
    "token_accuracy",
    "heldout_token_accuracy",
    "perplexity",
    "bits_per_byte",
    "heldout_perplexity",
    "heldout_bits_per_byte",
    "tokens_trained",
    "tokens_per_second",
    "mfu",
    "seconds",
    "peak_bytes",
)


def compare(first: str, second: str, /, *more: str) -> None:
    """Show the figures of runs side by side, and the settings in which they differ.

    Args:
        first: A run.
        second: Another run.
        more: More runs.
    """
    store = RunStore(Home.find())
    runs = [store.find(one) for one in (first, second, *more)]
    differing = settings_that_differ([run.recipe() for run in runs])
    summaries = [run_summary(run) for run in runs]
    figures = {key: [summary[key] for summary in summaries] for key in _COMPARED}
    answer(
        {"runs": [run.id for run in runs], "settings": differing, "figures": figures},
        lambda: table(
            ("", *(run.id for run in runs)),
            [(key, *map(figure, values)) for key, values in figures.items() if set(values) != {None}]
            + [(key, *values) for key, values in differing.items()],
        ),
    )


def rm(run_id: str, /, *more: str, yes: bool = False) -> None:
    """Delete runs with their checkpoints. Versions that they published stay.

    Args:
        run_id: The run.
        more: More runs.
        yes: Do not ask.
    """
    home = Home.find()
    store = RunStore(home)
    runs = [store.get(one) for one in (run_id, *more)]
    size = sum(folder_bytes(run.path) for run in runs)
    confirm(f"Delete {', '.join(run.id for run in runs)} ({format_bytes(size)})?", yes=yes)
    for run in runs:
        store.remove(run.id)
    answer(
        {"removed": [run.id for run in runs], "freed_bytes": size},
        f"Deleted {len(runs)} of the runs, {format_bytes(size)}.",
        quiet="\n".join(run.id for run in runs),
    )


# What a line of `watch` says after the step, where a row has it.
_WATCHED = {
    "loss": "loss {:.4f}",
    "heldout_loss": "held-out {:.4f}",
    "token_accuracy": "{:.1%} of tokens right",
    "perplexity": "perplexity {:.4g}",
    "bits_per_byte": "{:.3f} bits/byte",
    "heldout_bits_per_byte": "held-out {:.3f} bits/byte",
    "tokens_per_second": "{:.0f} tok/s",
    "mfu": "MFU {:.1%}",
    "learning_rate": "lr {:.3g}",
    "learned": "learned {:.0%}",
    "drift": "drift {:.3f}",
}


def _metrics_line(run: Run, row: Row) -> str:
    total = run.status.steps_total
    parts = [f"step {row['step']}" + (f"/{total}" if total else "")]
    parts += [text.format(row[key]) for key, text in _WATCHED.items() if is_number(row.get(key))]
    left = seconds_left([row], total)
    return "  ".join(parts if left is None else [*parts, f"eta {duration(left)}"])
