"""Start the processes that do the work: a training run, the gate.

A child writes its own log file, so that it lives on, and its log goes on, when whoever started it is closed. Who
waits for it follows that file.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, Protocol

from nightschool.errors import Interrupted
from nightschool.jobs.outcome import root_of
from nightschool.jobs.processes import how_it_ended, is_trained
from nightschool.store.runs import Run
from nightschool.work.processes import ProcessName, command
from nightschool.work.stop import Stop

OnLine = Callable[[str], None]

INTERRUPTED_EXIT_CODE = Interrupted.exit_code
POLL_SECONDS = 0.1

# Tensors that come and go would be mapped and unmapped by glibc each time; keeping them in the heap saves the page
# faults (measured: 10-24 % of a training step on a CPU).
ALLOCATOR = {"MALLOC_MMAP_THRESHOLD_": str(1 << 30), "MALLOC_TRIM_THRESHOLD_": str(2 << 30)}

# Threads that wait by spinning take the cores from whoever shares the machine (measured: 8-10 times slower).
POLITE = {"OMP_WAIT_POLICY": "PASSIVE"}

Machine = Literal["alone", "shared"]


class Trainer(Protocol):
    """Trains a run and waits for it, as `run_training` does."""

    def __call__(self, run: Run, around: CycleContext, *, resume: str | None) -> int: ...


class Ahead(Protocol):
    """A gate that may begin before there is a candidate."""

    def look(self) -> None:
        """Begin, or end, as far off as the end of the training is. Called again and again while it goes on."""
        ...

    def examine(self, candidate: str, champion: str | None, around: CycleContext) -> int | None:
        """Compare the two, as `run_gate` does; None where nothing has begun, so that it begins now."""
        ...


@dataclass(frozen=True)
class CycleContext:
    """Where the processes of a cycle run, and who watches them.

    `on_line` gets the lines that the processes print, `on_news` what the cycle itself has to say. `machine` is
    `shared` where a server may run beside it. `stop` notes signals and hands them to the processes. `gate_of` makes what
    begins the gate of a run while it still trains, in place of `GateAhead`; it becomes `ahead`. `trainer` trains in place of
    `run_training`, and `examining` is entered while the gate works.
    """

    on_line: OnLine | None = None
    on_news: OnLine | None = None
    stop: Stop = field(default_factory=Stop)
    machine: Machine = "alone"
    gate_of: Callable[[Run, CycleContext], AbstractContextManager[Ahead]] | None = None
    ahead: Ahead | None = None
    trainer: Trainer | None = None
    examining: Callable[[], AbstractContextManager[None]] = nullcontext

    def say(self, text: str) -> None:
        if self.on_news is not None:
            self.on_news(f"[Cycle] {text}")


def child_environment(machine: Machine) -> dict[str, str]:
    """The environment of this process with the allocator's settings; what the user has set stays as it is.

    `machine` is `shared` where a server may run beside the child: its threads then wait without spinning.
    """
    defaults = {"PYTHONUNBUFFERED": "1", **ALLOCATOR, **(POLITE if machine == "shared" else {})}
    return defaults | dict(os.environ)


def start_process(
    command_line: Sequence[str],
    *,
    log: Path,
    machine: Machine = "alone",
    directory: Path | None = None,
    keep_open: Sequence[int] = (),
    is_told: bool = False,
) -> subprocess.Popen[bytes]:
    """Start a command (see work/processes) in a process group of its own, its output appended to `log`.

    It inherits the descriptors `keep_open`. With `is_told` its standard input is a pipe from this process.

    In its own group it gets no Ctrl-C from the terminal by itself: who waits for it forwards the signal, once.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("ab") as output:
        return subprocess.Popen(
            command_line,
            stdin=subprocess.PIPE if is_told else subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            cwd=directory,
            env=child_environment(machine),
            start_new_session=True,
            pass_fds=tuple(keep_open),
        )


def wait_for(
    process: subprocess.Popen[bytes],
    *,
    log: Path,
    from_byte: int,
    stop: Stop,
    on_line: OnLine | None = None,
    meanwhile: Callable[[], None] | None = None,
) -> int:
    """Wait for the child, hand it the signals that `stop` notes, pass on each line of its log, and do `meanwhile`.

    Returns:
        The exit code; minus the number of the signal that killed it.
    """
    follower = _Follower(log, from_byte, on_line)
    with stop:
        stop.child = process
        try:
            if stop.requested:
                process.terminate()
            while process.poll() is None:
                follower.pass_on()
                if meanwhile is not None:
                    meanwhile()
                _nap(process)
        finally:
            stop.child = None
        follower.pass_on(to_end=True)
    return process.returncode


def _nap(process: subprocess.Popen[bytes]) -> None:
    try:
        process.wait(POLL_SECONDS)
    except subprocess.TimeoutExpired:
        return


class _Follower:
    """Passes on the whole lines that were appended to a file since it looked last."""

    def __init__(self, path: Path, from_byte: int, on_line: OnLine | None) -> None:
        self._path = path
        self._offset_bytes = from_byte
        self._on_line = on_line

    def pass_on(self, *, to_end: bool = False) -> None:
        if self._on_line is None:
            return
        with self._path.open("rb") as file:
            file.seek(self._offset_bytes)
            new = file.read()
        whole = new if to_end else new[: new.rfind(b"\n") + 1]
        self._offset_bytes += len(whole)
        for line in whole.decode(errors="replace").splitlines():
            self._on_line(line)


def run_child(
    run: Run,
    process: ProcessName,
    *arguments: str,
    around: CycleContext,
    meanwhile: Callable[[], None] | None = None,
) -> int:
    """Do a part of the work of `run` in a process of its own, and wait for it; its log is the run's.

    Returns:
        The exit code; minus the number of the signal that killed it.
    """
    command_line = command(process, "--home", str(run.home.path), "--run", run.id, *arguments)
    log, from_byte = run.log_path, size_of(run.log_path)
    child = start_process(command_line, log=log, machine=around.machine, directory=root_of(run))
    return wait_for(child, log=log, from_byte=from_byte, stop=around.stop, on_line=around.on_line, meanwhile=meanwhile)


def size_of(log: Path) -> int:
    """Bytes of a log so far; none where there is no log."""
    return log.stat().st_size if log.exists() else 0


def run_training(run: Run, around: CycleContext, *, resume: str | None = None) -> int:
    """Train one run in a process of its own and wait for it; `resume` is a checkpoint's name or `latest`.

    Returns:
        The exit code: 0 done, 75 interrupted and resumable, other: failed. A signal is minus its number.
    """
    resuming = () if resume is None else ("--resume", resume)
    meanwhile = None if around.ahead is None else around.ahead.look
    exit_code = run_child(run, "train", *resuming, around=around, meanwhile=meanwhile)
    settle_status(run, exit_code, stopped=around.stop.requested)
    return exit_code


def settle_status(run: Run, exit_code: int, *, stopped: bool) -> None:
    """Say in status.json how a process ended that could not say it itself, because it was killed."""
    if run.status.is_final or is_trained(run):  # by another process, which was there first
        return
    if stopped or exit_code == INTERRUPTED_EXIT_CODE:
        run.update_status(state="interrupted", exit_code=INTERRUPTED_EXIT_CODE)
    else:
        run.update_status(state="failed", exit_code=exit_code, error=how_it_ended(exit_code))


def run_gate(run: Run, around: CycleContext, *, candidate: str, champion: str | None) -> int:
    """Compare a candidate with the champion in a process of its own; the report lands in the registry.

    `candidate` and `champion` are `name@version`. Returns the exit code, 0 when the gate could decide.
    """
    begun = None if around.ahead is None else around.ahead.examine(candidate, champion, around)
    if begun is not None:
        return begun
    compared = () if champion is None else ("--champion", champion)
    return run_child(run, "compare", "--candidate", candidate, *compared, around=around)
