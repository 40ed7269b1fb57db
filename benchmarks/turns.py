"""Programs that are compared take turns: each runs for some seconds while the others stand still.

A shared machine changes its speed within minutes, often by more than the difference that is asked for. In turns, what it
does hits all alike, and the time that a program stood still is taken out of its measurements.
"""

from __future__ import annotations

import signal
import subprocess
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import psutil


@dataclass
class Outcome:
    """What a program printed, and when it stood still (seconds of the wall clock)."""

    returncode: int = 0
    stdout: str = ""
    stderr: str = ""
    pauses: list[tuple[float, float]] = field(default_factory=list)

    def active_seconds(self, start: float, end: float) -> float:
        """How long it ran between two moments of the wall clock."""
        still = sum(max(0.0, min(end, until) - max(start, since)) for since, until in self.pauses)
        return end - start - still


def take_turns(
    commands: Mapping[str, list[str]], *, env: Mapping[str, str], turn_seconds: float = 3.0
) -> dict[str, Outcome]:
    """Run each command to its end, one at a time, `turn_seconds` each; what it starts stands still with it."""
    outcomes = {name: Outcome() for name in commands}
    with tempfile.TemporaryDirectory() as scratch:
        running = {}
        since = {}
        try:
            for name, command in commands.items():
                with (
                    (Path(scratch) / f"{name}.out").open("wb") as out,
                    (Path(scratch) / f"{name}.err").open("wb") as err,
                ):
                    running[name] = subprocess.Popen(command, stdout=out, stderr=err, env=dict(env))
                _signal(running[name], signal.SIGSTOP)
                since[name] = time.time()
            while running:
                for name, process in list(running.items()):
                    outcomes[name].pauses.append((since[name], time.time()))
                    _signal(process, signal.SIGCONT)
                    try:
                        outcomes[name].returncode = process.wait(turn_seconds)
                        del running[name]
                    except subprocess.TimeoutExpired:
                        since[name] = time.time()
                        _signal(process, signal.SIGSTOP)
        finally:
            for process in running.values():
                _signal(process, signal.SIGKILL)
                process.wait()
        for name, outcome in outcomes.items():
            outcome.stdout = (Path(scratch) / f"{name}.out").read_text()
            outcome.stderr = (Path(scratch) / f"{name}.err").read_text()
    return outcomes


def _signal(process: subprocess.Popen[bytes], number: signal.Signals) -> None:
    """To the program and to all that it started: a process that writes for it would take the others' time."""
    try:
        family = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
    except psutil.NoSuchProcess:
        return
    for one in family:
        try:
            one.send_signal(number)
        except psutil.NoSuchProcess:
            continue
