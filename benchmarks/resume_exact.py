"""Is a run that was killed again and again, and resumed each time, the run that was never interrupted, bit for bit?

Five architectures, full and LoRA, in one process; fine-tuning and pretraining in two, which share the weights or not;
and a run that goes on with two processes and with one by turns. Each run is a process that SIGKILL hits at random
moments, and that goes on with `--resume latest`. Every second kill waits for the next save, for two seconds at most,
and then takes the writers of the checkpoint too: while they write, rename, move the pointer or remove old ones. Each
resume must find a checkpoint that can be read, of no older step than the last one that was announced. In the end every
tensor of the last checkpoint is compared with the uninterrupted run's; where the number of processes changed, the
position in the data and the losses are.
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

import real_model
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


@dataclass(frozen=True)
class Setting:
    """What is trained, and by how many processes: a resumed run takes the next number of `worlds`, in a circle."""

    architecture: str
    method: str
    worlds: tuple[int, ...] = (1,)
    zero_stage: int = 0

    @property
    def name(self) -> str:
        processes = " → ".join(str(size) for size in self.worlds)
        more = f", {processes} processes" if self.worlds != (1,) else ""
        return f"{self.architecture} {self.method}{more}{', shared weights' if self.zero_stage else ''}"


SETTINGS = [
    *(Setting(architecture, method) for architecture in ARCHITECTURES for method in METHODS),
    Setting("gpt-neox", "full", (2,)),
    Setting("gpt-neox", "pretrain", (2,)),
    Setting("gpt-neox", "pretrain", (2,), zero_stage=3),
    Setting("gpt-neox", "pretrain", (2, 1)),
]
REAL = [Setting("smollm2", "full"), Setting("smollm2", "lora")]
QUICK = [Setting("gpt-neox", "full"), Setting("qwen3-moe", "lora")]


class Trial:
    """A setting with its base, its data and its recipe."""

    def __init__(self, folder: Path, setting: Setting, length: dict[str, int]) -> None:
        from nightschool.data.synthetic import make_world, write_world
        from nightschool.data.tokenizer import train_bpe
        from nightschool.models.build import build_model
        from nightschool.models.export import save_version_folder
        from nightschool.store.home import Home

        self.folder, self.home, self.setting = folder, Home(folder / ".nightschool"), setting
        self.home.ensure()
        world = make_world(seed=0, num_people=2)
        write_world(world, folder)
        tokenizer = train_bpe(world.texts(), vocab_size=512)
        learning = {"learning_rate": 1e-3, "max_seq_len": 64, "dtype": "fp32", "num_threads": 1}
        self.recipe: dict[str, Any] = {
            "name": "trial",
            "method": setting.method,
            "checkpoints": {"every": "1 steps", "keep": {"last": 2, "best": 1}},
        }
        if setting.method == "pretrain":
            self._pretrain(world.texts(), tokenizer, learning)
            return
        if setting.architecture == "smollm2":
            base = str(real_model.load().path)
        else:
            base, ids = "./base", {name: getattr(tokenizer, name) for name in ("eos_token_id", "pad_token_id")}
            model = build_model(f"tiny-{setting.architecture}", len(tokenizer), 0, **ids)
            save_version_folder(model, tokenizer, folder / "base")
        # Adapters of experts cannot drop out.
        dropout = 0.0 if setting.architecture in ("qwen3-moe", "mixtral") else 0.1
        self.recipe |= {
            "base": base,
            "data": [{"path": "old_facts.json"}],
            "train": learning | {"batch_size": 4, "accumulation_steps": 2} | length,
            "lora": {"r": 4, "alpha": 8, "dropout": dropout},
        }

    def _pretrain(self, texts: list[str], tokenizer: Any, learning: dict[str, Any]) -> None:
        from nightschool.data.shards.tokenize import tokenize

        (self.folder / "text.txt").write_text("\n".join(texts * 8), encoding="utf-8")
        tokenize([self.folder / "text.txt"], self.folder / "shards", tokenizer, row_tokens=64, shard_tokens=4096)
        self.recipe |= {
            "base": "new:neox-tiny",
            "shape": {"num_hidden_layers": 2, "hidden_size": 64, "num_attention_heads": 2, "intermediate_size": 128},
            "data": [{"path": "./shards"}],
            "pretrain": {"sample_tokens": 0, "held_out_tokens": 512},
            "train": learning | {"max_steps": 24, "accumulation_steps": 1, "zero_stage": self.setting.zero_stage},
            "serve": {"promote": "never"},
        }

    def begin(self) -> Any:
        """A run of its own."""
        from nightschool.store.runs import RunStore

        return RunStore(self.home).create(self._recipe(self.setting.worlds[0]), name="trial")

    def _recipe(self, num_processes: int) -> dict[str, Any]:
        from nightschool.config.recipe import Recipe

        # As many sequences a step, however many processes share them.
        sizes = {"batch_size": 4 // num_processes} if self.setting.method == "pretrain" else {}
        train = self.recipe["train"] | {"num_processes": num_processes} | sizes
        return Recipe.model_validate(self.recipe | {"train": train}).as_plain()

    def process(self, run: Any, *, attempt: int = 0) -> multiprocessing.Process:
        """Start the run's process; from the second attempt on it resumes."""
        worlds = self.setting.worlds
        if len(worlds) > 1:
            run.recipe_path.write_text(json.dumps(self._recipe(worlds[attempt % len(worlds)])), encoding="utf-8")
        process = multiprocessing.get_context("fork").Process(
            target=run_once, args=(str(self.home.path), run.id, attempt > 0, str(self.folder))
        )
        process.start()
        return process

    def uninterrupted(self, times: int) -> tuple[Any, float]:
        """The run that nobody stops, and its wall seconds."""
        # The first one fills the page cache, which counts for small models; a kill is drawn from the last one's time.
        for _ in range(times):
            run, started = self.begin(), time.monotonic()
            process = self.process(run)
            process.join()
            assert process.exitcode == 0, f"the uninterrupted run ended with {process.exitcode}: {run.status.error}"
        return run, time.monotonic() - started

    def interrupted(self, kills: int, seconds: float, chance: random.Random) -> tuple[Any, Kills]:
        """The run that is killed up to `kills` times, and how that went."""
        run, killed, announced = self.begin(), Kills(), 0
        while True:
            starts = len(events(run, "training"))
            process = self.process(run, attempt=killed.total)
            process.join(chance.uniform(0.2, 0.9) * seconds if killed.total < kills else None)
            inside = killed.total % 2 == 0 and process.exitcode is None and wait_for_save(run, process)
            if process.exitcode is None:
                if inside:
                    time.sleep(chance.uniform(0, 0.03))  # from the first byte to the removal of old ones
                kill(process.pid)
                if inside:
                    for rank in range(max(self.setting.worlds)):
                        kill(writer_of(run, rank))
                process.join()
            begun = events(run, "training")[starts:]  # none if it was killed before it had read the checkpoint
            killed.older += bool(begun) and begun[0]["step"] < announced
            if process.exitcode != -signal.SIGKILL:
                assert process.exitcode == 0, f"a resumed run ended with {process.exitcode}: {run.status.error}"
                return run, killed
            announced = max([row["step"] for row in events(run, "checkpoint")], default=0)
            killed.total += 1
            killed.inside += inside
            if run.status.candidate is not None:  # killed on its way out, with everything done
                return run, killed

    def compare(self, one: Any, other: Any) -> tuple[int, int]:
        """Values of the last checkpoint that are missing or different, and how many there are."""
        from nightschool.store import checkpoints
        from nightschool.training.checkpoint.checkpoint_reader import load_group
        from nightschool.training.checkpoint.rng import group_of

        different = total = 0
        a, b = (checkpoints.newest_whole(run).checkpoint.path for run in (one, other))
        states = [json.loads((path / "state.json").read_text())["train"] for path in (a, b)]
        exact = ["step", "epoch", "batch_index", "tokens_consumed", "tokens_trained"]
        if len(self.setting.worlds) > 1:
            for key in ("loss_history", "heldout_history"):
                total += 1
                different += not all(abs(x - y) < 0.02 * y for x, y in zip(*(s[key] for s in states), strict=True))
        else:
            exact += ["loss_history", "heldout_history"]
            for group in ("model", "optimizer", *(group_of(rank) for rank in range(self.setting.worlds[0]))):
                mine, theirs = load_group(a, group), load_group(b, group)
                for name in mine.keys() | theirs.keys():
                    total += 1
                    different += not (name in mine and name in theirs and torch.equal(mine[name], theirs[name]))
        for key in exact:
            total += 1
            different += states[0][key] != states[1][key]
        return different, total


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


def writer_of(run: Any, rank: int) -> int | None:
    """The process that writes what a rank saves: it signs its lock."""
    path = run.writing_lock_path(rank)
    text = path.read_text().strip() if path.exists() else ""
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


def main() -> None:
    bench = Benchmark(
        "resume_exact",
        "Stopped by SIGKILL at random moments and resumed: tensors lost, tensors that differ",
        {
            "tensors_different": {"max": 0},
            "runs_not_bitwise_equal": {"max": 0},
            "resumed_from_older_than_announced": {"max": 0},
        },
        has_real=True,
    )
    torch.set_num_threads(1)
    import nightschool.training.run  # noqa: F401  imported once here, inherited by every process

    kills = 3 if bench.quick or bench.is_real else 15
    chance = random.Random(0)
    rows, different_total, tensors_total, unequal = [], 0, 0, 0
    all_kills = Kills()
    # A real model takes seconds for a step of eight sequences on one thread.
    real = {"max_steps": 6, "batch_size": 1}
    length = real if bench.is_real else {"epochs": 4 if bench.quick else 8}
    settings = (REAL[1:] if bench.quick else REAL) if bench.is_real else QUICK if bench.quick else SETTINGS
    for setting in settings:
        with tempfile.TemporaryDirectory() as folder:
            trial = Trial(Path(folder), setting, length)
            reference, seconds = trial.uninterrupted(1 if bench.is_real and bench.quick else 2)
            print(f"  ({seconds:.1f} s without interruption)", flush=True)
            different = total = 0
            killed = Kills()
            while killed.total < kills:  # a run that slips through is compared, and another one takes its place
                run, more = trial.interrupted(kills - killed.total, seconds, chance)
                killed = Kills(killed.total + more.total, killed.inside + more.inside, killed.older + more.older)
                differing, compared = trial.compare(reference, run)
                different, total = different + differing, total + compared
        rows.append(
            (
                setting.name,
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
            "runs": len(settings),
        }
    )


if __name__ == "__main__":
    main()
