"""The other processes of a run: starting them, and what they do."""

from __future__ import annotations

import os
import socket
import subprocess
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path

from nightschool.config.recipe import Recipe
from nightschool.store import checkpoints
from nightschool.store.checkpoints import checkpoint_path
from nightschool.store.home import Home
from nightschool.store.runs import Run
from nightschool.training.allocator import keep_freed_memory
from nightschool.training.checkpoint import full_state, rng
from nightschool.training.checkpoint.saver import Ranks, open_saver
from nightschool.training.distributed.world import World
from nightschool.training.environment import checkpoint_context
from nightschool.training.loop import Budget, fit
from nightschool.training.prepare import prepare
from nightschool.training.progress import say
from nightschool.training.state import TrainState
from nightschool.work.processes import command
from nightschool.work.stop import Stop

_FAREWELL_SECONDS = 30.0


def log_of(run: Run, rank: int) -> Path:
    """Where a process other than the first one writes what it has to say."""
    return run.path / f"log-rank{rank}.txt"


@contextmanager
def started_ranks(home: Home, run: Run, root: Path, count: int) -> Iterator[Mapping[str, str]]:
    """Start the processes 1 … `count` - 1 of the run on this machine; yields the variables that make this one process 0.

    They end by themselves when process 0 is done or gone; what is left of them at the end is killed.
    """
    if count == 1:
        yield os.environ
        return
    shared = {
        "WORLD_SIZE": str(count),
        "LOCAL_WORLD_SIZE": str(count),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(_free_port()),
    }
    with ExitStack() as stack:
        for rank in range(1, count):
            log = stack.enter_context(log_of(run, rank).open("ab"))
            process = subprocess.Popen(
                command("train", "--home", str(home.path), "--root", str(root)),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env={**os.environ, **shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            )
            stack.callback(_say_farewell, process)
        # torch reads them from the environment of the process.
        os.environ.update(shared | {"RANK": "0", "LOCAL_RANK": "0"})
        try:
            yield os.environ
        finally:
            for name in (*shared, "RANK", "LOCAL_RANK"):
                os.environ.pop(name, None)


def follow(home: Home, run: Run, *, world: World, root: Path, stop: Stop) -> None:
    """Train along with process 0, which decides, and writes all but the parts of shared tensors.

    Raises:
        Interrupted: If one of the processes was asked to stop.
        RuntimeError: If process 0 is gone.
    """
    recipe = Recipe.model_validate(run.recipe())
    name, attempt = world.from_first(("", 0))
    point = checkpoints.get(run, name) if name else None
    with ExitStack() as stack:
        saver = None
        if wants_shards(recipe, world):
            ranks = saving_ranks(recipe, world, attempt)
            saver = stack.enter_context(open_saver(run, recipe.checkpoints, say, ranks=ranks))
        prepared = prepare(home, run, recipe, root=root, point=point, world=world)
        keep_freed_memory(recipe)  # from here on; what loading took for a moment is given back
        task, evaluate, budget = prepared.task, prepared.evaluate, prepared.budget
        state = TrainState(task.fingerprint)
        context = checkpoint_context(prepared, run.recipe_path.read_text(encoding="utf-8"))
        if saver is not None:
            task.shard(recipe.train.zero_stage)
        if point is not None:
            state = full_state.load(point.path, task, context, prepared.schedule, prepared.scaler, world=world)
        if saver is not None and more_saves_than_one(budget):
            saver.expect(task.expected_bytes())

        def save(now: TrainState) -> None:
            """Hand in what only this process has of the checkpoint."""
            world.gathered(rng.capture())
            if saver is not None:
                target = checkpoint_path(run, now.epoch, now.step, context.files_processed)
                part = full_state.part_to_save(task, now, world.rank)
                saver.save(target, part, last=now.step >= budget.steps_total)

        fit(
            task,
            state,
            budget,
            schedule=prepared.schedule,
            metrics=None,
            evaluate=None if evaluate is None else lambda: evaluate()[0],
            save=save,
            stop=stop,
            scaler=prepared.scaler,
            world=world,
        )


def more_saves_than_one(budget: Budget) -> bool:
    """Whether a run saves before its end, so that it is worth while to make memory for copies ready."""
    every = budget.save_every
    return every is None or every.unit != "steps" or every.amount < budget.steps_total


def wants_shards(recipe: Recipe, world: World) -> bool:
    """Whether the processes share the parameters among them."""
    return recipe.train.zero_stage > 0 and world.size > 1


def saving_ranks(recipe: Recipe, world: World, attempt: int | None = None) -> Ranks:
    """Who saves: all processes where they share the parameters, else the first one alone."""
    if not wants_shards(recipe, world):
        return Ranks()
    return Ranks(world.rank, world.size, num_neighbours=world.local_size - 1, attempt=attempt)


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
    return port


def _say_farewell(process: subprocess.Popen[bytes]) -> None:
    try:
        process.wait(_FAREWELL_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
