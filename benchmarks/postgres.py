"""An empty PostgreSQL cluster on a socket of its own, for tests and benchmarks."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def is_installed() -> bool:
    """Whether PostgreSQL and its driver are there."""
    return shutil.which("initdb") is not None and importlib.util.find_spec("psycopg") is not None


@contextmanager
def postgres_cluster() -> Iterator[str]:
    """Start one, and yield its address with `{database}` for the name; what it holds goes with the block."""
    folder = Path(tempfile.mkdtemp(prefix="pg-"))
    # PostgreSQL refuses to run as root.
    user = "postgres" if os.getuid() == 0 else None
    if user:
        shutil.chown(folder, user)
    run = {"user": user, "check": True, "cwd": folder, "stdout": subprocess.DEVNULL}
    options = f"-c listen_addresses='' -k {folder} -c fsync=off"
    try:
        subprocess.run(["initdb", "-D", folder / "data", "-U", "nightschool", "-A", "trust", "--no-sync"], **run)
        subprocess.run(["pg_ctl", "-D", folder / "data", "-o", options, "-l", folder / "log", "-w", "start"], **run)
        try:
            yield f"postgresql://nightschool@/{{database}}?host={folder}"
        finally:
            subprocess.run(["pg_ctl", "-D", folder / "data", "-m", "immediate", "-w", "stop"], **run)
    finally:
        shutil.rmtree(folder)
