"""The whole state of a run on disk: written at once or not at all, and read back exactly or refused by name.

A checkpoint is a folder of safetensors and JSON; nothing in it is a pickle:

    weights.safetensors       every parameter that learns and every persistent buffer
    optimizer.safetensors     moments, update counters, fp32 masters;  optimizer.json: hyper-parameters, schedule
    rng.safetensors           torch on every device;                   rng.json: Python, NumPy
    state.json                step, position in the data, loss history, gradient scaler, base
    recipe.yaml               the resolved recipe
    metadata.json             for people and for `checkpoints show`;   training_metrics.json: the curves
    manifest.json             SHA-256 and size of every file above, written last
"""

from __future__ import annotations

import hashlib
import json
import statistics
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from nightschool.errors import Damaged, StateMismatch
from nightschool.events import now
from nightschool.store.atomic import publish_directory, remove_folder
from nightschool.store.manifest import verify, write_manifest
from nightschool.training import rng
from nightschool.training.optimizer import Schedule, check_tensors
from nightschool.training.state import TrainState
from nightschool.training.task import Task

FORMAT = 1
REQUIRED = (
    "weights.safetensors",
    "optimizer.safetensors",
    "optimizer.json",
    "rng.safetensors",
    "rng.json",
    "state.json",
    "recipe.yaml",
)


@dataclass(frozen=True)
class Surroundings:
    """What a checkpoint records besides the task and its state.

    `base_fingerprint` is the digest of the frozen weights below an adapter, None where all weights are saved.
    `files_processed` counts the data files that the examples came from. `numerics` holds the settings of the recipe
    that change the course of training; a run that resumes must have equal ones.
    """

    recipe_yaml: str
    base: str
    base_fingerprint: str | None
    dtype: str
    num_threads: int
    epochs_total: int
    files_processed: int
    model_config: dict[str, Any]
    numerics: dict[str, Any]


def saved_tensors(task: Task) -> dict[str, Tensor]:
    """Return what training changes: the parameters that learn and all persistent buffers, by name."""
    tensors: dict[str, Tensor] = {name: parameter.detach() for name, parameter in task.trainable().items()}
    for prefix, module in task.model.named_modules():
        for name, buffer in module._buffers.items():
            if buffer is not None and name not in module._non_persistent_buffers_set:
                tensors[f"{prefix}.{name}" if prefix else name] = buffer
    return tensors


def frozen_fingerprint(model: nn.Module) -> str:
    """Return the SHA-256 over names, shapes, dtypes and bytes of all parameters that do not learn."""
    digest = hashlib.sha256()
    for name, parameter in sorted(model.named_parameters()):
        if not parameter.requires_grad:
            digest.update(f"{name} {list(parameter.shape)} {parameter.dtype}\n".encode())
            raw = parameter.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
            digest.update(raw.numpy().data)
    return digest.hexdigest()


def save(
    target: Path,
    task: Task,
    state: TrainState,
    surroundings: Surroundings,
    schedule: Schedule,
    scaler: torch.amp.GradScaler | None = None,
) -> Path:
    """Write a checkpoint to the folder `target`, whole or not at all, and return it.

    A checkpoint that is already there under this name (the run was resumed from an earlier one) is replaced.

    Raises:
        DiskFull: If there is no room; nothing of the target remains, and other checkpoints are untouched.
    """
    rng_plain, rng_tensors = rng.capture()
    optimizer = {
        "hyper_parameters": task.optimizer.hyper_parameters(),
        "schedule": asdict(schedule),
        "without_state": sorted(_without_state(task)),
    }
    plain_state = {
        "format": FORMAT,
        "train": state.to_json(),
        "scaler": None if scaler is None else scaler.state_dict(),
        "base": surroundings.base,
        "base_fingerprint": surroundings.base_fingerprint,
        "dtype": surroundings.dtype,
        "num_threads": surroundings.num_threads,
        "numerics": surroundings.numerics,
    }
    if target.exists():
        remove_folder(target)
    with publish_directory(target) as folder:
        _save_tensors(saved_tensors(task), folder / "weights.safetensors")
        _save_tensors(task.optimizer.state(), folder / "optimizer.safetensors")
        _save_tensors(rng_tensors, folder / "rng.safetensors")
        _save_json(optimizer, folder / "optimizer.json")
        _save_json(rng_plain, folder / "rng.json")
        _save_json(plain_state, folder / "state.json")
        _save_json(_metadata(state, surroundings), folder / "metadata.json")
        _save_json(_training_metrics(state), folder / "training_metrics.json")
        (folder / "recipe.yaml").write_text(surroundings.recipe_yaml, encoding="utf-8")
        write_manifest(
            folder,
            kind="checkpoint",
            step=state.step,
            epoch=state.epoch,
            loss=state.current_loss,
            heldout_loss=state.heldout_loss,
            data_fingerprint=state.fingerprint,
        )
    return target


def load(
    folder: Path,
    task: Task,
    surroundings: Surroundings,
    schedule: Schedule,
    scaler: torch.amp.GradScaler | None = None,
) -> TrainState:
    """Put a checkpoint back into the task, its optimizer, the random generators and the scaler; return its state.

    Raises:
        Damaged: If a file is missing, truncated or altered.
        StateMismatch: If anything in it does not fit this run; the message names it.
    """
    verify(folder, digests=True)
    absent = [name for name in REQUIRED if not (folder / name).is_file()]
    if absent:
        raise StateMismatch(
            f"The checkpoint {folder.name} has no {', '.join(absent)}, and without it the run would go on differently. "
            "Resume from another checkpoint."
        )
    plain = _load_json(folder / "state.json")
    optimizer = _load_json(folder / "optimizer.json")
    _check_plain(folder, plain, optimizer, task, surroundings, schedule, scaler)
    state = TrainState.from_json(plain["train"])
    weights = load_tensors(folder / "weights.safetensors")
    check_tensors(weights, saved_tensors(task), what=f"weights of {folder.name}")
    task.optimizer.load_state(load_tensors(folder / "optimizer.safetensors"), set(optimizer["without_state"]))
    _copy_weights(task, weights)
    if scaler is not None:
        scaler.load_state_dict(plain["scaler"])
    rng.restore(_load_json(folder / "rng.json"), load_tensors(folder / "rng.safetensors"))
    return state


def load_weights(folder: Path, task: Task) -> None:
    """Put only the weights of a verified checkpoint back, for publishing an earlier step than the last.

    Raises:
        Damaged: If a file is missing, truncated or altered.
        StateMismatch: If a tensor is missing, unexpected, or of another shape or dtype.
    """
    verify(folder, digests=True)
    weights = load_tensors(folder / "weights.safetensors")
    check_tensors(weights, saved_tensors(task), what=f"weights of {folder.name}")
    _copy_weights(task, weights)


@torch.no_grad()
def _copy_weights(task: Task, weights: dict[str, Tensor]) -> None:
    for name, tensor in saved_tensors(task).items():
        tensor.copy_(weights[name])


def load_tensors(path: Path) -> dict[str, Tensor]:
    """Read a safetensors file.

    Raises:
        Damaged: If it is no whole safetensors file.
    """
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise Damaged(
            f"{path.name} of {path.parent.name} cannot be read: {error}. Resume from another checkpoint."
        ) from error


def _check_plain(
    folder: Path,
    plain: dict[str, Any],
    optimizer: dict[str, Any],
    task: Task,
    surroundings: Surroundings,
    schedule: Schedule,
    scaler: torch.amp.GradScaler | None,
) -> None:
    """Compare everything that is not a tensor, and report all differences together."""
    mine = {
        "format": FORMAT,
        "base fingerprint": surroundings.base_fingerprint,
        "dtype": surroundings.dtype,
        "gradient scaler": scaler is not None,
        "data fingerprint": task.fingerprint,
        **surroundings.numerics,
        **{f"optimizer {name}": value for name, value in task.optimizer.hyper_parameters().items()},
        **{f"schedule {name}": value for name, value in asdict(schedule).items()},
    }
    theirs = {
        "format": plain["format"],
        "base fingerprint": plain["base_fingerprint"],
        "dtype": plain["dtype"],
        "gradient scaler": plain["scaler"] is not None,
        "data fingerprint": plain["train"]["fingerprint"],
        **plain["numerics"],
        **{f"optimizer {name}": value for name, value in optimizer["hyper_parameters"].items()},
        **{f"schedule {name}": value for name, value in optimizer["schedule"].items()},
    }
    different = [
        f"{key} (checkpoint: {_short(theirs.get(key))}, run: {_short(mine.get(key))})"
        for key in sorted(mine.keys() | theirs.keys())
        if mine.get(key) != theirs.get(key)
    ]
    if different:
        raise StateMismatch(
            f"The checkpoint {folder.name} does not fit this run: {'; '.join(different)}. "
            "Resume with the recipe and the data that it was saved with, or start a new run from it."
        )


def _short(value: object) -> str:
    text = str(value)
    return text if len(text) <= 60 else text[:57] + "…"


def _without_state(task: Task) -> set[str]:
    held = {name.removeprefix("updates.") for name in task.optimizer.state() if name.startswith("updates.")}
    return set(task.trainable()) - held


def _save_tensors(tensors: dict[str, Tensor], path: Path) -> None:
    save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, path)


def _save_json(value: object, path: Path) -> None:
    path.write_text(json.dumps(value, ensure_ascii=False, indent=1, allow_nan=False), encoding="utf-8")


def _load_json(path: Path) -> dict[str, Any]:
    value: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return value


def _validation_metrics(state: TrainState) -> dict[str, Any]:
    recent = state.loss_history[-10:]
    best = state.best_loss
    return {
        "current_avg_loss": statistics.fmean(recent) if recent else None,
        "steps_since_best": state.step - state.loss_steps[state.loss_history.index(best)] if best is not None else None,
        "loss_trend": "falling" if len(recent) > 1 and recent[-1] < recent[0] else "not falling",
        "heldout_loss": state.heldout_loss,
        "best_heldout_loss": state.best_heldout[1] if state.best_heldout else None,
    }


def _training_metrics(state: TrainState) -> dict[str, Any]:
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
        "validation_metrics": _validation_metrics(state),
        "timestamp": now().isoformat(),
    }


def _metadata(state: TrainState, surroundings: Surroundings) -> dict[str, Any]:
    cuda = torch.cuda.is_available()
    return _training_metrics(state) | {
        "training_progress": {
            "completed_steps": state.step,
            "total_epochs": surroundings.epochs_total,
            "files_processed": surroundings.files_processed,
            "tokens_trained": state.tokens_trained,
        },
        "system_info": {
            "cuda_available": cuda,
            "device_count": torch.cuda.device_count() if cuda else 0,
            "mixed_precision": surroundings.dtype,
        },
        "files_processed": surroundings.files_processed,
        "model_config": surroundings.model_config,
        "base": surroundings.base,
    }
