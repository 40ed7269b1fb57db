"""Is a run that was killed again and again, and resumed each time, the run that was never interrupted, bit for bit?

Five architectures, full and LoRA, and one with two processes that train together. Each run is a process that SIGKILL hits
at random moments, and that goes on with `--resume latest`. Two kills of three are meant to hit inside a save and to take the
writer of the checkpoint too: while it writes, renames, moves the pointer or removes old ones. Each resume must find a
checkpoint that can be read, of no older step than the last one that was announced. In the end every tensor of the last
checkpoint is compared with the uninterrupted run's.
"""

from __future__ import annotations

import contextlib
import io
import json
import multiprocessing
import os
import random
import signal
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from harness import Benchmark

ARCHITECTURES = ("gpt-neox", "llama", "qwen3", "qwen3-moe", "mixtral")
METHODS = ("full", "lora")


def run_once(home: str, run_id: str, resume: bool, root: str) -> None:
    """The body of a run's process: what `python -m nightschool.training.run` does, without importing torch again."""
    torch.set_num_threads(1)
    with contextlib.redirect_stdout(io.StringIO()):
        from nightschool.training.run import main as run_main

        code = run_main(["--home", home, "--run", run_id, "--root", root, *(["--resume", "latest"] if resume else [])])
    os._exit(code)


class Trial:
    """One architecture and method: its base, its data, its recipe."""

    def __init__(self, folder: Path, architecture: str, method: str, epochs: int, num_processes: int = 1) -> None:
        from nightschool.data.facts import make_world, write_world
        from nightschool.data.tokenizer import train_bpe
        from nightschool.models.build import build_model
        from nightschool.models.export import save_version_folder
        from nightschool.store.home import Home

        self.folder, self.home = folder, Home(folder / ".nightschool")
        self.home.ensure()
        world = make_world(seed=0, num_people=2)
        write_world(world, folder)
        tokenizer = train_bpe(world.texts(), vocab_size=512)
        model = build_model(
            f"tiny-{architecture}",
            len(tokenizer),
            0,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
        save_version_folder(model, tokenizer, folder / "base")
        self.recipe = {
            "name": "trial",
            "base": "./base",
            "method": method,
            "data": [{"path": "old_facts.json"}],
            "train": {
                "learning_rate": 1e-3, "epochs": epochs, "batch_size": 4, "accumulation_steps": 2, "max_seq_len": 64, "dtype": "fp32",
                "num_processes": num_processes, "num_threads": 1,
            },
            # Adapters of experts cannot drop out.
            "lora": {"r": 4, "alpha": 8, "dropout": 0.0 if architecture in ("qwen3-moe", "mixtral") else 0.1},
            "checkpoints": {"every": "1 steps", "keep": {"last": 2, "best": 1}},
        }  # fmt: skip

    def begin(self) -> Any:
        """A run of its own."""
        from nightschool.config.recipe import Recipe
        from nightschool.store.runs import RunStore

        return RunStore(self.home).create(Recipe.model_validate(self.recipe).as_plain(), name="trial")

    def process(self, run: Any, *, resume: bool) -> multiprocessing.Process:
        """Start the run's process."""
        process = multiprocessing.get_context("fork").Process(
            target=run_once, args=(str(self.home.path), run.id, resume, str(self.folder))
        )
        process.start()
        return process

    def uninterrupted(self) -> tuple[Any, float]:
        """The run that nobody stops, and its wall seconds."""
        for _ in range(2):  # the first one fills the page cache; the second one's time is what a kill is drawn from
            run, started = self.begin(), time.monotonic()
            process = self.process(run, resume=False)
            process.join()
            assert process.exitcode == 0, f"the uninterrupted run ended with {process.exitcode}: {run.status.error}"
        return run, time.monotonic() - started

    def interrupted(self, kills: int, seconds: float, chance: random.Random) -> tuple[Any, Kills]:
        """The run that is killed up to `kills` times, and how that went."""
        run, killed, announced = self.begin(), Kills(), 0
        while True:
            starts = len(events(run, "training"))
            process = self.process(run, resume=killed.total > 0)
            process.join(chance.uniform(0.2, 0.9) * seconds if killed.total < kills else None)
            inside = killed.total % 3 > 0 and process.exitcode is None and wait_for_save(run, process)
            if process.exitcode is None:
                if inside:
                    time.sleep(chance.uniform(0, 0.03))  # from the first byte to the removal of old ones
                kill(process.pid)
                if inside:
                    kill(writer_of(run))
                process.join()
            begun = events(run, "training")[starts:]  # none if it was killed before it had read the checkpoint
            killed.older += bool(begun) and begun[0]["step"] < announced
            if process.exitcode != -signal.SIGKILL:
                assert process.exitcode == 0, f"a resumed run ended with {process.exitcode}: {run.status.error}"
                return run, killed
            announced = max([row["step"] for row in events(run, "checkpoint")], default=0)
            killed.total += 1
            killed.inside += inside


@dataclass
class Kills:
    """How often a run was killed, how often of that inside a save, and how often it went on from too old a step."""

    total: int = 0
    inside: int = 0
    older: int = 0


def kill(pid: int | None) -> None:
    """End a process, if there is one."""
    if pid is not None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def writer_of(run: Any) -> int | None:
    """The process that writes the run's checkpoints: it signs its lock."""
    text = run.writing_lock_path().read_text().strip()
    return int(text) if text else None


def wait_for_save(run: Any, process: multiprocessing.Process) -> bool:
    """Wait until a checkpoint is being written; whether it came to that."""
    deadline = time.monotonic() + 2.0
    while time.monotonic() < deadline and process.is_alive():
        if any(run.checkpoints_path.glob("checkpoint-*.partial")):
            return True
        time.sleep(0.001)
    return False


def events(run: Any, kind: str) -> list[dict[str, Any]]:
    """The events of one kind."""
    from nightschool.events import read_events

    return [row for row in read_events(run.events_path) if row["event"] == kind]


def compare(one: Any, other: Any) -> tuple[int, int]:
    """Tensors that are missing or different in weights and optimizer of the last checkpoint, and how many there are."""
    from safetensors.torch import load_file

    from nightschool.store import checkpoints

    different = total = 0
    a, b = (checkpoints.newest_whole(run).checkpoint.path for run in (one, other))
    for file in ("model.safetensors", "optimizer.safetensors", "rng.safetensors"):
        mine, theirs = load_file(a / file), load_file(b / file)
        for name in mine.keys() | theirs.keys():
            total += 1
            different += not (name in mine and name in theirs and torch.equal(mine[name], theirs[name]))
    states = [json.loads((path / "state.json").read_text())["train"] for path in (a, b)]
    for key in ("step", "epoch", "batch_index", "tokens_consumed", "loss_history", "heldout_history"):
        total += 1
        different += states[0][key] != states[1][key]
    return different, total


def main() -> None:
    bench = Benchmark(
        "resume_exact",
        "Stopped by SIGKILL at random moments and resumed: tensors lost, tensors that differ",
        {
            "tensors_different": {"max": 0},
            "runs_not_bitwise_equal": {"max": 0},
            "resumed_from_older_than_announced": {"max": 0},
        },
    )
    torch.set_num_threads(1)
    import nightschool.training.run  # noqa: F401  imported once here, inherited by every process

    kills = 3 if bench.quick else 20
    trials = (
        [("gpt-neox", "full", 1), ("qwen3-moe", "lora", 1)]
        if bench.quick
        else [(a, m, 1) for a in ARCHITECTURES for m in METHODS] + [("gpt-neox", "full", 2)]
    )
    chance = random.Random(0)
    rows, different_total, tensors_total, unequal = [], 0, 0, 0
    all_kills = Kills()
    for architecture, method, num_processes in trials:
        name = f"{architecture} {method}" + (f", {num_processes} processes" if num_processes > 1 else "")
        with tempfile.TemporaryDirectory() as folder:
            trial = Trial(Path(folder), architecture, method, 4 if bench.quick else 8, num_processes)
            reference, seconds = trial.uninterrupted()
            print(f"  ({seconds:.1f} s without interruption)", flush=True)
            different = total = 0
            killed = Kills()
            while killed.total < kills:  # a run that slips through is compared, and another one takes its place
                run, more = trial.interrupted(kills - killed.total, seconds, chance)
                killed = Kills(killed.total + more.total, killed.inside + more.inside, killed.older + more.older)
                differing, compared = compare(reference, run)
                different, total = different + differing, total + compared
        rows.append(
            (
                name,
                f"killed {killed.total:2} times, {killed.inside} inside a save; {different} of {total} values differ",
            )
        )
        print(f"  {rows[-1][0]:<28} {rows[-1][1]}", flush=True)
        different_total, tensors_total = different_total + different, tensors_total + total
        all_kills = Kills(
            all_kills.total + killed.total, all_kills.inside + killed.inside, all_kills.older + killed.older
        )
        unequal += different > 0
    bench.finish(
        {
            "tensors_different": different_total,
            "runs_not_bitwise_equal": unequal,
            "values_compared": tensors_total,
            "resumed_from_older_than_announced": all_kills.older,
            "kills": all_kills.total,
            "kills_inside_a_save": all_kills.inside,
            "runs": len(trials),
        }
    )


if __name__ == "__main__":
    main()
