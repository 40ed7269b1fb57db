"""What does a step cost whose experts are streamed, against one with all of them resident?

A model of 4 layers of width 256 with experts of width 512, two of them for a token, and 2,048 tokens a step: 32 experts get 128 tokens each, 128
get 32. Seconds of the processor, those of the thread that reads and writes among them, on one thread otherwise; the file is warm.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch
from expert_setups import new_task, step
from harness import Benchmark, interleave, median_ratio


def main() -> None:
    benchmark = Benchmark(
        "expert_throughput",
        "does a step take as long with experts that are streamed as with resident ones?",
        {
            "host_to_resident": {"max": 1.0},
            "disk_to_resident_128_tokens": {"max": 1.15},
            "disk_to_resident_32_tokens": {"max": 1.30},
        },
    )
    torch.set_num_threads(1)
    figures: dict[str, float] = {}
    tokens, rounds = (512, 3) if benchmark.quick else (2048, 7)

    def measured(num_experts: int, tier: str) -> Callable[[], float]:
        task = new_task(tier, num_experts, tokens)

        def once() -> float:
            started = time.process_time()
            step(task)
            return time.process_time() - started

        once()  # allocates
        once()  # and does what the first one put off
        return once

    sizes = {128: 8, 32: 32} if benchmark.quick else {128: 32, 32: 128}
    for tokens_per_expert, num_experts in sizes.items():
        resident = measured(num_experts, "device")
        for tier in ("host", "disk"):  # one beside the resident ones, which leaves room for the file's pages
            results = interleave({"device": resident, tier: measured(num_experts, tier)}, rounds)
            figures[f"{tier}_to_resident_{tokens_per_expert}_tokens"] = median_ratio(results[tier], results["device"])
            benchmark.table(
                [
                    (f"{num_experts} experts, {name}", f"{1000 * statistics.median(times):.0f} ms")
                    for name, times in results.items()
                ]
            )
    figures["host_to_resident"] = max(value for name, value in figures.items() if name.startswith("host"))
    benchmark.finish(figures)


if __name__ == "__main__":
    main()
