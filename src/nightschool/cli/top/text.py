"""A frame of `nightschool top` as text for people."""

from __future__ import annotations

from typing import Any

from nightschool.cli.formatting import duration, figure, sparkline
from nightschool.cli.output import table
from nightschool.units import format_bytes

Frame = dict[str, Any]
SHOWN_LOG_LINES = 15
SAMPLE_CHARACTERS = 160
# A run that logged no step for this long, and for so many of its steps, may hang.
QUIET_SECONDS, QUIET_STEPS = 60.0, 10.0

COLUMNS = ("RUN", "STATE", "STEP", "LOSS", "HELD-OUT", "TOKENS/S", "LEFT", "PEAK", "SAVED")


def describe(frame: Frame, *, logs: bool) -> str:
    """The whole frame: the machine, the runs, one run in detail, and with `logs` the end of its log."""
    parts = [machine_line(frame["machine"])]
    if frame.get("uploads"):
        parts.append(uploads_line(frame["uploads"]))
    if len(frame["runs"]) > 1:
        parts += ["", table(COLUMNS, [cells(run) for run in frame["runs"]])]
    parts += ["", details(frame)]
    if logs:
        parts += ["", *frame["log"][-SHOWN_LOG_LINES:]]
    return "\n".join(parts)


def cells(run: Frame) -> tuple[str | None, ...]:
    """One run as a row of the table."""
    step, total = run["step"], run["steps_total"]
    return (
        run["run_id"],
        run["state"],
        f"{step}/{total}" if total else str(step),
        figure(run["loss"]),
        figure(run["heldout_loss"]),
        None if run["tokens_per_second"] is None else f"{run['tokens_per_second']:,.0f}",
        None if run["seconds_left"] is None else duration(run["seconds_left"]),
        None if run["peak_bytes"] is None else format_bytes(run["peak_bytes"]),
        figure(run["num_checkpoints"]),
    )


def details(run: Frame) -> str:
    """One run, a figure a line; what it does not say is left out."""
    step, total = run["step"], run["steps_total"]
    lines = [f"{run['run_id']}  {run['state']}" + (f"  pid {run['pid']}" if run["state"] == "running" else "")]
    lines.append(f"step      {step}/{total}  {_bar(step, total)}" if total else f"step      {step}")
    if run["loss"] is not None:
        lines.append(f"loss      {run['loss']:.4f}  {sparkline(run['losses'])}")
    if run["heldout_loss"] is not None:
        lines.append(f"held-out  {run['heldout_loss']:.4f}  {sparkline(run['heldout_losses'])}")
    lines += _of_text(run)
    if run["tokens_per_second"] is not None:
        trained = "" if run["tokens_trained"] is None else f", {run['tokens_trained']:,} trained"
        lines.append(f"speed     {run['tokens_per_second']:,.0f} tokens/s{trained}{_with(run['mfu'], ', MFU {:.1%}')}")
    if run["learning_rate"] is not None:
        lines.append(f"lr        {run['learning_rate']:.2e}" + _with(run["grad_norm"], ", gradient norm {:.3g}"))
    if run["peak_bytes"] is not None:
        lines.append(f"peak      {format_bytes(run['peak_bytes'])}{_process(run['process'])}")
    if run["seconds"] is not None:
        left = "" if run["seconds_left"] is None else f", {duration(run['seconds_left'])} left"
        lines.append(f"time      {duration(run['seconds'])}{left}{_quiet(run)}")
    if run["num_checkpoints"]:
        lines.append(f"saved     {run['num_checkpoints']} checkpoints, the last {run['newest_checkpoint']}")
    if run["sample"]:
        lines.append(f"sample    {_sample(run['sample'])}")
    lines += [f"{key:<9} {run[key]}" for key in ("candidate", "champion", "error") if run[key]]
    return "\n".join(lines)


def machine_line(machine: Frame) -> str:
    """Processor, memory, disk and every GPU."""
    used, total = machine["memory_used_bytes"], machine["memory_total_bytes"]
    parts = [
        f"CPU {machine['cpu_percent']:.0f} % of {machine['num_cores']} cores, load {machine['load']:.1f}",
        f"RAM {format_bytes(used)} of {format_bytes(total)}",
    ]
    if machine["disk_free_bytes"] is not None:
        parts.append(f"disk {format_bytes(machine['disk_free_bytes'])} free")
    return "\n".join(["  ".join(parts), *map(_gpu_line, machine["gpus"])])


def uploads_line(uploads: Frame) -> str:
    """What waits to be uploaded, and what could not be."""
    line = f"uploads   {uploads['done']} done, {uploads['pending']} waiting ({format_bytes(uploads['pending_bytes'])} left)"
    if uploads["failed"]:
        line += f", {uploads['failed']} FAILED: {uploads['error']}"
    return line


def _gpu_line(gpu: Frame) -> str:
    parts = [f"GPU {gpu['index']} {gpu['name']}", _with(gpu["busy_percent"], "{:.0f} % busy")]
    if gpu["memory_used_bytes"] is not None and gpu["memory_total_bytes"] is not None:
        parts.append(f"{format_bytes(gpu['memory_used_bytes'])} of {format_bytes(gpu['memory_total_bytes'])}")
    parts += [_with(gpu["celsius"], "{:.0f} °C"), _with(gpu["watts"], "{:.0f} W")]
    return "  ".join(part for part in parts if part)


def _of_text(run: Frame) -> list[str]:
    """Figures that only pretraining has."""
    parts = [
        _with(run["perplexity"], "perplexity {:.4g}"),
        _with(run["bits_per_byte"], "{:.4g} bits per byte"),
        _with(run["heldout_bits_per_byte"], "held-out {:.4g} bits per byte"),
    ]
    shown = ", ".join(part for part in parts if part)
    return [f"text      {shown}"] if shown else []


def _sample(sample: Frame) -> str:
    """What the model wrote, in one line."""
    text = " ".join(f"{sample['prompt']} … {sample['continuation']}".split())
    return f"{text[:SAMPLE_CHARACTERS]} (step {sample['step']})"


def _process(process: Frame | None) -> str:
    if process is None:
        return ""
    return f", now {format_bytes(process['resident_bytes'])}, {process['cpu_percent']:.0f} % of a core"


def _quiet(run: Frame) -> str:
    since = run["seconds_since_row"]
    if run["state"] != "running" or since is None or not run["step"] or not run["seconds"]:
        return ""
    usual = QUIET_STEPS * run["seconds"] / run["step"]
    return f"; no step was logged for {duration(since)}" if since > max(QUIET_SECONDS, usual) else ""


def _bar(step: int, total: int, width: int = 30) -> str:
    filled = min(width, step * width // max(1, total))
    return "█" * filled + "░" * (width - filled) + f"  {100 * step // max(1, total)} %"


def _with(value: float | None, template: str) -> str:
    return "" if value is None else template.format(value)
