"""How much memory does a step take with 8, 32, 128 and 256 experts, two of them for a token, when they live in a file?

The peak of the resident set of a process of its own, over three steps after the model was made; the counter is reset before. Experts in
a file are mapped a few at a time and count with the rest; pages of the file that nobody maps are the kernel's and do not. The
model has 4 layers of width 256 with experts of width 512, and a step 512 tokens. Then both again at 128 experts with all
memory of their own (RLIMIT_DATA) limited to a third of what the resident one took.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
from pathlib import Path

from harness import Benchmark

MEASURING = Path(__file__).with_name("expert_setups.py")


def measured(tier: str, num_experts: int, size: tuple[int, int, int, int], limit: int | None = None) -> int | None:
    """The peak in bytes; None if the process did not get through."""
    tokens, *shape = size
    arguments = [tier, num_experts, tokens, 3, *shape, *([] if limit is None else [limit])]
    done = subprocess.run(
        [sys.executable, str(MEASURING), *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    if done.returncode != 0:
        assert limit is not None, done.stderr
        return None
    return int(done.stdout.split()[-1])


def main() -> None:
    benchmark = Benchmark(
        "expert_bytes",
        "does the memory of a step not depend on the number of experts?",
        {
            "largest_to_smallest": {"max": 1.05},
            "resident_to_streamed_128": {"min": 6},
            "streamed_runs_in_a_third": {"min": 1},
            "resident_runs_in_a_third": {"max": 0},
        },
    )
    size = (512, 128, 512, 2) if benchmark.quick else (512, 256, 512, 4)
    rounds = 1 if benchmark.quick else 3
    figures: dict[str, float] = {}
    for num_experts in (8, 128) if benchmark.quick else (8, 32, 128, 256):
        peaks = [measured("disk", num_experts, size) for _ in range(rounds)]
        figures[f"streamed_{num_experts}"] = statistics.median(peak for peak in peaks if peak is not None)
        benchmark.table([(f"{num_experts} experts, streamed", f"{figures[f'streamed_{num_experts}'] / 1e6:.0f} MB")])
    streamed = list(figures.values())
    resident = measured("device", 128, size)
    assert resident is not None
    figures |= {
        "resident_128": resident,
        "largest_to_smallest": max(streamed) / min(streamed),
        "resident_to_streamed_128": resident / figures["streamed_128"],
        "streamed_runs_in_a_third": float(measured("disk", 128, size, resident // 3) is not None),
        "resident_runs_in_a_third": float(measured("device", 128, size, resident // 3) is not None),
    }
    benchmark.table([("128 experts, resident", f"{resident / 1e6:.0f} MB")])
    benchmark.finish(figures)


if __name__ == "__main__":
    main()
