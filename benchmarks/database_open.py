"""What does opening the state database of a home cost? Peer: the bare connection of Python's sqlite3, in turn.

Every command that looks at jobs, uploads or conversations opens it. Process time, without the imports.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from harness import Benchmark, interleave

OURS = """
import sys, time
from pathlib import Path
from nightschool.store.database import Database
from nightschool.store.home import Home
began = time.process_time()
Database(Home(Path(sys.argv[1])), env={}).connect()
print(time.process_time() - began)
"""
BARE = """
import sqlite3, sys, time
began = time.process_time()
sqlite3.connect(sys.argv[1] + "/state.db").execute("select count(*) from alembic_version").fetchone()
print(time.process_time() - began)
"""


def cpu_seconds(code: str, home: Path) -> float:
    """What a fresh process says that it used."""
    done = subprocess.run([sys.executable, "-c", code, str(home)], check=True, stdout=subprocess.PIPE)
    return float(done.stdout)


def main() -> None:
    bench = Benchmark(
        "database_open", "What does opening the state database of a home cost?", {"open_seconds": {"max": 0.05}}
    )
    from nightschool.store.database import Database
    from nightschool.store.home import Home

    with tempfile.TemporaryDirectory() as folder:
        home = Home(Path(folder) / ".nightschool")
        Database(home, env={}).connect().close()
        contestants = {"ours": lambda: cpu_seconds(OURS, home.path), "bare": lambda: cpu_seconds(BARE, home.path)}
        results = interleave(contestants, 5 if bench.quick else 20)
    ours, bare = statistics.median(results["ours"]), statistics.median(results["bare"])
    bench.table([("Database.connect", f"{1000 * ours:.1f} ms"), ("sqlite3.connect", f"{1000 * bare:.2f} ms")])
    bench.finish({"open_seconds": round(ours, 4), "bare_seconds": round(bare, 5)})


if __name__ == "__main__":
    main()
