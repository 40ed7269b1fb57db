"""Takes steps, saves every tenth, goes on from the newest checkpoint, and publishes one version."""

import argparse
import json
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

from nightschool.errors import Interrupted, Locked
from nightschool.events import now
from nightschool.store import checkpoints
from nightschool.store.atomic import publish_directory
from nightschool.store.checkpoints import checkpoint_path
from nightschool.store.home import Home
from nightschool.store.locks import lock
from nightschool.store.manifest import write_manifest
from nightschool.store.registry import Registry, VersionMetadata
from nightschool.store.runs import Run, RunStore
from nightschool.work.stop import Stop

SAVE_EVERY = 10
SECONDS_PER_STEP = 0.01
DEFAULT_STEPS = 200


def train(run: Run, stopped: Callable[[], bool], *, shares: bool = False) -> Iterator[None]:
    """Train a run, one step at a time; its status says how it ended."""
    with lock(run.lock_path, f"the run {run.id}"):
        recipe = run.recipe()
        total = recipe["train"]["max_steps"] or DEFAULT_STEPS
        step = max((point.step for point in checkpoints.ls(run)), default=0)
        about = {"pid": os.getpid(), "shares_process": shares, "error": None, "exit_code": None}
        run.update_status(state="running", step=step, steps_total=total, **about)
        while step < total:
            if stopped():
                save(run, step)
                run.update_status(state="interrupted", step=step, exit_code=Interrupted.exit_code)
                return
            step += 1
            row = {"time": now().isoformat(), "step": step, "loss": 1 / step, "tokens_per_second": 100.0}
            with run.metrics_path.open("a") as metrics:
                metrics.write(json.dumps(row) + "\n")
            if step % SAVE_EVERY == 0:
                save(run, step)
            yield
        facts = VersionMetadata(run_id=run.id, base=recipe["base"])
        version = Registry(run.home).publish(run.name, lambda folder: (folder / "w").write_text("w") and None, facts)
        run.update_status(state="completed", candidate=version.ref, step=step, exit_code=0)


def save(run: Run, step: int) -> None:
    target = checkpoint_path(run, 0, step, 1)
    if not target.exists():
        with publish_directory(target) as folder:
            (folder / "state.json").write_text("{}")
            write_manifest(folder, kind="checkpoint", step=step)


def main() -> int:
    parser = argparse.ArgumentParser()
    for name in ("--home", "--run", "--resume"):
        parser.add_argument(name)
    given = parser.parse_args()
    with Stop() as stop:
        run = RunStore(Home(Path(given.home))).get(given.run)
        try:
            for _ in train(run, lambda: stop.requested):
                stop.wait(SECONDS_PER_STEP)
        except Locked as error:
            return error.exit_code
        return run.status.exit_code or 0


if __name__ == "__main__":
    sys.exit(main())
