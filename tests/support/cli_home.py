"""A home with runs, checkpoints, versions and reports, made without training anything."""

import json
from datetime import UTC, datetime, timedelta

from nightschool.config.recipe import Recipe
from nightschool.store.atomic import publish_directory
from nightschool.store.checkpoints import checkpoint_path
from nightschool.store.home import Home
from nightschool.store.manifest import write_manifest
from nightschool.store.registry import Registry, VersionMetadata
from nightschool.store.runs import RunStore

MORNING = datetime(2026, 11, 21, 6, 0, tzinfo=UTC)
STEPS = 12


def make_run(home: Home, *, name="bot", minutes=0, state="completed", epochs=3, **status):
    """A run whose loss falls from 3 to 1.9 in 12 steps."""
    recipe = Recipe(name=name, base="new:tiny", data=[{"path": "a.json"}], train={"epochs": epochs})
    run = RunStore(home).create(recipe.as_plain(), name=name, moment=MORNING + timedelta(minutes=minutes))
    for step in range(1, STEPS + 1):
        row = {
            "step": step,
            "epoch": (step - 1) // 4,
            "loss": 3.0 - 0.1 * (step - 1),
            "tokens_per_second": 100.0 * step,
            "tokens_trained": 50,
            "tokens_trained_total": 50 * step,
            "learning_rate": 1e-3,
            "grad_norm": 0.5,
            "peak_bytes": 10**8,
            "seconds": float(step),
        }
        if step % 4 == 0:
            row["heldout_loss"] = 3.2 - 0.1 * step
        with run.metrics_path.open("a") as file:
            file.write(json.dumps(row) + "\n")
    run.log_path.write_text("\x1b[32mpreparing\x1b[0m\nstep 12/12\n")
    run.update_status(state="running", pid=None)
    run.update_status(state=state, step=STEPS, steps_total=STEPS, **status)
    return run


def add_checkpoint(run, step, *, heldout_loss=None, files=None):
    """A checkpoint of the run, with `files` (JSON by name) beside its weights."""
    path = checkpoint_path(run, step // 4, step, 1)
    with publish_directory(path) as folder:
        (folder / "model.safetensors").write_bytes(b"w" * 1000)
        for name, content in (files or {}).items():
            (folder / name).write_text(json.dumps(content))
        write_manifest(folder, **({} if heldout_loss is None else {"heldout_loss": heldout_loss}))
    return path


def training_metrics(losses, *, heldout=(), rate=1.9e-4):
    """`training_metrics.json` and `metadata.json` as a run writes them: a loss each step, held-out losses by step."""
    steps = list(range(1, len(losses) + 1))
    metrics = {
        "step": steps[-1],
        "epoch": steps[-1] // 4,
        "current_loss": losses[-1],
        "best_loss": min(losses),
        "loss_steps": steps,
        "loss_history": list(losses),
        "learning_rates": [rate] * len(losses),
        "heldout_steps": [step for step, _ in heldout],
        "heldout_history": [loss for _, loss in heldout],
        "validation_metrics": {"current_avg_loss": losses[-1], "steps_since_best": 0, "loss_trend": "falling"},
        "timestamp": "2026-11-21T06:00:30+00:00",
    }
    metadata = metrics | {
        "training_progress": {"completed_steps": steps[-1], "total_epochs": 3, "files_processed": 1},
        "system_info": {"cuda_available": False, "device_count": 0, "mixed_precision": "fp32"},
        "files_processed": 1,
    }
    return {"training_metrics.json": metrics, "metadata.json": metadata}


def add_version(home: Home, *, name="bot", text="weights", run_id=None, **facts):
    return Registry(home).publish(
        name,
        lambda folder: (folder / "model.safetensors").write_text(text) and None,
        VersionMetadata(num_parameters=853_000, run_id=run_id, **facts),
    )
