"""A home at one moment: its runs, one of them in detail, the machine, the uploads. Plain values, as `top` shows them.

Everything is read while others write it. What cannot be read at this moment, or was damaged, is shown as unknown, and
the next look tries again: whoever watches a night must not be thrown out by one file.
"""

from __future__ import annotations

from datetime import datetime
from typing import Any

import psutil

from nightschool.events import Row, now
from nightschool.store import checkpoints
from nightschool.store.home import Home
from nightschool.store.registry import Registry
from nightschool.store.runs import Run, RunStore
from nightschool.views.machine import machine_figures
from nightschool.views.metrics_rows import RowsFollower
from nightschool.views.runs import figures_by_step, figures_of, last_sample, log_tail, run_summary, seconds_left, tried
from nightschool.views.uploads import upload_summary

NEWEST_RUNS = 12
# How busy a processor is can only be said of a span of time: at the first look of this one, later since the last look.
_FIRST_SECONDS = 0.1


class Monitor:
    """Looks at a home again and again; what was read of a metrics file is not read a second time."""

    def __init__(self, home: Home) -> None:
        self.home = home
        self._followers: dict[str, RowsFollower] = {}
        self._processes: dict[int, psutil.Process] = {}
        self._has_looked = False

    def frame(self, wanted: str | None = None) -> dict[str, Any]:
        """All figures of one look.

        Args:
            wanted: The run to show in detail; without it, or with `latest`, one that is running, else the newest.

        Raises:
            NotFound: If there is no run, or not this one.
        """
        first, self._has_looked = not self._has_looked, True
        runs = RunStore(self.home).ls()
        rows = {run.id: self._summary(run) for run in runs[:NEWEST_RUNS]}
        chosen = self._choose(runs, rows, wanted)
        if chosen.id not in rows:
            rows[chosen.id] = self._summary(chosen)
        return {
            "time": now().isoformat(),
            **self._details(chosen, rows[chosen.id]),
            "runs": list(rows.values()),
            "machine": machine_figures(self.home.path, cpu_seconds=_FIRST_SECONDS if first else None),
            "uploads": tried(lambda: upload_summary(self.home), None),
        }

    def _choose(self, runs: list[Run], rows: dict[str, dict[str, Any]], wanted: str | None) -> Run:
        if runs and wanted in (None, "latest"):
            return next((run for run in runs if run.id in rows and rows[run.id]["state"] == "running"), runs[0])
        return RunStore(self.home).find(wanted)

    def _rows(self, run: Run) -> list[Row]:
        return self._followers.setdefault(run.id, RowsFollower(run.metrics_path)).update()

    def _summary(self, run: Run) -> dict[str, Any]:
        """One line of the table."""
        rows = self._rows(run)
        last = figures_of(rows[-1]) if rows else {}
        summary = run_summary(run, rows)
        return {
            **summary,
            "step": last.get("step", summary["step"]),
            "epoch": last.get("epoch"),
            "seconds_left": seconds_left(rows, summary["steps_total"]) if summary["state"] == "running" else None,
            "num_checkpoints": tried(lambda: len(checkpoints.ls(run)), None),
        }

    def _details(self, run: Run, summary: dict[str, Any]) -> dict[str, Any]:
        rows = self._rows(run)
        last, losses = figures_of(rows[-1]) if rows else {}, figures_by_step(rows, "loss")
        champion = tried(lambda: Registry(self.home).aliases(run.name).get("champion"), None)
        newest = tried(lambda: checkpoints.ls(run)[-1].name if summary["num_checkpoints"] else None, None)
        return {
            **summary,
            "losses": [loss for _, loss in losses],
            "loss_steps": [step for step, _ in losses],
            "heldout_losses": [loss for _, loss in figures_by_step(rows, "heldout_loss")],
            "learning_rate": last.get("learning_rate"),
            "grad_norm": last.get("grad_norm"),
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


def _seconds_since(moment: str) -> float:
    return (now() - datetime.fromisoformat(moment)).total_seconds()
