"""Commands that begin with everything imported: forks of one process that has loaded torch once.

A command of nightschool that uses torch imports for four seconds before it does anything, and a suite starts a hundred of
them. `WarmStart` offers stand-ins for the programs `nightschool` and `python`; each has its arguments, folder,
variables, and open files handed to the warm process, which forks, and lasts as long as the fork: signals are passed on, the exit
code comes back, and a stand-in that is killed takes the fork with it. What is run is what the command names, as `__main__`.

A fork differs from a process of its own in this: modules are there already, what libraries read from the environment when
they were loaded (OMP_WAIT_POLICY, MALLOC_…, HF_HUB_OFFLINE) is that of the warm process, and the stand-in has another
number than the process that works.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from nightschool.work.processes import PROCESSES, ProcessName

HERE = Path(__file__).parent
# Those that load torch, and those that start one of them. The others look at the number of their parent, or begin quickly.
WARM: tuple[ProcessName, ...] = (
    "cli", "plan", "train", "train-together", "compare", "compare-in-turn", "evaluate", "cycle", "job", "worker",
)  # fmt: skip


class WarmStart:
    """The folder `bin` with the two stand-ins."""

    def __init__(self, folder: Path) -> None:
        self.bin = folder
        self.python = str(folder / "python")
        self.nightschool = str(folder / "nightschool")


@contextmanager
def warm_process_running() -> Iterator[WarmStart]:
    """Have the warm process for as long as the block; what still runs at its end is killed."""
    folder = Path(tempfile.mkdtemp(prefix="warm-"))  # short: the address of a socket has at most 107 bytes
    start = WarmStart(folder)
    settings = {"python": sys.executable, "warm": [PROCESSES[name] for name in WARM]}
    (folder / "settings.json").write_text(json.dumps(settings))
    for name in ("python", "nightschool"):
        program = (HERE / "warm_stand_in.py").read_text("utf-8")
        (folder / name).write_text(f"#!{sys.executable} -IS\n{program}")
        (folder / name).chmod(0o755)
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(
            [sys.executable, str(HERE / "warm_process.py"), str(folder / "socket"), start.python],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            start_new_session=True,
        )
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        assert process.stdout.readline() == b"ready\n", (folder / "log").read_text()
        yield start
    finally:
        process.stdin.close()
        process.wait(60)
        process.stdout.close()
        shutil.rmtree(folder)


@pytest.fixture(scope="session")
def warm_start() -> Iterator[WarmStart]:
    with warm_process_running() as start:
        yield start


@pytest.fixture(scope="module")
def warm_children(warm_start: WarmStart) -> Iterator[None]:
    """Have the processes that the module starts with `sys.executable` begin warm."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "executable", warm_start.python)
        yield
