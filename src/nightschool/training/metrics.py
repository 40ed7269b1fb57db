"""What a run writes while it trains: its log, its status, and one row of figures per logged step."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import torch
from torch.utils.tensorboard import SummaryWriter

from nightschool.events import EventLog, now, read_events
from nightschool.store.atomic import write_bytes
from nightschool.store.runs import Run
from nightschool.units import format_seconds, printable
from nightschool.work.peak_memory import peak_resident_bytes

_CHARTS = (
    "loss", "heldout_loss", "token_accuracy", "heldout_token_accuracy", "learning_rate", "grad_norm", "tokens_per_second", "peak_bytes", "perplexity", "bits_per_byte",
    "mfu", "heldout_perplexity", "heldout_bits_per_byte", "reward_accuracy", "reward_margin", "chosen_reward",
    "rejected_reward", "heldout_reward_accuracy", "heldout_reward_margin", "learned", "drift",
)  # fmt: skip
STATUS_SECONDS = 2.0
LINE_SECONDS = 1.0


def say(text: str) -> None:
    """Write one line of the log."""
    print(printable(text), flush=True)  # noqa: T201 - stdout is the log of the run


def peak_bytes(device: torch.device) -> int:
    """Return the most bytes that were held at once since the plan: of the GPU if one trains, else resident in this process."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else peak_resident_bytes()


def truncate_after(metrics_path: Path, step: int) -> int:
    """Drop the rows after `step`, and a half-written last line; return how many rows were dropped.

    A resumed run computes these steps again and writes them again.
    """
    if not metrics_path.exists():
        return 0
    rows = list(read_events(metrics_path))
    kept = [row for row in rows if row["step"] <= step]
    content = b"".join(json.dumps(row, ensure_ascii=False).encode() + b"\n" for row in kept)
    if content != metrics_path.read_bytes():
        write_bytes(metrics_path, content)
    return len(rows) - len(kept)


class MetricsLog:
    """Writes rows to `metrics.jsonl`, and the same figures to TensorBoard event files."""

    def __init__(self, metrics_path: Path, tensorboard_folder: Path | None = None, *, resumed_step: int = 0) -> None:
        truncate_after(metrics_path, resumed_step)
        self._rows = EventLog(metrics_path)
        self._tensorboard: Any = None
        if tensorboard_folder is not None:
            # `purge_step` makes TensorBoard forget what the interrupted process wrote after the checkpoint.
            self._tensorboard = SummaryWriter(
                str(tensorboard_folder), purge_step=resumed_step + 1 if resumed_step else None
            )

    def write(self, row: dict[str, Any]) -> None:
        """Append one row; its `time` is now."""
        self._rows.append({"time": now().isoformat(), **row})
        if self._tensorboard is not None:
            for name in _CHARTS:
                if row.get(name) is not None:
                    self._tensorboard.add_scalar(name, row[name], row["step"])
            if row["step"] == 1:
                self._tensorboard.flush()

    def close(self) -> None:
        self._rows.close()
        if self._tensorboard is not None:
            self._tensorboard.close()


class Progress:
    """Says in the log and in the status of a run how far it is, neither too often."""

    def __init__(self, run: Run, steps_total: int) -> None:
        self._run, self._steps_total = run, steps_total
        self._line_at = self._status_at = 0.0

    def __call__(self, row: dict[str, Any]) -> None:
        moment = time.monotonic()
        last = row["step"] == self._steps_total
        if last or "heldout_loss" in row or "learned" in row or moment - self._line_at >= LINE_SECONDS:
            self._line_at = moment
            heldout = f" held-out {row['heldout_loss']:.4f}" if "heldout_loss" in row else ""
            say(
                f"step {row['step']}/{self._steps_total} epoch {row['epoch']} loss {row['loss']:.4f}{heldout} "
                f"lr {row['learning_rate']:.3g} {row['tokens_per_second']:,.0f} tokens trained/s{_more(row)}"
            )
        if last or moment - self._status_at >= STATUS_SECONDS:
            self._status_at = moment
            self._run.update_status(step=row["step"], steps_total=self._steps_total)


def _more(row: dict[str, Any]) -> str:
    """What only some methods measure."""
    parts = []
    if "learned" in row:
        parts.append(f"learned {row['learned']:.0%}" + (f" drift {row['drift']:.3f}" if "drift" in row else ""))
    if "reward_accuracy" in row:
        parts.append(f"prefers {row['reward_accuracy']:.0%} by {row['reward_margin']:.3f}")
    if "bits_per_byte" in row:
        parts.append(f"{row.get('heldout_bits_per_byte', row['bits_per_byte']):.3f} bits/byte")
    if "mfu" in row:
        parts.append(f"MFU {row['mfu']:.0%}")
    if "eta_seconds" in row:
        parts.append(f"{format_seconds(round(row['eta_seconds']))} left")
    return "".join(f" {part}" for part in parts)
