"""A trainer of one weight by momentum, without torch, which goes on from its newest checkpoint as ours does.

As a script it takes the arguments of a run that stops after some steps. With FORGETS=1 in the environment it forgets its
momentum when it resumes.
"""

import argparse
import json
import os
import time
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from nightschool.events import read_events
from nightschool.store import checkpoints
from nightschool.store.atomic import publish_directory
from nightschool.store.checkpoints import checkpoint_path
from nightschool.store.home import Home
from nightschool.store.manifest import write_manifest
from nightschool.store.runs import RunStore


def train(run, steps, *, forgets=False):
    """Train a weight by momentum, and save at the end."""
    points = checkpoints.ls(run)
    step, weight, moment = 0, np.float32(1.0), np.float32(0.0)
    if points:
        state = json.loads((points[-1].path / "state.json").read_text())
        step, weight, moment = state["step"], np.float32(state["weight"]), np.float32(state["moment"])
        moment = np.float32(0.0) if forgets else moment
    rows = []
    for _ in range(steps):
        moment = np.float32(0.9) * moment + weight
        weight = weight - np.float32(0.1) * moment
        step += 1
        rows.append({"step": step, "loss": float(weight**2), "learning_rate": 0.1, "seconds": time.time()})
    kept = [row for row in read_events(run.metrics_path) if row["step"] <= step - steps]
    run.metrics_path.write_text("".join(json.dumps(row) + "\n" for row in kept + rows))
    save(run, step, weight, moment)


def save(run, step, weight, moment):
    with publish_directory(checkpoint_path(run, 0, step, 1)) as folder:
        save_file({"w": np.array([weight])}, folder / "model.safetensors")
        save_file({"m": np.array([moment])}, folder / "optimizer.safetensors")
        state = {"step": step, "weight": float(weight), "moment": float(moment), "seconds": time.time()}
        (folder / "state.json").write_text(json.dumps(state))
        write_manifest(folder, kind="checkpoint", step=step)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    for name in ("--home", "--run", "--steps", "--root", "--resume"):
        parser.add_argument(name)
    given = parser.parse_args()
    train(RunStore(Home(Path(given.home))).get(given.run), int(given.steps), forgets="FORGETS" in os.environ)
