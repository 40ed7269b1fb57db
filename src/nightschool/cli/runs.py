"""`nightschool runs`: what training runs did, and what they do now."""

from __future__ import annotations

import dataclasses
import sys
import time
from collections.abc import Iterator
from typing import Annotated, Any

from cyclopts import Parameter

from nightschool.cli.session import answer, confirm, session, table
from nightschool.cli.terms import duration, figure, find_run, folder_bytes, moment, plain, sparkline
from nightschool.errors import NotFound
from nightschool.events import read_events
from nightschool.jobs.processes import ask_to_stop, effective_state, training_process
from nightschool.store import checkpoints
from nightschool.store.home import Home
from nightschool.store.runs import Run, RunStore
from nightschool.units import format_bytes

POLL_SECONDS = 0.5


def ls(*, name: str | None = None) -> None:
    """List runs, newest first.

    Args:
        name: Only runs of this name.
    """
    runs = [run for run in RunStore(Home.find()).ls() if name is None or run.name == name]
    rows = [_summary(run) for run in runs]
    answer(
        rows,
        lambda: (
            table(
                ("RUN", "STATE", "STEP", "LOSS", "HELD-OUT", "STARTED", "CANDIDATE"),
                [
                    (
                        row["run_id"],
                        row["state"],
                        f"{row['step']}/{row['steps_total']}" if row["steps_total"] else row["step"],
                        figure(row["loss"]),
                        figure(row["heldout_loss"]),
                        moment(row["started_at"]),
                        row["candidate"],
                    )
                    for row in rows
                ],
            )
            if rows
            else "No runs yet. Begin one with nightschool train RECIPE."
        ),
        quiet=lambda: "\n".join(run.id for run in runs),
    )


def show(run_id: str | None = None, /) -> None:
    """Show one run: state, figures, checkpoints, recipe.

    Args:
        run_id: The run; the newest without it.
    """
    run = find_run(Home.find(), run_id)
    rows = list(read_events(run.metrics_path))
    points = [point.name for point in checkpoints.ls(run)]
    data = {**_summary(run, rows), "checkpoints": points, "path": str(run.path), "recipe": run.recipe()}

    def text() -> str:
        facts = [(key, value) for key, value in data.items() if key not in ("recipe", "checkpoints", "error")]
        lines = [f"{key:<16} {figure(value, 6)}" for key, value in facts if value is not None]
        if len(rows) > 1:
            lines.append(f"{'loss curve':<16} {sparkline([row['loss'] for row in rows])}")
        lines += [f"{'checkpoint':<16} {name}" for name in points]
        if data["error"]:
            lines.append(f"{'error':<16} {data['error']}")
        lines.append(f"{'recipe':<16} {run.recipe_path}")
        return "\n".join(lines)

    answer(data, text, quiet=run.id)


def watch(run_id: str | None = None, /) -> int:
    """Follow a run's metrics until it ends. Exits as the run does.

    Args:
        run_id: The run; the newest without it.
    """
    run = find_run(Home.find(), run_id)
    for row in _follow_metrics(run):
        if session().json:
            print(_json_line(row), flush=True)
        else:
            print(_metrics_line(run, row), flush=True)
    status = run.status
    if not session().json:
        print(f"{run.id}: {effective_state(run)}" + (f": {status.error}" if status.error else ""))
    return status.exit_code or 0


def logs(run_id: str | None = None, /, *, follow: Annotated[bool, Parameter(name=["--follow", "-f"])] = False) -> None:
    """Print the log of a run.

    Args:
        run_id: The run; the newest without it.
        follow: Go on until the run ends.
    """
    run = find_run(Home.find(), run_id)
    if not run.log_path.exists():
        raise NotFound(f"The run {run.id} has no log yet: {run.log_path} is missing. Its state is {run.status.state}.")
    coloured = sys.stdout.isatty()
    with run.log_path.open(encoding="utf-8", errors="replace") as file:
        while True:
            lives = follow and training_process(run) is not None
            for line in file:
                print(line if coloured else plain(line), end="", flush=follow)
            if not lives:
                return
            time.sleep(POLL_SECONDS)


def stop(run_id: str | None = None, /) -> None:
    """Ask a run to finish its step, save a checkpoint and end. It can be resumed.

    Args:
        run_id: The run; the newest without it.
    """
    run = find_run(Home.find(), run_id)
    pid = ask_to_stop(run)
    answer(
        {"run_id": run.id, "pid": pid, "signal": "SIGTERM"},
        f"Asked {run.id} (pid {pid}) to stop. It saves, then ends; go on with nightschool train --resume {run.id}.",
        quiet=run.id,
    )


def compare(first: str, second: str, /) -> None:
    """Show the settings and the figures in which two runs differ.

    Args:
        first: A run.
        second: Another run.
    """
    home = Home.find()
    runs = [find_run(home, first), find_run(home, second)]
    settings = [flatten(run.recipe()) for run in runs]
    keys = [key for key in settings[0] | settings[1] if settings[0].get(key) != settings[1].get(key)]
    figures = [_summary(run) for run in runs]
    names = (
        "state",
        "step",
        "loss",
        "best_loss",
        "heldout_loss",
        "best_heldout_loss",
        "tokens_per_second",
        "seconds",
        "peak_bytes",
    )
    data = {
        "runs": [run.id for run in runs],
        "settings": {key: [settings[0].get(key), settings[1].get(key)] for key in keys},
        "figures": {key: [figures[0][key], figures[1][key]] for key in names},
    }
    answer(
        data,
        lambda: table(
            ("", runs[0].id, runs[1].id),
            [(key, figure(figures[0][key]), figure(figures[1][key])) for key in names]
            + [(key, settings[0].get(key), settings[1].get(key)) for key in keys],
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


def flatten(plain_values: Any, prefix: str = "") -> dict[str, Any]:
    """Nested mappings and lists as dotted keys."""
    if isinstance(plain_values, dict):
        pairs = [(str(key), value) for key, value in plain_values.items()]
    elif isinstance(plain_values, list) and any(isinstance(value, dict) for value in plain_values):
        pairs = [(str(index), value) for index, value in enumerate(plain_values)]
    else:
        return {prefix: plain_values}
    flat: dict[str, Any] = {}
    for key, value in pairs:
        flat |= flatten(value, f"{prefix}.{key}" if prefix else key)
    return flat


def _summary(run: Run, rows: list[dict[str, Any]] | None = None) -> dict[str, Any]:
    rows = list(read_events(run.metrics_path)) if rows is None else rows
    heldout = [row["heldout_loss"] for row in rows if row.get("heldout_loss") is not None]
    last: dict[str, Any] = rows[-1] if rows else {}
    return {
        **dataclasses.asdict(run.status),
        "state": effective_state(run),
        "loss": last.get("loss"),
        "best_loss": min((row["loss"] for row in rows), default=None),
        "heldout_loss": heldout[-1] if heldout else None,
        "best_heldout_loss": min(heldout, default=None),
        "tokens_per_second": last.get("tokens_per_second"),
        "tokens_trained": last.get("tokens_trained_total"),
        "peak_bytes": last.get("peak_bytes"),
        "seconds": last.get("seconds"),
    }


def _follow_metrics(run: Run) -> Iterator[dict[str, Any]]:
    """Every row, those that are there and those that come, until the run has ended."""
    seen = 0
    while True:
        ended = run.status.is_final or (run.status.state == "running" and training_process(run) is None)
        rows = list(read_events(run.metrics_path))
        # A resumed run rewrites the rows after its checkpoint: go on from what is there.
        seen = min(seen, len(rows))
        yield from rows[seen:]
        seen = len(rows)
        if ended:
            return
        time.sleep(POLL_SECONDS)


def _metrics_line(run: Run, row: dict[str, Any]) -> str:
    total = run.status.steps_total
    parts = [f"step {row['step']}" + (f"/{total}" if total else ""), f"loss {row['loss']:.4f}"]
    if row.get("heldout_loss") is not None:
        parts.append(f"held-out {row['heldout_loss']:.4f}")
    parts += [f"{row['tokens_per_second']:.0f} tok/s", f"lr {row['learning_rate']:.3g}"]
    if total and row["step"]:
        parts.append(f"eta {duration((total - row['step']) * row['seconds'] / row['step'])}")
    return "  ".join(parts)


def _json_line(row: dict[str, Any]) -> str:
    import json

    return json.dumps(row, ensure_ascii=False)
