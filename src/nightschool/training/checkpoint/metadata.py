"""What people and other programs read in a checkpoint: metadata.json, training_metrics.json, training_config.json."""

from __future__ import annotations

import json
import statistics
from typing import Any

import torch
from ruamel.yaml import YAML

from nightschool import __version__
from nightschool.events import now
from nightschool.training.state import TrainState

# The losses that count as "now": as many as a chart shows at a glance.
_RECENT = 10


def training_metrics(state: TrainState, steps_total: int, epochs_total: int) -> dict[str, Any]:
    """The curves, and what can be said about them in numbers."""
    return {
        "step": state.step,
        "epoch": state.epoch,
        "current_loss": state.current_loss,
        "best_loss": state.best_loss,
        "loss_steps": state.loss_steps,
        "loss_history": state.loss_history,
        "learning_rates": state.learning_rates,
        "heldout_steps": state.heldout_steps,
        "heldout_history": state.heldout_history,
        "validation_metrics": _validation_metrics(state, steps_total, epochs_total),
        "timestamp": now().isoformat(),
    }


def metadata(
    state: TrainState,
    *,
    steps_total: int,
    epochs_total: int,
    files_processed: int,
    dtype: str,
    base: str,
    model_config: dict[str, Any],
    recipe: dict[str, Any],
) -> dict[str, Any]:
    """The curves, and everything around them that people ask of a checkpoint."""
    cuda = torch.cuda.is_available()
    train = recipe.get("train", {})
    return training_metrics(state, steps_total, epochs_total) | {
        "training_progress": {
            "completed_steps": state.step,
            "total_steps": steps_total,
            "total_epochs": epochs_total,
            "files_processed": files_processed,
            "tokens_trained": state.tokens_trained,
        },
        "system_info": {
            "cuda_available": cuda,
            "device_count": torch.cuda.device_count() if cuda else 0,
            "devices": [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
            if cuda
            else [],
            "mixed_precision": dtype,
        },
        "files_processed": files_processed,
        "model_config": model_config,
        "training_config_summary": {
            "method": recipe.get("method"),
            **{
                key: train.get(key)
                for key in ("learning_rate", "batch_size", "accumulation_steps", "max_seq_len", "max_steps", "epochs")
            },
        },
        "additional_metadata": {"base": base, "nightschool_version": __version__, "torch_version": torch.__version__},
        "base": base,
    }


def training_config(recipe_yaml: str) -> dict[str, Any]:
    """The resolved recipe as plain values."""
    content = YAML(typ="safe", pure=True).load(recipe_yaml)
    assert isinstance(content, dict), "a recipe is a mapping"
    # Through JSON, which is what it becomes: a date in it would fail here, with its name, and not in the writer.
    plain: dict[str, Any] = json.loads(json.dumps(content, allow_nan=False))
    return plain


def _validation_metrics(state: TrainState, steps_total: int, epochs_total: int) -> dict[str, Any]:
    history = state.loss_history
    recent = history[-_RECENT:]
    best = state.best_loss
    heldout = state.best_heldout
    figures = {
        "current_avg_loss": statistics.fmean(recent) if recent else None,
        "steps_since_best": state.step - state.loss_steps[history.index(best)] if best is not None else None,
        "loss_trend": "falling" if len(recent) > 1 and recent[-1] < recent[0] else "not falling",
        "heldout_loss": state.heldout_loss,
        "best_heldout_loss": heldout[1] if heldout else None,
        "best_heldout_step": heldout[0] if heldout else None,
        "training_completed": state.step >= steps_total,
    }
    if state.step < steps_total:
        return figures
    return figures | {
        "total_steps": state.step,
        "total_epochs": epochs_total,
        "final_loss": state.current_loss,
        "best_loss_achieved": best,
        "average_loss": statistics.fmean(history) if history else None,
        "loss_std": statistics.pstdev(history) if history else None,
    }
