"""How fast does pretraining run against Hugging Face's Trainer, and against a bare loop over the same kernels?

All three train the same GPT-NeoX from the same weights on the same sequences in the same order, in the same dtype. Ours is a
whole run, with its log, held-out losses and checkpoints; the bare loop has none of that. Each runs in a process of its own,
whose peak memory is its own; they take turns of a few seconds, because a shared machine changes its speed within minutes.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

from harness import DATA, Benchmark
from turns import Outcome, take_turns

SEQ_LEN = 512
GOALS = {
    "vs_trainer_8k": {"min": 1.10},
    "vs_trainer_32k": {"min": 1.2},
    "vs_bare_loop": {"min": 0.97},
    "peak_bytes_vs_trainer_32k": {"max": 0.75},
    "loss_difference": {"max": 0.01},
}
# preset, vocabulary, batch size, steps, steps of the quick setting
SETTINGS = [
    ("neox-tiny", 8192, 8, 120, 12),
    ("neox-30m", 8192, 4, 54, 0),
    ("neox-tiny", 32768, 8, 54, 0),
    # 8,192 tokens, the micro-batch of recipes/neox-production.yaml: what logits cost shows in the peak.
    ("neox-30m", 32768, 16, 16, 0),
]
# The rhythm of recipes/neox-test.yaml, the quicker of the two documented ones; the log is written at every step.
CHECKPOINT_STEPS = 50
# What is paid once, in all three: memory that is had for the first time, kernels that are made.
WARM_UP_STEPS = 4


def recipe(place: str, preset: str, batch_size: int, steps: int, dtype: str) -> dict[str, Any]:
    """What all three do."""
    return {
        "name": "bench",
        "base": f"new:{preset}",
        "method": "pretrain",
        "data": [{"path": place}],
        "held_out": {"share": 0.01},
        "pretrain": {"held_out_tokens": 4 * SEQ_LEN, "loss_across_documents": True, "sample_tokens": 0},
        "train": {
            "max_steps": steps,
            "max_seq_len": SEQ_LEN,
            "batch_size": batch_size,
            "accumulation_steps": 1,
            "learning_rate": 1e-3,
            "lr_schedule": "constant",
            "weight_decay": 0.0,
            "beta2": 0.95,
            "max_grad_norm": 1.0,
            "dtype": dtype,
            "num_threads": 2,
            "log_every": 1,
            "evaluate_every": f"{min(CHECKPOINT_STEPS, steps // 2)} steps",
        },
        "checkpoints": {"every": f"{min(CHECKPOINT_STEPS, steps // 2)} steps"},
        "serve": {"promote": "never"},
    }


def warm_up(plain: dict[str, Any]) -> int:
    """How many steps are not counted."""
    return min(WARM_UP_STEPS, plain["train"]["max_steps"] // 4)


def prepared_run(plain: dict[str, Any], home_path: Path) -> Any:
    """The model, the batches and the optimizer of the recipe."""
    from nightschool.config.recipe import Recipe
    from nightschool.store.home import Home
    from nightschool.training.methods.prepared import Setup
    from nightschool.training.methods.pretrain import Pretrain

    return Pretrain.prepare(Setup(Recipe.model_validate(plain), Home(home_path), Path.cwd()))


def child_ours(plain: dict[str, Any], scratch: Path) -> tuple[list[float], list[float]]:
    """A whole run, timed by the rows of its metrics: what lies between the rows is in it.

    Like its peers it returns the loss of each step, and when each ended (seconds of the wall clock).
    """
    from datetime import datetime

    from nightschool.events import read_events
    from nightschool.store.home import Home
    from nightschool.store.runs import RunStore
    from nightschool.training.run import execute
    from nightschool.work.stop import Stop

    home = Home(scratch / "home")
    home.ensure()
    run = RunStore(home).create(plain, name="bench")
    with Stop() as stop:
        execute(home, run, resume=None, root=scratch, stop=stop)
    rows = list(read_events(run.metrics_path))
    return [row["loss"] for row in rows], [datetime.fromisoformat(row["time"]).timestamp() for row in rows]


def child_bare(plain: dict[str, Any], scratch: Path) -> tuple[list[float], list[float]]:
    """The same kernels and nothing else."""
    import torch

    prepared = prepared_run(plain, scratch / "home")
    task, steps = prepared.task, plain["train"]["max_steps"]
    task.model.train()
    losses, moments = [], []
    for step in range(steps):
        batch = task.batch(0, step * task.stride)
        loss = task.loss(batch).sum / batch.tokens_trained
        loss.backward()
        gradients = task.optimizer.gradients_ready()
        norm = torch.nn.utils.get_total_norm(gradients, foreach=True)
        torch._foreach_mul_(gradients, torch.clamp(1.0 / (norm + 1e-6), max=1.0))
        for group in task.optimizer.inner.param_groups:
            group["lr"] = 1e-3
        task.optimizer.inner.step()
        task.optimizer.zero_grad()
        losses.append(loss.item())
        moments.append(time.time())
    return losses, moments


def child_trainer(plain: dict[str, Any], scratch: Path) -> tuple[list[float], list[float]]:
    """Hugging Face's Trainer. It shifts labels itself, so it gets one token more of each sequence."""
    import torch
    from torch.utils.data import Dataset, SequentialSampler
    from transformers import Trainer, TrainerCallback, TrainingArguments

    prepared = prepared_run(plain, scratch / "home")
    train, batches = plain["train"], prepared.task.batches
    count = train["max_steps"] * train["batch_size"]

    class Sequences(Dataset):  # type: ignore[type-arg]
        def __len__(self) -> int:
            return count

        def __getitem__(self, place: int) -> dict[str, torch.Tensor]:
            batch = batches.get(0, place, 1)
            ids = torch.cat([batch.input_ids[0], batch.labels[0, -1:]])
            return {"input_ids": ids, "labels": ids.clone()}

    moments: list[float] = []

    class Clock(TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            moments.append(time.time())

    class InOrder(Trainer):
        def _get_train_sampler(self, *_: Any, **__: Any) -> Any:
            return SequentialSampler(self.train_dataset)

    # A fresh model from the same seed, with the attention that transformers takes by itself.
    from nightschool.models.build import build_model

    model = build_model(prepared.recipe.base, prepared.loaded.vocab_size, prepared.recipe.train.seed)
    bf16 = prepared.task.compute_dtype == torch.bfloat16
    del prepared
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer = InOrder(
            model=model,
            args=TrainingArguments(
                output_dir=str(scratch / "trainer"),
                use_cpu=True,
                bf16=bf16,
                max_steps=train["max_steps"],
                per_device_train_batch_size=train["batch_size"],
                learning_rate=1e-3,
                lr_scheduler_type="constant",
                weight_decay=0.0,
                adam_beta2=0.95,
                max_grad_norm=1.0,
                logging_steps=1,
                save_strategy="no",
                report_to=[],
                disable_tqdm=True,
            ),
            train_dataset=Sequences(),
            callbacks=[Clock()],
        )
        trainer.train()
    return [row["loss"] for row in trainer.state.log_history if "loss" in row], moments


CHILDREN = {"ours": child_ours, "bare": child_bare, "trainer": child_trainer}


def run_children(who: list[str], plain: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The contestants in turns; the losses, the seconds of the steps that count and the peak memory of each."""
    with tempfile.TemporaryDirectory() as scratch:
        commands = {}
        for name in who:
            (Path(scratch) / name).mkdir()
            commands[name] = [sys.executable, __file__, "--child", name, json.dumps(plain), f"{scratch}/{name}"]
        outcomes = take_turns(commands, env={**os.environ, "OMP_NUM_THREADS": "2", "PYTHONWARNINGS": "ignore"})
    return {name: _result(name, outcome, warm_up(plain)) for name, outcome in outcomes.items()}


def _result(name: str, outcome: Outcome, skip: int) -> dict[str, Any]:
    if outcome.returncode:
        sys.exit(f"{name} failed:\n{outcome.stdout[-2000:]}\n{outcome.stderr[-3000:]}")
    plain: dict[str, Any] = json.loads(outcome.stdout.splitlines()[-1])
    moments = plain.pop("moments")
    # The last step of ours has the evaluation and the checkpoint of the run's end beside those of its rhythm.
    return plain | {"seconds": outcome.active_seconds(moments[skip - 1], moments[-2])}


def child() -> None:
    import resource

    who, plain, scratch = sys.argv[2], json.loads(sys.argv[3]), Path(sys.argv[4])
    losses, moments = CHILDREN[who](plain, scratch)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(json.dumps({"losses": losses, "moments": moments, "peak": peak}))


def make_shards(folder: Path, vocab_size: int) -> Path:
    """The shared English texts as shards with a vocabulary of this size."""
    from nightschool.data.shards.tokenize import tokenize, train_tokenizer

    files = sorted((DATA / "text").glob("*.txt"))
    if not files:
        sys.exit(f"This benchmark reads plain texts below {DATA.name}/text beside the checkout; there are none.")
    out = folder / f"shards-{vocab_size}"
    tokenize(files, out, train_tokenizer(files, f"train:bpe-{vocab_size}"), row_tokens=SEQ_LEN)
    return out


def main() -> None:
    bench = Benchmark("pretrain_throughput", "Pretraining against Trainer and against a bare loop", GOALS)
    rounds = 1 if bench.quick else 2
    ratios: dict[str, list[float]] = {key: [] for key in GOALS}
    figures: dict[str, float] = {}
    settings = [
        (preset, vocab, batch_size, quick_steps if bench.quick else steps)
        for preset, vocab, batch_size, steps, quick_steps in SETTINGS
        if quick_steps or not bench.quick
    ]
    with tempfile.TemporaryDirectory() as scratch:
        places = {vocab: make_shards(Path(scratch), vocab) for vocab in {setting[1] for setting in settings}}
        for preset, vocab, batch_size, steps in settings:
            # One dtype for all: what is fast here for this shape was found out once, by ours.
            dtype = os.environ.get("BENCH_DTYPE", "fp32" if preset == "neox-tiny" else "bf16")
            plain = recipe(str(places[vocab]), preset, batch_size, steps, dtype)
            outcomes: dict[str, list[dict[str, Any]]] = {who: [] for who in CHILDREN}
            for turn in range(rounds):
                # The bare loop is so near that its ratio needs several rounds; Trainer's does not.
                for who, result in run_children(
                    [who for who in CHILDREN if who != "trainer" or not turn], plain
                ).items():
                    outcomes[who].append(result)
            tokens = (steps - 1 - warm_up(plain)) * batch_size * SEQ_LEN
            rates = {who: [tokens / one["seconds"] for one in each] for who, each in outcomes.items()}
            peaks = {who: statistics.median(one["peak"] for one in each) for who, each in outcomes.items()}
            mine, theirs = outcomes["ours"][0]["losses"], outcomes["trainer"][0]["losses"]
            difference = max(abs(a - b) / b for a, b in zip(mine, theirs, strict=True))
            size = "8k" if vocab == 8192 else "32k"
            against_trainer = rates["ours"][0] / rates["trainer"][0]
            against_bare = sum(one["seconds"] for one in outcomes["bare"]) / sum(
                one["seconds"] for one in outcomes["ours"]
            )
            ratios[f"vs_trainer_{size}"].append(against_trainer)
            ratios["vs_bare_loop"].append(against_bare)
            ratios["loss_difference"].append(difference)
            figures |= {
                f"{preset}_{size}_vs_trainer": round(against_trainer, 3),
                f"{preset}_{size}_vs_bare_loop": round(against_bare, 3),
                f"{preset}_{size}_peak_vs_trainer": round(peaks["ours"] / peaks["trainer"], 3),
            }
            if size == "32k":
                ratios["peak_bytes_vs_trainer_32k"].append(peaks["ours"] / peaks["trainer"])
            bench.table(
                [
                    (
                        f"{preset}, {vocab} ids, {dtype}: {who}",
                        f"{statistics.mean(rates[who]):8.0f} tokens/s  peak {peaks[who] / 1e6:6.0f} MB",
                    )
                    for who in CHILDREN
                ]
                + [("largest difference of a loss", f"{difference:.2%}")]
            )
    worst = {key: min(values) if "min" in GOALS[key] else max(values) for key, values in ratios.items() if values}
    bench.finish({key: round(value, 4) for key, value in worst.items()} | figures)


if __name__ == "__main__":
    child() if sys.argv[1:2] == ["--child"] else main()
