"""The processes that nightschool starts, by name: the one table of their modules.

Whoever starts one knows its name and not its module, so that a room may start the process of a room above it.
A test looks whether every module is there and can be run, and that nobody starts another one.
"""

from __future__ import annotations

import gc
import logging
import os
import sys
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Literal, NoReturn

ProcessName = Literal[
    "cli",
    "probe",
    "plan",
    "train",
    "train-together",
    "compare",
    "compare-in-turn",
    "evaluate",
    "cycle",
    "job",
    "job-on-node",
    "worker",
    "upload",
    "write-checkpoints",
]

PROCESSES: Mapping[ProcessName, str] = {
    "cli": "nightschool.cli",
    "probe": "nightschool.cli.doctor.probe",
    "plan": "nightschool.training.planning.peak_bytes",
    "train": "nightschool.training.run",
    "train-together": "nightschool.training.run_together",
    "compare": "nightschool.engine.compare",
    "compare-in-turn": "nightschool.engine.compare_in_turn",
    "evaluate": "nightschool.engine.evaluate",
    "cycle": "nightschool.jobs.detached",
    "job": "nightschool.jobs.job_process",
    "job-on-node": "nightschool.jobs.on_node",
    "worker": "nightschool.jobs.worker",
    "upload": "nightschool.jobs.uploader",
    "write-checkpoints": "nightschool.checkpoint_writer",
}


def command(process: ProcessName, *arguments: str) -> list[str]:
    """The command line that starts a process with the interpreter of this one."""
    return [sys.executable, "-m", PROCESSES[process], *arguments]


def live(main: Callable[[], int]) -> NoReturn:
    """Be a process: do `main`, and end with its exit code as soon as it returns.

    What the imports have made, half a million objects under torch, is never garbage; each full search for garbage would
    go through all of it (measured: 0.35 s in the middle of the work). And the interpreter would take it apart at the end
    (0.2 s), while somebody waits for this process. So nothing registered with `atexit` runs: `main` closes what it opened.
    """
    gc.freeze()
    exit_code = main()
    logging.shutdown()
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):  # whoever read it is gone
            stream.flush()
    os._exit(exit_code)
