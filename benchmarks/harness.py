"""What every benchmark shares: the quick switch, the clock, the record that it prints last.

A benchmark answers one question. It runs ours and the peer in turn in the same process tree, prints a table for
people, and ends with one JSON object on the last line for programs.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

DATA = Path(__file__).resolve().parents[2] / "shared" / "data"
PACKAGES = (
    "torch",
    "transformers",
    "peft",
    "trl",
    "accelerate",
    "fastapi",
    "uvicorn",
    "llama-cpp-python",
    "openvino-genai",
    "faiss-cpu",
    "wordllama",
    "sentence-transformers",
)


class Benchmark:
    """One question, its figures and its goals. `has_real`: it can be asked of a real pretrained model, too.

    `choices` are further options, and what each may be; the first is the default, and `chosen` what it is.
    """

    def __init__(
        self,
        name: str,
        question: str,
        goals: dict[str, dict[str, float]],
        *,
        has_real: bool = False,
        choices: Mapping[str, Sequence[str]] | None = None,
    ) -> None:
        parser = argparse.ArgumentParser(description=question)
        parser.add_argument(
            "--quick", action="store_true", help="a smaller setting that answers within 50 s on 2 cores"
        )
        if has_real:
            parser.add_argument(
                "--model",
                choices=("small", "real"),
                default="small",
                help="real: SmolLM2-135M-Instruct, which make real-model-file fetches; takes minutes, --quick too",
            )
        for option, values in (choices or {}).items():
            parser.add_argument(f"--{option}", choices=values, default=values[0])
        chosen = parser.parse_args()
        self.chosen: dict[str, str] = {option: getattr(chosen, option) for option in choices or {}}
        self.quick: bool = chosen.quick
        self.is_real: bool = has_real and chosen.model == "real"
        self.name, self.question, self.goals = name, question, goals
        self.started = time.monotonic()
        print(
            f"{name}: {question}{' (a real model)' if self.is_real else ''}{' (quick)' if self.quick else ''}",
            flush=True,
        )

    def table(self, rows: list[tuple[str, str]]) -> None:
        """Print two columns for people."""
        width = max(len(left) for left, _ in rows)
        for left, right in rows:
            print(f"  {left:<{width}}  {right}", flush=True)

    def finish(self, figures: dict[str, float]) -> None:
        """Print what was reached beside the goals, then the record. The quick setting may leave figures out."""
        for key, goal in self.goals.items():
            if self.quick and key not in figures:
                continue
            (kind, bound), value = next(iter(goal.items())), figures[key]
            reached = value >= bound if kind == "min" else value <= bound
            print(f"  {key}: {value:.4g}  (goal: {kind} {bound:g})  {'reached' if reached else 'MISSED'}")
        record = {
            "benchmark": self.name,
            "figures": figures,
            "goals": self.goals,
            "device": device(),
            "versions": versions(),
            "quick": self.quick,
            "model": "real" if self.is_real else "small",
            **self.chosen,
            "seconds": round(time.monotonic() - self.started, 1),
        }
        print(json.dumps(record))
        sys.stdout.flush()


def device() -> str:
    """The processor that the figures were measured on, and its cores."""
    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        model = next(
            (line.split(":", 1)[1].strip() for line in cpuinfo.read_text().splitlines() if "model name" in line), model
        )
    return f"{model}, {os.cpu_count()} cores"


def versions() -> dict[str, str]:
    """The versions of the packages that take part."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def interleave(contestants: dict[str, Callable[[], float]], rounds: int) -> dict[str, list[float]]:
    """Run each contestant in turn, `rounds` times, so that a drifting machine hits all alike."""
    results: dict[str, list[float]] = {name: [] for name in contestants}
    for _ in range(rounds):
        for name, contestant in contestants.items():
            results[name].append(contestant())
    return results


def median_ratio(ours: list[float], peer: list[float]) -> float:
    """Median of the ratios taken round by round."""
    return statistics.median(a / b for a, b in zip(ours, peer, strict=True))
