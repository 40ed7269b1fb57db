"""What does `pip install .` bring in? Bytes on disk and seconds, with and without torch, in a fresh environment."""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from pathlib import Path

from harness import Benchmark

ROOT = Path(__file__).resolve().parents[1]


def tree_bytes(folder: Path) -> int:
    """Bytes of all files below a folder, links not followed."""
    return sum(path.stat(follow_symlinks=False).st_size for path in folder.rglob("*") if not path.is_dir())


def main() -> None:
    bench = Benchmark("import_weight", "How many bytes and seconds does `pip install .` take?", {})
    with tempfile.TemporaryDirectory() as scratch:
        venv = Path(scratch) / "venv"
        subprocess.run([sys.executable, "-m", "venv", str(venv)], check=True)
        python = str(venv / "bin" / "python")
        site = next((venv / "lib").glob("python*/site-packages"))
        empty_bytes = tree_bytes(site)
        pip = [
            python,
            "-m",
            "pip",
            "install",
            "--quiet",
            "--disable-pip-version-check",
            "-c",
            str(ROOT / "constraints.txt"),
        ]
        started = time.perf_counter()
        if not bench.quick:
            subprocess.run([*pip, "torch"], check=True)
        torch_seconds, torch_bytes = time.perf_counter() - started, tree_bytes(site) - empty_bytes
        started = time.perf_counter()
        # --quick measures the package alone: its wheel, built and unpacked.
        subprocess.run([*pip, *(["--no-deps"] if bench.quick else []), str(ROOT)], check=True)
        rest_seconds, rest_bytes = time.perf_counter() - started, tree_bytes(site) - empty_bytes - torch_bytes
        own_bytes = tree_bytes(site / "nightschool")
    bench.table(
        [
            ("torch", f"{torch_bytes / 1e6:.0f} MB, {torch_seconds:.0f} s"),
            ("everything else", f"{rest_bytes / 1e6:.0f} MB, {rest_seconds:.0f} s"),
            ("of it nightschool", f"{own_bytes / 1e6:.2f} MB"),
        ]
    )
    bench.finish(
        {
            "torch_bytes": torch_bytes,
            "rest_bytes": rest_bytes,
            "own_bytes": own_bytes,
            "install_seconds_per_python_start": round(rest_seconds / start_seconds(), 1),
        }
    )


def start_seconds() -> float:
    """Wall seconds of `python -c pass`: the unit in which install time is given, since machines differ."""
    started = time.perf_counter()
    subprocess.run([sys.executable, "-c", "pass"], check=True)
    return time.perf_counter() - started


if __name__ == "__main__":
    main()
