"""The figures of a checkpoint as people read them: current, best, mean, deviation, trend, learning rate.

They come from `training_metrics.json` and `metadata.json`. A checkpoint that lacks one of them, or a key of it, is
shown without these figures: looking must not fail where resuming might still work.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import Any, Literal

from nightschool.errors import Damaged, NotFound
from nightschool.store.atomic import read_json
from nightschool.store.checkpoints import Checkpoint
from nightschool.store.manifest import read_manifest
from nightschool.store.runs import Run

Trend = Literal["falling", "rising", "level"]
ARROWS: dict[Trend, str] = {"falling": "↓", "rising": "↑", "level": "→"}
# The trend compares the two halves of so many last values.
_TREND_VALUES = 20
_FEWEST_VALUES = 4

Points = list[tuple[float, float]]


def facts_of(run: Run, point: Checkpoint) -> dict[str, Any]:
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
        "damaged": None,
    }
    try:
        manifest = read_manifest(point.path)
        facts |= {
            "loss": _number(manifest.facts.get("loss", _kept(point, "training_metrics.json").get("current_loss"))),
            "heldout_loss": point.heldout_loss(),
            "size_bytes": manifest.size_bytes,
            "created_at": manifest.created_at.isoformat(),
        }
    except (Damaged, NotFound) as error:
        facts["damaged"] = str(error)
    return facts


def figures_of(point: Checkpoint) -> dict[str, Any]:
    """All figures of one checkpoint; None where it does not say."""
    metrics, metadata = _kept(point, "training_metrics.json"), _kept(point, "metadata.json")
    kept = {**metadata, **metrics}
    losses, rates = _numbers(kept.get("loss_history")), _numbers(kept.get("learning_rates"))
    heldout = heldout_curve(point)
    best = min(((loss, step) for step, loss in heldout if step > 0), default=None)
    system = _mapping(kept.get("system_info"))
    return {
        "timestamp": kept.get("timestamp"),
        "step": kept.get("step", point.step),
        "epoch": kept.get("epoch", point.epoch),
        "files_processed": kept.get("files_processed", point.num_files),
        "cuda_available": system.get("cuda_available"),
        "device_count": system.get("device_count"),
        "mixed_precision": system.get("mixed_precision"),
        "current_loss": _number(kept.get("current_loss", losses[-1] if losses else None)),
        "best_loss": _number(kept.get("best_loss", min(losses, default=None))),
        "num_losses": len(losses),
        "mean_loss": statistics.fmean(losses) if losses else None,
        "loss_deviation": statistics.pstdev(losses) if losses else None,
        "loss_trend": trend(losses),
        "learning_rate": rates[-1] if rates else None,
        "num_learning_rates": len(rates),
        "heldout_loss": heldout[-1][1] if heldout else None,
        "best_heldout_loss": best[0] if best else None,
        "best_heldout_step": best[1] if best else None,
        "validation_metrics": _mapping(kept.get("validation_metrics")),
        "training_progress": _mapping(kept.get("training_progress")),
    }


def curves_of(point: Checkpoint) -> dict[str, Points]:
    """Loss, held-out loss and learning rate over the steps, up to this checkpoint."""
    kept = {**_kept(point, "metadata.json"), **_kept(point, "training_metrics.json")}
    return {
        "loss": _curve(kept, "loss_steps", "loss_history"),
        "held-out loss": heldout_curve(point),
        "learning rate": _curve(kept, "loss_steps", "learning_rates"),
    }


def heldout_curve(point: Checkpoint) -> Points:
    """The held-out loss over the steps."""
    return _curve(_kept(point, "training_metrics.json"), "heldout_steps", "heldout_history")


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


def rate(value: float | None) -> str | None:
    """A learning rate, as `1.90e-04`."""
    return None if value is None else f"{value:.2e}"


def loss(value: float | None) -> str | None:
    """A loss with six decimals."""
    return None if value is None else f"{value:.6f}"


def arrow(value: Trend | None) -> str | None:
    """`↓ falling`."""
    return None if value is None else f"{ARROWS[value]} {value}"


def _curve(kept: dict[str, Any], steps: str, values: str) -> Points:
    places, heights = kept.get(steps), kept.get(values)
    if not isinstance(places, list) or not isinstance(heights, list):
        return []
    pairs = zip(places, heights, strict=False)
    return [(float(x), float(y)) for x, y in pairs if _is_number(x) and _is_number(y)]


def _kept(point: Checkpoint, name: str) -> dict[str, Any]:
    try:
        return read_json(point.path / name)
    except (NotFound, Damaged):
        return {}


def _numbers(value: Any) -> list[float]:
    return [float(one) for one in value if _is_number(one)] if isinstance(value, list) else []


def _number(value: Any) -> float | None:
    return float(value) if _is_number(value) else None


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _mapping(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}
