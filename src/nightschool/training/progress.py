"""What a run says while it goes: lines of its log, and how far it is."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

from nightschool.store.runs import Run
from nightschool.units import format_seconds, printable

STATUS_SECONDS = 2.0
LINE_SECONDS = 1.0


def say(text: str) -> None:
    """Write one line of the log."""
    print(printable(text), flush=True)  # noqa: T201 - stdout is the log of the run


def _more(row: dict[str, Any]) -> str:
    """What only pretraining measures."""
    parts = []
    if "bits_per_byte" in row:
        parts.append(f"{row.get('heldout_bits_per_byte', row['bits_per_byte']):.3f} bits/byte")
    if "mfu" in row:
        parts.append(f"MFU {row['mfu']:.0%}")
    if "eta_seconds" in row:
        parts.append(f"{format_seconds(round(row['eta_seconds']))} left")
    return "".join(f" {part}" for part in parts)


@dataclass
class Progress:
    """Says in the log and in the status how far the run is, neither too often."""

    run: Run
    steps_total: int
    line_at: float = 0.0
    status_at: float = 0.0

    def __call__(self, row: dict[str, Any]) -> None:
        moment = time.monotonic()
        last = row["step"] == self.steps_total
        if last or "heldout_loss" in row or moment - self.line_at >= LINE_SECONDS:
            self.line_at = moment
            heldout = f" held-out {row['heldout_loss']:.4f}" if "heldout_loss" in row else ""
            say(
                f"step {row['step']}/{self.steps_total} epoch {row['epoch']} loss {row['loss']:.4f}{heldout} "
                f"lr {row['learning_rate']:.3g} {row['tokens_per_second']:,.0f} tokens trained/s{_more(row)}"
            )
        if last or moment - self.status_at >= STATUS_SECONDS:
            self.status_at = moment
            self.run.update_status(step=row["step"], steps_total=self.steps_total)
