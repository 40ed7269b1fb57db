"""The figures of a run as OpenAI's result files have them: one row of CSV for each step that was logged."""

from __future__ import annotations

import csv
import io

from nightschool.store.runs import Run
from nightschool.views.metrics_rows import is_number, read_rows

COLUMNS = {
    "step": "step",
    "train_loss": "loss",
    "train_accuracy": "token_accuracy",
    "valid_loss": "heldout_loss",
    "valid_mean_token_accuracy": "heldout_token_accuracy",
}
"""The columns, and what a run calls their figures. Where a step has no such figure, the cell is empty."""


def results_csv(run: Run) -> str:
    """The table of a run. Losses are in nats a token; accuracies are the share of tokens that were the likeliest."""
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow(COLUMNS)
    for row in read_rows(run.metrics_path):
        table.writerow([row[name] if is_number(row.get(name)) else "" for name in COLUMNS.values()])
    return text.getvalue()
