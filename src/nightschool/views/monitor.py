"""A home at one moment: its runs, one of them in detail, the machine, the uploads. Plain values, as `top` shows them.

Everything is read while others write it. What cannot be read at this moment, or was damaged, is shown as unknown, and
the next look tries again: whoever watches a night must not be thrown out by one file.
"""

from __future__ import annotations

from datetime import datetime
from typing import Any

import psutil

from nightschool.errors import NotFound
from nightschool.events import now
from nightschool.store import checkpoints
from nightschool.store.home import Home
from nightschool.store.registry import Registry
from nightschool.store.runs import Run, RunStatus, RunStore
from nightschool.views.machine import MachineView
from nightschool.views.metrics_rows import Row, RowsFollower, is_number
from nightschool.views.runs import last_sample, log_tail, tried
from nightschool.views.uploads import upload_summary

NEWEST_RUNS = 12
# The time left follows from this many last rows, so that a slow start does not count for ever.
SPEED_ROWS = 50
# How busy a processor is can only be said of a span of time: at the first look of this one, later since the last look.
_FIRST_SECONDS = 0.1


class Monitor:
    """Looks at a home again and again; what was read of a metrics file is not read a second time."""

    def __init__(self, home: Home) -> None:
        self.home = home
        self._followers: dict[str, RowsFollower] = {}
        self._processes: dict[int, psutil.Process] = {}
        self._machine = MachineView()

    def frame(self, wanted: str | None = None) -> dict[str, Any]:
        """All figures of one look.

        Args:
            wanted: The run to show in detail; without it, or with `latest`, one that is running, else the newest.

        Raises:
            NotFound: If there is no run, or not this one.
        """
        runs = RunStore(self.home).ls()
        rows = {run.id: self._summary(run) for run in runs[:NEWEST_RUNS]}
        chosen = self._choose(runs, rows, wanted)
        if chosen.id not in rows:
            rows[chosen.id] = self._summary(chosen)
        return {
            "time": now().isoformat(),
            **self._details(chosen, rows[chosen.id]),
            "runs": list(rows.values()),
            "machine": self._machine.look(self.home.path),
            "uploads": tried(lambda: upload_summary(self.home), None),
        }

    def _choose(self, runs: list[Run], rows: dict[str, dict[str, Any]], wanted: str | None) -> Run:
        if wanted is not None and wanted != "latest":
            return RunStore(self.home).get(wanted)
        if not runs:
            raise NotFound(f"There are no runs in {self.home.runs} yet. Begin one with nightschool train RECIPE.")
        return next((run for run in runs if run.id in rows and rows[run.id]["state"] == "running"), runs[0])

    def _rows(self, run: Run) -> list[Row]:
        return self._followers.setdefault(run.id, RowsFollower(run.metrics_path)).update()

    def _summary(self, run: Run) -> dict[str, Any]:
        """One line of the table."""
        rows = self._rows(run)
        last = _numbers(rows[-1]) if rows else {}
        status = tried(lambda: run.status, RunStatus(run_id=run.id, name=run.name, state="queued"))
        state = tried(lambda: run.status.effective_state, "unreadable")
        step = last.get("step", status.step)
        return {
            "run_id": run.id,
            "state": state,
            "pid": status.pid,
            "step": step,
            "steps_total": status.steps_total,
            "epoch": last.get("epoch"),
            "loss": last.get("loss"),
            "heldout_loss": _last(rows, "heldout_loss"),
            "tokens_per_second": last.get("tokens_per_second"),
            "seconds": last.get("seconds"),
            "seconds_left": _seconds_left(rows, status.steps_total) if state == "running" else None,
            "peak_bytes": last.get("peak_bytes"),
            "num_checkpoints": tried(lambda: len(checkpoints.ls(run)), None),
            "candidate": status.candidate,
            "error": status.error,
        }

    def _details(self, run: Run, summary: dict[str, Any]) -> dict[str, Any]:
        rows = self._rows(run)
        last = _numbers(rows[-1]) if rows else {}
        champion = tried(lambda: Registry(self.home).aliases(run.name).get("champion"), None)
        newest = tried(lambda: checkpoints.ls(run)[-1].name if summary["num_checkpoints"] else None, None)
        return {
            **summary,
            "losses": [row["loss"] for row in rows if is_number(row.get("loss"))],
            "loss_steps": [row["step"] for row in rows if is_number(row.get("loss"))],
            "heldout_losses": [row["heldout_loss"] for row in rows if is_number(row.get("heldout_loss"))],
            "learning_rate": last.get("learning_rate"),
            "grad_norm": last.get("grad_norm"),
            "tokens_trained": last.get("tokens_trained_total"),
            "perplexity": last.get("perplexity"),
            "bits_per_byte": last.get("bits_per_byte"),
            "heldout_bits_per_byte": _last(rows, "heldout_bits_per_byte"),
            "mfu": last.get("mfu"),
            "seconds_since_row": tried(lambda: _seconds_since(rows[-1]["time"]), None),
            "newest_checkpoint": newest,
            "champion": f"{run.name}@{champion}" if champion else None,
            "process": self._process(run) if summary["state"] == "running" else None,
            "sample": last_sample(run.events_path),
            "log": log_tail(run.log_path),
        }

    def _process(self, run: Run) -> dict[str, Any] | None:
        """Processor and memory of the process that trains; the share is that since the last look."""

        def look() -> dict[str, Any] | None:
            found = run.status.find_process()
            if found is None:
                return None
            first = found.pid not in self._processes
            process = self._processes.setdefault(found.pid, found)
            return {
                "pid": process.pid,
                "cpu_percent": process.cpu_percent(_FIRST_SECONDS if first else None),
                "resident_bytes": process.memory_info().rss,
                "num_threads": process.num_threads(),
            }

        return tried(look, None)


def _seconds_left(rows: list[Row], total: int | None) -> float | None:
    """What the run says itself, else what its last rows say."""
    if not rows:
        return None
    last = _numbers(rows[-1])
    if "eta_seconds" in last:
        return last["eta_seconds"]
    first: dict[str, float] = _numbers(rows[-SPEED_ROWS]) if len(rows) > SPEED_ROWS else {"step": 0, "seconds": 0.0}
    if total is None or "seconds" not in last or "seconds" not in first or last["step"] <= first["step"]:
        return None
    seconds_per_step = (last["seconds"] - first["seconds"]) / (last["step"] - first["step"])
    return max(0.0, (total - last["step"]) * seconds_per_step)


def _last(rows: list[Row], key: str) -> float | None:
    return next((float(row[key]) for row in reversed(rows) if is_number(row.get(key))), None)


def _seconds_since(moment: str) -> float:
    return (now() - datetime.fromisoformat(moment)).total_seconds()


def _numbers(row: Row) -> dict[str, float]:
    """The figures of a row that are numbers."""
    return {key: value for key, value in row.items() if is_number(value)}
