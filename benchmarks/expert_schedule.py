"""What does it save, and cost, that all micro-batches of a step pass one layer before the next, where experts lie in a file?

A step of eight micro-batches of 512 tokens each, of a model of 4 layers of width 256 with experts of width 512, two of them for a token. Counted are
the times that an expert is loaded in a step; seconds of the processor, on one thread, the file in the page cache; and the peak of the
resident set. Against it, micro-batches that pass one after the other: keeping all that a layer computes, and computing it again.
"""

from __future__ import annotations

import multiprocessing
import statistics
import time
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from expert_setups import forget_peak, new_task, peak_bytes, step
from harness import Benchmark

MICRO_BATCHES, MICRO_BATCH_TOKENS = 8, 512
SCHEDULES: dict[str, dict[str, Any]] = {
    "layer_by_layer": {},
    "one_by_one": {"accumulation_steps": 1},
    "one_by_one_recomputed": {"accumulation_steps": 1, "gradient_checkpointing": True},
}


def measured(num_experts: int, tokens: int, rounds: int, train: dict[str, Any]) -> tuple[float, float, int]:
    """Loads of an expert in a step, seconds of the processor, and the peak in bytes."""
    from nightschool.models.streamed import expert_stream

    torch.set_num_threads(1)
    task = new_task("disk", num_experts, tokens, micro_batches=MICRO_BATCHES, **train)
    stream = expert_stream(task.model)
    assert stream is not None
    store: Any = stream.store
    walk, loads = store.walk, 0

    def counted(visits: Iterable[Any]) -> Iterator[Any]:
        nonlocal loads
        for visited in walk(visits):
            loads += 1
            yield visited

    store.walk = counted
    step(task)  # allocates
    step(task)  # and does what the first one put off
    forget_peak()
    loads, seconds = 0, []
    for _ in range(rounds):
        started = time.process_time()
        step(task)
        seconds.append(time.process_time() - started)
    return loads / rounds / stream.shape.num_records, statistics.median(seconds), peak_bytes()


def main() -> None:
    benchmark = Benchmark(
        "expert_schedule",
        "is each expert loaded once in each direction of a step, whatever its micro-batches are?",
        {"loads_layer_by_layer": {"max": 2}, "seconds_to_one_by_one_recomputed": {"max": 1.0}},
    )
    sizes, rounds = ((8,), 3) if benchmark.quick else ((32, 128), 5)
    tokens = MICRO_BATCHES * (128 if benchmark.quick else MICRO_BATCH_TOKENS)
    figures: dict[str, float] = {}
    with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as alone:  # each with a peak of its own
        for num_experts in sizes:
            found = {
                name: alone.apply(measured, (num_experts, tokens, rounds, train)) for name, train in SCHEDULES.items()
            }
            for name, (loads, seconds, peak) in found.items():
                text = f"{loads:.1f} loads of an expert, {1000 * seconds:.0f} ms, {peak / 1e6:.0f} MB"
                benchmark.table([(f"{num_experts} experts, {name}", text)])
                figures |= {f"loads_{name}_{num_experts}": loads, f"peak_{name}_{num_experts}": float(peak)}
            own = found.pop("layer_by_layer")[1]
            figures |= {f"seconds_to_{name}_{num_experts}": own / of_it[1] for name, of_it in found.items()}
    figures["loads_layer_by_layer"] = max(figures[f"loads_layer_by_layer_{size}"] for size in sizes)
    figures["seconds_to_one_by_one_recomputed"] = max(
        figures[f"seconds_to_one_by_one_recomputed_{size}"] for size in sizes
    )
    benchmark.finish(figures)


if __name__ == "__main__":
    main()
