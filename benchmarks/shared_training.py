"""What do sixteen LoRA runs (eight in the quick setting) cost in one process on one base, and what do they cost each other?

They are compared with one of them alone, and with one run whose batch is as large as all of theirs together. Each run has
facts, an order and a seed of its own, and an adapter as .env.example shows it (rank 16 on q_proj and v_proj), or with
`--adapter all-linear` one of rank 8 on all linear layers. Then, in one more process, one run's learning rate explodes, one is asked to
stop, and the process is killed; the others go on from their checkpoints.
"""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import psutil
import real_model
from harness import Benchmark

from nightschool.config.recipe import Recipe
from nightschool.data.synthetic import make_world
from nightschool.events import read_events
from nightschool.models.load import plain_folder
from nightschool.store import checkpoints
from nightschool.store.home import Home
from nightschool.store.runs import Run, RunStore
from nightschool.work.processes import command

GOALS = {
    "peak_vs_one": {"max": 1.25},
    "tokens_per_second_vs_one": {"min": 0.9},
    "largest_difference": {"max": 1e-5},
    "touched_by_others": {"max": 0},
}
# A small tenant: LORA_R, LORA_ALPHA and LORA_TARGET_MODULES as .env.example has them. And one with 2.7 times its bytes.
ADAPTERS: dict[str, dict[str, Any]] = {
    "q-v": {"r": 16, "alpha": 32, "dropout": 0.05, "target_modules": ["q_proj", "v_proj"]},
    "all-linear": {"r": 8, "alpha": 16, "dropout": 0.05},
}
RECORDS = 4
SAMPLE_SECONDS = 0.05
MORE_BYTES = 2 * 2**20


@dataclass(frozen=True)
class Setting:
    """What is trained on, how long, and where it all lies."""

    place: Path
    base: str
    steps: int
    fault_steps: int
    adapter: Mapping[str, Any]

    def create(self, name: str, *, steps: int, batch: int = RECORDS, worlds: Sequence[int], rate: float = 1e-3) -> Run:
        """A run over the facts of some worlds."""
        rows = [
            {"query": one.question, "retrieved": one.answer}
            for world in worlds
            for one in make_world(seed=world, num_people=12).examples()
        ]
        (self.place / f"{name}.json").write_text(json.dumps(rows))
        recipe = Recipe.model_validate(
            {
                "name": name,
                "base": self.base,
                "method": "lora",
                "data": [{"path": f"{name}.json"}],
                "replay": {"ratio": 0},
                "train": {
                    "max_steps": steps,
                    "epochs": 1000,
                    "batch_size": batch,
                    "accumulation_steps": 1,
                    "max_seq_len": 256,
                    "learning_rate": rate,
                    "warmup_steps": 0,
                    "dtype": "fp32",
                    "num_threads": os.cpu_count(),
                    "log_every": 1,
                    "seed": worlds[0],
                },
                "lora": self.adapter,
                "checkpoints": {"every": "3 steps" if steps == self.fault_steps else f"{steps} steps"},
                "serve": {"promote": "never"},
            }
        )
        return RunStore(Home(self.place / "home").ensure()).create(recipe.as_plain(), name=name)

    def alone(self, run: Run) -> int:
        """Train one run in a process of its own; the most bytes that it and its writer held at once."""
        return peak_of(command("train", "--home", str(run.home.path), "--run", run.id, "--root", str(self.place)))

    def together(
        self, runs: Sequence[Run], resume: str | None = None, watch: Callable[[psutil.Process], bool] = lambda _: False
    ) -> int:
        """Train all of them in one process; the most bytes that it held at once. It is killed when `watch` says so."""
        members = self.place / "members.json"
        members.write_text(json.dumps([{"run": r.id, "resume": resume, "root": str(self.place)} for r in runs]))
        home = str(runs[0].home.path)
        return peak_of(command("train-together", "--home", home, "--members", str(members)), watch)


def peak_of(line: Sequence[str], watch: Callable[[psutil.Process], bool] = lambda _: False) -> int:
    """Run a command, and look often at what its processes hold: shared pages count once.

    To count them so costs 20 ms a gigabyte, of the time that is measured: it is done where they hold more than ever before.
    """
    with subprocess.Popen(line, stdout=subprocess.DEVNULL, stderr=subprocess.STDOUT, env=environment()) as started:
        tree, peak, most = psutil.Process(started.pid), 0, 0
        while started.poll() is None:
            try:
                processes = [tree, *tree.children(recursive=True)]
                held = sum(process.memory_info().rss for process in processes)
                if held > most + MORE_BYTES:
                    most = held
                    peak = max(peak, sum(process.memory_full_info().pss for process in processes))
                if watch(tree):
                    tree.kill()
            except psutil.Error:
                pass  # one ended meanwhile, and the sum is no smaller for it than at the look before
            time.sleep(SAMPLE_SECONDS)
    return peak


def environment() -> dict[str, str]:
    """As jobs start their processes."""
    from nightschool.jobs.launch import child_environment

    return child_environment("shared")


def tokens_per_second(runs: Sequence[Run]) -> float:
    """Tokens trained of all runs from the end of step 1 to that of the last step but one, after which runs end in turn."""
    first, last, tokens = [], [], 0
    for run in runs:
        rows = list(read_events(run.metrics_path))[:-1]
        first.append(datetime.fromisoformat(rows[0]["time"]))
        last.append(datetime.fromisoformat(rows[-1]["time"]))
        tokens += sum(row["tokens_trained"] for row in rows[1:])
    return tokens / (max(last) - max(first)).total_seconds()


def difference(a: Run, b: Run) -> float:
    """The largest difference between the first moments of the last checkpoints: all gradients are in them, undivided."""
    from nightschool.training.checkpoint.checkpoint_reader import load_group

    left, right = (load_group(checkpoints.ls(run)[-1].path, "optimizer") for run in (a, b))
    names = [name for name in right if name.startswith("first_moment.")]
    return max(float((left[name] - right[name]).abs().max()) for name in names)


def small_base(place: Path) -> str:
    """A Qwen3 of 10 million random weights."""
    from real_chats import chats, qwen3, tokenizer

    from nightschool.models.export import save_version_folder

    learned = tokenizer(chats(2000))
    save_version_folder(qwen3(len(learned)), learned, place / "base")
    return str(place / "base")


def real_base() -> str:
    path = real_model.find()
    if path is None:
        raise SystemExit("There is no pretrained model. Run: make real-model-file")
    return str(plain_folder(path, Home(real_model.folder() / "home")))


def faults(setting: Setting) -> tuple[int, float]:
    """Runs of which one explodes, one is stopped, and all are killed: how many others were touched, and by how much at most."""
    steps = setting.fault_steps
    names = ["explodes", "stopped", "first", "second"]
    runs = [
        setting.create(f"{name}-{kind}", steps=steps, worlds=[place], rate=1e30 if name == "explodes" else 1e-3)
        for kind in ("together", "alone")
        for place, name in enumerate(names)
        if kind == "together" or place > 1
    ]
    together, alone = runs[:4], runs[4:]
    asked = False

    def watch(_: psutil.Process) -> bool:
        nonlocal asked
        if not asked and together[1].status.step >= 1:
            together[1].request_stop("A cancellation")
            asked = True
        return any(checkpoints.ls(run) for run in together[2:])

    setting.together(together, watch=watch)
    states = [run.status.state for run in together[:2]]
    setting.together(together[2:], resume="latest")
    apart = []
    for one, solo in zip(together[2:], alone, strict=True):
        setting.alone(solo)
        apart.append(difference(one, solo) if one.status.state == "completed" else float("inf"))
    touched = sum(1 for value in apart if not value <= GOALS["largest_difference"]["max"])
    return touched + (states != ["failed", "interrupted"]), max(apart)


def main() -> None:
    bench = Benchmark(
        "shared_training",
        "what sixteen runs on one base cost",
        GOALS,
        has_real=True,
        choices={"adapter": list(ADAPTERS)},
    )
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        steps = (3 if bench.quick else 12) if bench.is_real else (5 if bench.quick else 40)
        num_runs = 8 if bench.quick else 16
        setting = Setting(
            place,
            real_base() if bench.is_real else small_base(place),
            steps,
            fault_steps=6,
            adapter=ADAPTERS[bench.chosen["adapter"]],
        )
        runs = [setting.create(f"together{n}", steps=steps, worlds=[n]) for n in range(num_runs)]
        peak = setting.together(runs)
        speed = tokens_per_second(runs)
        assert all(run.status.state == "completed" for run in runs)
        solos = [setting.create(f"alone{n}", steps=steps, worlds=[n]) for n in range(1 if bench.quick else 4)]
        peaks = [setting.alone(solo) for solo in solos]
        apart = max(itertools.starmap(difference, zip(runs, solos, strict=False)))
        solo_speed = tokens_per_second(solos[:1])
        whole = setting.create("whole", steps=steps, batch=num_runs * RECORDS, worlds=range(num_runs))
        whole_peak = setting.alone(whole)
        whole_speed = tokens_per_second([whole])
        figures: dict[str, float] = {
            "peak_vs_one": peak / max(peaks),
            "peak_vs_one_of_the_same_batch": peak / whole_peak,
            "tokens_per_second_vs_one": speed / whole_speed,
            "tokens_per_second_vs_one_small": speed / solo_speed,
            "largest_difference": apart,
        }
        if not (bench.quick and bench.is_real):
            figures["touched_by_others"], figures["largest_difference_after_faults"] = faults(setting)
    rows = {
        f"{num_runs} runs together": (peak, speed),
        "one of them alone": (max(peaks), solo_speed),
        "one run of the same batch": (whole_peak, whole_speed),
    }
    bench.table(
        [(name, f"{held / 1e6:7.0f} MB at most   {rate:7.0f} tokens trained/s") for name, (held, rate) in rows.items()]
    )
    bench.finish(figures)


if __name__ == "__main__":
    main()
