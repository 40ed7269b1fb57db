"""How long does `nightschool --help` take beyond starting Python? Peer: `python -c pass`, in turn, whole processes."""

from __future__ import annotations

import statistics
import subprocess
import sys
import time
from pathlib import Path

from harness import Benchmark, interleave


def wall_seconds(*argv: str) -> float:
    """Wall seconds of one process from start to exit."""
    started = time.perf_counter()
    subprocess.run(argv, check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - started


def main() -> None:
    bench = Benchmark(
        "cli_startup",
        "What does `nightschool --help` cost beyond `python -c pass`?",
        {"extra_seconds": {"max": 0.5}},
    )
    command = str(Path(sys.executable).with_name("nightschool"))
    contestants = {
        "ours": lambda: wall_seconds(command, "--help"),
        "python": lambda: wall_seconds(sys.executable, "-c", "pass"),
    }
    interleave(contestants, 1)
    results = interleave(contestants, 5 if bench.quick else 15)
    extra = statistics.median(a - b for a, b in zip(results["ours"], results["python"], strict=True))
    bench.table(
        [
            ("nightschool --help", f"{statistics.median(results['ours']):.3f} s"),
            ("python -c pass", f"{statistics.median(results['python']):.3f} s"),
        ]
    )
    bench.finish({"extra_seconds": round(extra, 4)})


if __name__ == "__main__":
    main()
