"""Does the plan of a mixture say beforehand how long a step takes, and how much memory?

Four runs of `nightschool train`, each in a process of its own: experts resident, in the memory of the host and in a file, of
different numbers, with different numbers of tokens for each. The run prints its plan, trains, and writes down what was measured.
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from harness import Benchmark

TOKENS_PER_DOCUMENT = 128
# Tier, experts in each of four layers, documents of a micro-batch, micro-batches of a step.
RUNS = [("device", 8, 8, 1), ("host", 32, 16, 1), ("disk", 32, 16, 2), ("disk", 128, 32, 1)]
QUICK_RUNS = [("host", 8, 4, 1), ("disk", 8, 4, 2)]


def recipe(data: Path, tier: str, num_experts: int, batch_size: int, micro_batches: int, steps: int) -> dict[str, Any]:
    return {
        "name": f"plan-{tier}-{num_experts}",
        "base": "new:moe-tiny",
        "method": "full",
        "shape": {"hidden_size": 256, "num_hidden_layers": 4, "num_experts": num_experts, "expert_size": 512},
        "experts": {"tier": tier, "resident": 4},
        "data": [{"path": str(data)}],
        "train": {
            "max_steps": steps,
            "max_seq_len": TOKENS_PER_DOCUMENT,
            "batch_size": batch_size,
            "accumulation_steps": micro_batches,
            "dtype": "fp32",
            "num_threads": 1,
        },
        "checkpoints": {"every": f"{10 * steps} steps"},
        "serve": {"promote": "never"},
    }


def measured(home: Path, plain: dict[str, Any]) -> dict[str, float]:
    """What a run says at its end of a step and of its peak, beside what its plan said."""
    path = home / f"{plain['name']}.json"
    path.write_text(json.dumps(plain))
    done = subprocess.run(
        [sys.executable, "-m", "nightschool.cli.main", "-C", str(home), "train", str(path)],
        capture_output=True, text=True, check=False, env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    events = [
        json.loads(line)
        for log in home.rglob(f"{plain['name']}-*/events.jsonl")
        for line in log.read_text().splitlines()
    ]
    found = [event for event in events if event["event"] == "measured"]
    assert found, done.stdout + done.stderr
    return dict(found[-1])


def texts(path: Path, count: int) -> None:
    """Rows of words without a sense, each of about as many tokens as a sequence has."""
    chance = random.Random(0)
    words = ["".join(chance.choice("abcdefghij") for _ in range(4)) for _ in range(300)]
    rows = [{"text": " ".join(chance.choices(words, k=TOKENS_PER_DOCUMENT + 40))} for _ in range(count)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def main() -> None:
    benchmark = Benchmark(
        "expert_plan",
        "does the plan of a mixture foretell the time of a step and the peak of memory?",
        {"step_off": {"max": 0.20}, "bytes_off": {"max": 0.05}},
    )
    runs, steps = (QUICK_RUNS, 8) if benchmark.quick else (RUNS, 20)
    figures: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder)
        texts(home / "texts.jsonl", 800)
        for tier, num_experts, batch_size, micro_batches in runs:
            found = measured(home, recipe(home / "texts.jsonl", tier, num_experts, batch_size, micro_batches, steps))
            name = f"{tier}_{num_experts}_experts_{micro_batches}x{batch_size * TOKENS_PER_DOCUMENT}_tokens"
            figures[f"{name}_step"] = found["step_seconds"] / found["expected_step_seconds"]
            figures[f"{name}_bytes"] = found["process_bytes"] / found["expected_process_bytes"]
            benchmark.table(
                [
                    (
                        f"{name}: a step",
                        f"{found['step_seconds']:.3f} s, planned {found['expected_step_seconds']:.3f} s",
                    ),
                    (
                        f"{name}: the peak",
                        f"{found['process_bytes'] / 1e6:.0f} MB, planned {found['expected_process_bytes'] / 1e6:.0f} MB",
                    ),
                ]
            )
    for what in ("step", "bytes"):
        figures[f"{what}_off"] = max(abs(value - 1) for name, value in figures.items() if name.endswith(f"_{what}"))
    benchmark.finish(figures)


if __name__ == "__main__":
    main()
