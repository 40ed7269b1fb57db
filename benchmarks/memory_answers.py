"""Answers by free greedy generation in the engine that serves, many questions at a time, and what counts as right."""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import nullcontext
from math import sqrt
from pathlib import Path
from typing import Any

from memory_reading import ends_here

from nightschool.engine.pool import BoundEngine, EnginePool
from nightschool.engine.request import GenerationRequest, SamplingParams
from nightschool.layers.memory_reading import MemoryReading
from nightschool.models.load import locate
from nightschool.store.home import Home

ROWS = 16
# The longest value has ten tokens; two more show whether it ends there.
ANSWER_TOKENS = 12


class Answering:
    """A version in an engine, as a server loads it."""

    def __init__(self, ref: str, home: Home) -> None:
        self._pool = EnginePool(home, num_rows=ROWS, queue_limit=4096)
        self.bound: BoundEngine = self._pool.bind(locate(ref, home, None), lambda _: nullcontext())

    def __call__(self, prompts: Sequence[str], readings: Sequence[MemoryReading | None] | None = None) -> list[str]:
        """What is said after each prompt until it ends or has `ANSWER_TOKENS`; with nothing to read it is the base alone."""
        params = SamplingParams(ANSWER_TOKENS, temperature=0)
        bound = self.bound
        handles = [
            bound.engine.submit(
                GenerationRequest(
                    "benchmark", bound.binding, bound.tokenizer(prompt)["input_ids"], params, reading=reading
                )
            )
            for prompt, reading in zip(prompts, readings or [None] * len(prompts), strict=True)
        ]
        return [handle.result(3600).text for handle in handles]

    def close(self) -> None:
        self._pool.close(self.bound)


def is_right(said: str, value: str) -> bool:
    """Whether an answer begins with the value, word for word, and no longer name."""
    said = said.strip()
    return said.startswith(value) and ends_here(said[len(value) :].split("\n")[0])


def share(flags: Sequence[bool]) -> float:
    return sum(flags) / max(1, len(flags))


def half_interval(p: float, n: int) -> float:
    """Half of Wilson's interval of 95 %."""
    z = 1.96
    return z / (1 + z * z / n) * sqrt(p * (1 - p) / n + z * z / (4 * n * n))


def newest_version(home: Home, run: Any) -> str:
    """The folder of what a run published."""
    candidate = run.status.candidate
    assert candidate is not None, "a run that ended has a candidate"
    return str(home.models / candidate.replace("@", "/"))


def seconds_per_step(run: Any) -> float:
    """Of the later half of a run's rows of metrics."""
    rows = [json.loads(line) for line in Path(run.metrics_path).read_text().splitlines()]
    first, last = rows[0], rows[-1]
    return float((last["seconds"] - first["seconds"]) / max(1, last["step"] - first["step"]))
