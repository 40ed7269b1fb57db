"""What does a real model know after some nights of sixteen new facts each, and what did it lose?

SmolLM2-135M-Instruct, each fact given in one wording and asked in four that were written by hand; corrections of earlier nights among
them. What the base answers of the real world, its drift and its loss on plain text say what was lost. Takes half an hour on two cores and one
seed; --quick studies one night and takes minutes.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import real_model
from harness import DATA, Benchmark
from nights_contestants import PLAIN, STUDIED, TRL, TRL_FULL, TRL_REPLAY, Nightschool, Remembered, Trl
from nights_exam import Exam, Marks, facts

CONTESTANTS: Mapping[str, tuple[Any, dict[str, Any]]] = {
    "studied": (Nightschool, STUDIED),
    "plain": (Nightschool, PLAIN),
    "memory": (Remembered, {}),
    "trl": (Trl, TRL),
    "trl_replay": (Trl, TRL_REPLAY),
    "trl_full": (Trl, TRL_FULL),
}


def main() -> None:
    bench = Benchmark(
        "nights",
        "New facts known, old ones kept, and what else was lost, after nights on SmolLM2-135M",
        {
            "new": {"min": 0.95},
            "old": {"min": 0.95},
            "corrected": {"min": 0.95},
            "stale": {"max": 0.01},
            "world": {"min": 0.98},
            "drift_first": {"max": 0.05},
            "drift_last": {"max": 0.10},
            "perplexity": {"max": 1.02},
            "minutes": {"max": 12},
        },
        choices={"nights": ("7", "1", "2", "3"), "seed": ("0", "1", "2"), "who": ("all", *CONTESTANTS)},
    )
    base = real_model.find()
    if base is None or not DATA.is_dir():
        sys.exit("Needs SmolLM2 (make real-model-file) and the shared data.")
    from nightschool.store.home import Home

    nights = 1 if bench.quick else int(bench.chosen["nights"])
    who = list(CONTESTANTS) if bench.chosen["who"] == "all" else [bench.chosen["who"]]
    figures: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as scratch:
        exam = Exam(base, Home(Path(scratch) / "exam"), few=bench.quick)
        for name in who:
            make, settings = CONTESTANTS[name]
            one = make(Path(scratch) / name, base, int(bench.chosen["seed"]), settings)
            exam.home = Home(Path(scratch) / name / ".nightschool")
            taught: list[tuple[float, Marks]] = []
            for night in range(1, nights + 1):
                minutes = one.study(night, [fact for fact in facts() if fact.night == night])
                known = [fact for fact in facts() if fact.night <= night]
                marks = exam.take(one.ref, known, night, getattr(one, "memory", None))
                taught.append((minutes, marks))
                print(
                    json.dumps({"who": name, "night": night, "minutes": round(minutes, 2)} | _rounded(marks)),
                    flush=True,
                )
            figures |= {key if name == who[0] else f"{name}_{key}": value for key, value in _summary(taught).items()}
    bench.goals = {key: goal for key, goal in bench.goals.items() if key in figures}  # one night has nothing old
    bench.finish(figures)


def _summary(taught: list[tuple[float, Marks]]) -> dict[str, float]:
    last = taught[-1][1]
    found: dict[str, float | None] = {
        "new": sum(marks.new for _, marks in taught) / len(taught),
        "old": last.old,
        "corrected": last.corrected,
        "stale": last.stale,
        "world": last.world,
        "drift_first": taught[0][1].drift,
        "drift_last": last.drift,
        "perplexity": last.perplexity,
        "minutes": max(minutes for minutes, _ in taught),
    }
    return {key: round(value, 4) for key, value in found.items() if value is not None}


def _rounded(marks: Marks) -> dict[str, Any]:
    return {key: None if value is None else round(value, 4) for key, value in asdict(marks).items()}


if __name__ == "__main__":
    main()
