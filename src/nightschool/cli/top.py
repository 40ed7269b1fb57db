"""`nightschool top`: the newest run, as it goes."""

from __future__ import annotations

import contextlib
import os
import time
from typing import Any

from nightschool.cli.session import answer, session
from nightschool.cli.terms import duration, find_run, sparkline
from nightschool.errors import NotFound, UsageError
from nightschool.events import read_events
from nightschool.jobs.processes import effective_state
from nightschool.store.home import Home
from nightschool.store.registry import Registry
from nightschool.store.runs import Run, RunStore
from nightschool.units import format_bytes

LOG_LINES = 8
LOG_TAIL_BYTES = 16_384


def top(run_id: str | None = None, /, *, once: bool = False, refresh: float = 1.0, logs: bool = False) -> None:
    """Watch a run: step, loss, tokens per second, time left. Ctrl-C leaves; the run goes on.

    Args:
        run_id: The run; without it the newest that is running, else the newest.
        once: Print one frame and leave.
        refresh: Seconds between frames.
        logs: Show the end of the log as well.
    """
    if refresh <= 0:
        raise UsageError(f"--refresh {refresh:g} is not above 0. Write seconds between frames, such as 2.")
    home = Home.find()
    if once or session().json:
        data = frame(home, _choose(home, run_id))
        answer(data, lambda: render(data, logs=logs), quiet=str(data["run_id"]))
        return
    _watch(home, run_id, refresh, logs=logs)


def frame(home: Home, run: Run) -> dict[str, Any]:
    """All figures of one frame, as JSON."""
    status = run.status
    rows = list(read_events(run.metrics_path))
    last: dict[str, Any] = rows[-1] if rows else {}
    state = effective_state(run)
    left = None
    if state == "running" and status.steps_total and last.get("step"):
        left = (status.steps_total - last["step"]) * last["seconds"] / last["step"]
    heldout = [row["heldout_loss"] for row in rows if row.get("heldout_loss") is not None]
    champion = Registry(home).aliases(run.name).get("champion")
    return {
        "run_id": run.id,
        "state": state,
        "pid": status.pid,
        "step": last.get("step", status.step),
        "steps_total": status.steps_total,
        "epoch": last.get("epoch"),
        "loss": last.get("loss"),
        "losses": [row["loss"] for row in rows],
        "heldout_loss": heldout[-1] if heldout else None,
        "heldout_losses": heldout,
        "learning_rate": last.get("learning_rate"),
        "grad_norm": last.get("grad_norm"),
        "tokens_per_second": last.get("tokens_per_second"),
        "tokens_trained": last.get("tokens_trained_total"),
        "peak_bytes": last.get("peak_bytes"),
        "seconds": last.get("seconds"),
        "seconds_left": left,
        "candidate": status.candidate,
        "champion": f"{run.name}@{champion}" if champion else None,
        "error": status.error,
        "log": _log_tail(run),
    }


def render(data: dict[str, Any], *, logs: bool) -> str:
    """A frame for people."""
    step, total = data["step"], data["steps_total"]
    lines = [f"{data['run_id']}  {data['state']}" + (f"  pid {data['pid']}" if data["state"] == "running" else "")]
    lines.append(f"step      {step}/{total}  {_bar(step, total)}" if total else f"step      {step}")
    if data["loss"] is not None:
        lines.append(f"loss      {data['loss']:.4f}  {sparkline(data['losses'])}")
    if data["heldout_loss"] is not None:
        lines.append(f"held-out  {data['heldout_loss']:.4f}  {sparkline(data['heldout_losses'])}")
    if data["tokens_per_second"] is not None:
        lines.append(f"speed     {data['tokens_per_second']:,.0f} tokens/s, {data['tokens_trained']:,} trained")
        lines.append(f"lr        {data['learning_rate']:.3g}" + _with(data["grad_norm"], ", gradient norm {:.3g}"))
        lines.append(f"peak      {format_bytes(data['peak_bytes'])}")
        lines.append(f"time      {duration(data['seconds'])}" + _left(data["seconds_left"]))
    lines += [f"{key:<9} {data[key]}" for key in ("candidate", "champion", "error") if data[key]]
    if logs:
        lines += ["", *data["log"]]
    return "\n".join(lines)


def _choose(home: Home, run_id: str | None) -> Run:
    if run_id is None:
        for run in RunStore(home).ls():
            if effective_state(run) == "running":
                return run
    return find_run(home, run_id)


def _watch(home: Home, run_id: str | None, refresh: float, *, logs: bool) -> None:
    from rich.console import Console
    from rich.live import Live
    from rich.text import Text

    def look() -> Text:
        try:
            return Text(render(frame(home, _choose(home, run_id)), logs=logs))
        except NotFound as error:
            return Text(str(error))

    with Live(look(), console=Console(), auto_refresh=False) as live, contextlib.suppress(KeyboardInterrupt):
        while True:
            time.sleep(refresh)
            live.update(look(), refresh=True)


def _bar(step: int, total: int, width: int = 30) -> str:
    filled = min(width, step * width // max(1, total))
    return "█" * filled + "░" * (width - filled) + f"  {100 * step // max(1, total)} %"


def _left(seconds: float | None) -> str:
    return "" if seconds is None else f", {duration(seconds)} left"


def _with(value: float | None, template: str) -> str:
    return "" if value is None else template.format(value)


def _log_tail(run: Run) -> list[str]:
    if not run.log_path.exists():
        return []
    with run.log_path.open("rb") as file:
        file.seek(max(0, os.fstat(file.fileno()).st_size - LOG_TAIL_BYTES))
        return file.read().decode(errors="replace").splitlines()[-LOG_LINES:]
