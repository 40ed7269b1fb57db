"""Checkpoints as people look at them: one line each, and the figures of one: current, best, mean, trend, rate.

They come from `training_metrics.json` and `metadata.json`. A checkpoint that lacks one of them, or a key of it, is
shown without these figures: looking must not fail where resuming might still work.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import Any, Literal

from nightschool.errors import Damaged, NotFound
from nightschool.store import checkpoints
from nightschool.store.atomic import read_json
from nightschool.store.checkpoints import Checkpoint
from nightschool.store.manifest import read_manifest
from nightschool.store.runs import Run
from nightschool.views.metrics_rows import is_number
from nightschool.views.runs import Points

Trend = Literal["falling", "rising", "level"]
# The trend compares the two halves of so many last values.
_TREND_VALUES = 20
_FEWEST_VALUES = 4


def list_checkpoints(run: Run, uploads: dict[str, str]) -> list[dict[str, Any]]:
    """One row a checkpoint, by step, oldest first.

    `newest` marks the one that a resume would take, `best` the one with the lowest held-out loss, `upload` says how far
    its upload is (`upload_states`).
    """
    points = checkpoints.ls(run)
    rows = [{**checkpoint_summary(run, point), "upload": uploads.get(point.name)} for point in points]
    # Retention may delete one at this very moment.
    rows = [row for row, point in zip(rows, points, strict=True) if row["damaged"] is None or point.path.exists()]
    whole = {row["name"]: row for row in rows if row["damaged"] is None}
    by_age = reversed([point.name for point in checkpoints.by_age(points)])
    newest = next((whole[name] for name in by_age if name in whole), None)
    scored = [row for row in whole.values() if row["heldout_loss"] is not None]
    best = min(scored, key=lambda row: (row["heldout_loss"], -row["step"]), default=None)
    for row in rows:
        row["newest"], row["best"] = row is newest, row is best
    return rows


def checkpoint_summary(run: Run, point: Checkpoint) -> dict[str, Any]:
    """What the list shows of one checkpoint. `damaged` says why its manifest cannot be read, else it is None."""
    facts: dict[str, Any] = {
        "run_id": run.id,
        "name": point.name,
        "epoch": point.epoch,
        "step": point.step,
        "num_files": point.num_files,
        "loss": None,
        "heldout_loss": None,
        "size_bytes": None,
        "created_at": None,
        "reason": None,
        "damaged": None,
    }
    try:
        manifest = read_manifest(point.path)
        facts |= {
            "loss": _number(manifest.facts.get("loss", _read(point, "training_metrics.json").get("current_loss"))),
            "heldout_loss": point.heldout_loss(),
            "size_bytes": manifest.size_bytes,
            "created_at": manifest.created_at.isoformat(),
            "reason": manifest.facts.get(checkpoints.REASON),
        }
    except (Damaged, NotFound) as error:
        facts["damaged"] = str(error)
    return facts


def checkpoint_figures(run: Run, point: Checkpoint) -> dict[str, Any]:
    """All figures of one checkpoint; None where it does not say."""
    summary = checkpoint_summary(run, point)
    kept = {**_read(point, "metadata.json"), **_read(point, "training_metrics.json")}
    losses, rates = _numbers(kept.get("loss_history")), _numbers(kept.get("learning_rates"))
    heldout = heldout_curve(point)
    best = min(((loss, step) for step, loss in heldout if step > 0), default=None)
    system = _mapping(kept.get("system_info"))
    return {
        "timestamp": kept.get("timestamp") or summary["created_at"],
        "size_bytes": summary["size_bytes"],
        "step": kept.get("step", point.step),
        "epoch": kept.get("epoch", point.epoch),
        "files_processed": kept.get("files_processed", point.num_files),
        "cuda_available": system.get("cuda_available"),
        "device_count": system.get("device_count"),
        "mixed_precision": system.get("mixed_precision"),
        "current_loss": _number(kept.get("current_loss", losses[-1] if losses else summary["loss"])),
        "best_loss": _number(kept.get("best_loss", min(losses, default=None))),
        "num_losses": len(losses),
        "mean_loss": statistics.fmean(losses) if losses else None,
        "loss_deviation": statistics.pstdev(losses) if losses else None,
        "loss_trend": trend(losses),
        "learning_rate": rates[-1] if rates else None,
        "num_learning_rates": len(rates),
        "heldout_loss": heldout[-1][1] if heldout else summary["heldout_loss"],
        "best_heldout_loss": best[0] if best else None,
        "best_heldout_step": best[1] if best else None,
        "validation_metrics": _mapping(kept.get("validation_metrics")),
        "training_progress": _mapping(kept.get("training_progress")),
    }


def checkpoint_curves(point: Checkpoint) -> dict[str, Points]:
    """Loss, held-out loss and learning rate over the steps, up to this checkpoint."""
    kept = {**_read(point, "metadata.json"), **_read(point, "training_metrics.json")}
    return {
        "loss": _curve(kept, "loss_steps", "loss_history"),
        "held-out loss": heldout_curve(point),
        "learning rate": _curve(kept, "loss_steps", "learning_rates"),
    }


def heldout_curve(point: Checkpoint) -> Points:
    """The held-out loss over the steps."""
    return _curve(_read(point, "training_metrics.json"), "heldout_steps", "heldout_history")


def trend(values: Sequence[float]) -> Trend | None:
    """Whether the newer half of the last values lies below or above the older half by more than its standard error.

    None with fewer than four values.
    """
    recent = [value for value in values if math.isfinite(value)][-_TREND_VALUES:]
    if len(recent) < _FEWEST_VALUES:
        return None
    older, newer = recent[: len(recent) // 2], recent[len(recent) // 2 :]
    change = statistics.fmean(newer) - statistics.fmean(older)
    error = math.sqrt(statistics.variance(older) / len(older) + statistics.variance(newer) / len(newer))
    if abs(change) <= error:
        return "level"
    return "falling" if change < 0 else "rising"


def _curve(kept: dict[str, Any], steps: str, values: str) -> Points:
    places, heights = kept.get(steps), kept.get(values)
    if not isinstance(places, list) or not isinstance(heights, list):
        return []
    pairs = zip(places, heights, strict=False)
    return [(float(x), float(y)) for x, y in pairs if _is_number(x) and _is_number(y)]


def _read(point: Checkpoint, name: str) -> dict[str, Any]:
    try:
        return read_json(point.path / name)
    except (NotFound, Damaged):
        return {}


def _numbers(value: Any) -> list[float]:
    return [float(one) for one in value if _is_number(one)] if isinstance(value, list) else []


def _number(value: Any) -> float | None:
    return float(value) if _is_number(value) else None


def _is_number(value: Any) -> bool:
    return is_number(value) and math.isfinite(value)


def _mapping(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}
