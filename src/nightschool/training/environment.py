"""Facts about the machine and the recipe that are written beside a run and its checkpoints."""

from __future__ import annotations

import os
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, cast

import torch

from nightschool.store.atomic import read_json
from nightschool.training.checkpoint import rng
from nightschool.training.checkpoint.full_state import CheckpointContext, frozen_fingerprint
from nightschool.training.setup import DTYPE_NAMES, PreparedRun, Rerun

_PACKAGES = ("nightschool", "torch", "transformers", "peft", "tokenizers", "safetensors", "numpy", "pydantic")

# Settings of `train` that do not change the course of training, or that the schedule and the batches compare already.
_FREE = frozenset(
    {
        "epochs", "max_steps", "learning_rate", "lr_schedule", "warmup_steps", "min_lr_ratio", "weight_decay", "beta1",
        "beta2", "epsilon", "max_cut_share", "dtype", "device", "num_threads", "num_processes", "zero_stage", "num_workers", "log_every",
        "evaluate_every", "gradient_checkpointing", "compile",
    }
)  # fmt: skip

_SIZES = frozenset({"train.batch_size", "train.tokens_per_batch", "train.accumulation_steps"})


def describe_environment(prepared: PreparedRun) -> dict[str, Any]:
    """Versions, processor, threads, device and dtype: what else a run's outcome depends on."""
    device = prepared.task.device
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "processor": _processor(),
        "cores": os.cpu_count(),
        "threads": prepared.num_threads,
        "processes": prepared.task.world.size,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "dtype": prepared.dtype.why,
        "packages": {name: _version(name) for name in _PACKAGES},
        "variables": {
            name: value
            for name, value in sorted(os.environ.items())
            if name.startswith(("OMP_", "MKL_", "MALLOC_")) or name in ("CUDA_VISIBLE_DEVICES", "HF_HUB_OFFLINE")
        },
    }


def checkpoint_context(prepared: PreparedRun, recipe_yaml: str) -> CheckpointContext:
    """What the checkpoints of this run record besides its state. Hashes the frozen weights, if there are any."""
    recipe = prepared.recipe
    numerics: dict[str, Any] = {
        f"train.{key}": value for key, value in recipe.train.model_dump(mode="json").items() if key not in _FREE
    }
    numerics["method"] = recipe.method
    if recipe.method == "pretrain":
        # The position counts sequences, so their number in a step may change; the order that they come in may not.
        numerics = {key: value for key, value in numerics.items() if key not in _SIZES}
    if recipe.method == "lora":
        numerics |= {f"lora.{key}": value for key, value in recipe.lora.model_dump(mode="json").items()}
    return CheckpointContext(
        recipe_yaml=recipe_yaml,
        base=recipe.base,
        base_fingerprint=frozen_fingerprint(prepared.task.model) if recipe.method == "lora" else None,
        dtype=DTYPE_NAMES[prepared.dtype.compute],
        num_threads=prepared.num_threads,
        epochs_total=recipe.train.epochs,
        files_processed=prepared.num_files,
        model_config=cast(Any, prepared.loaded.model).config.to_dict(),
        numerics=numerics,
    )


def rerun_of(checkpoint: Path) -> Rerun:
    """What a run that resumes from this checkpoint must not measure anew. Raises Damaged if state.json is broken."""
    plain = read_json(checkpoint / "state.json")
    others = sum(1 for _ in checkpoint.glob(f"{rng.group_of(1)[:-1]}*.json"))
    return Rerun(str(plain["dtype"]), int(plain["num_threads"]), world_size=1 + others)


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _processor() -> str:
    path = Path("/proc/cpuinfo")
    if path.is_file():
        for line in path.read_text(errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor()
