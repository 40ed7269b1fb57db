"""A run among others of its process: it works like a coroutine, and believes that it is alone.

Each run executes what a run with a process of its own executes, in a greenlet: `go_on` lets a member work until it asks for the
gradients of a window, or ends. While it works, the random state of the process, its output and its errors are the member's own.

All of them are one thread to the libraries beneath, which keep buffers and workers for each thread that ever computed: 34 MB a member.
"""

from __future__ import annotations

import gc
import random
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from greenlet import GreenletExit, getcurrent, greenlet
from torch import Tensor

from nightschool.data.batches import Batch
from nightschool.models.load import LoadedModel
from nightschool.models.resident import ResidentBases
from nightschool.store.home import Home
from nightschool.store.runs import Run
from nightschool.training.run import guarded
from nightschool.training.task import Task
from nightschool.work.heap import return_free_memory
from nightschool.work.stop import Stop


class MemberStop(Stop):
    """Requested for one run by a file in its folder, or for all by a signal to the process."""

    def __init__(self, run: Run, everybody: Stop) -> None:
        super().__init__()
        self._run, self._everybody = run, everybody

    @property
    def requested(self) -> bool:
        if self.reason is None:
            self.reason = self._everybody.reason or self._run.stop_request
        return self.reason is not None


@dataclass
class Randomness:
    """The random state of a process, outside of it."""

    python: Any
    numpy: Any
    torch: Tensor
    cuda: list[Tensor]

    @classmethod
    def taken(cls) -> Randomness:
        """That of this process now."""
        cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
        return cls(random.getstate(), np.random.get_state(), torch.get_rng_state(), cuda)

    def put(self) -> None:
        """Make it that of this process."""
        random.setstate(self.python)
        np.random.set_state(self.numpy)
        torch.set_rng_state(self.torch)
        if self.cuda:
            torch.cuda.set_rng_state_all(self.cuda)


@dataclass(frozen=True)
class Window:
    """What a member waits for: the gradients of a window. The arguments are those of `Task.accumulate`."""

    task: Task
    batches: Sequence[Batch]
    units: int
    scaler: torch.amp.GradScaler | None


class Member:
    """One run, and what is swapped when it works.

    `asked` is the window that it waits for; `code` its exit code, once it has ended.
    """

    def __init__(self, run: Run, resume: str | None, root: Path, *, stop: Stop, bases: ResidentBases) -> None:
        self.run, self.stop, self.bases = run, MemberStop(run, stop), bases
        self.randomness = Randomness.taken()
        self.asked: Window | None = None
        self.code: int | None = None
        self._answer: Tensor | Exception | None = None
        self._work = greenlet(lambda: self._execute(resume, root))

    # --- from outside -------------------------------------------------------------------------------------------------

    def go_on(self) -> None:
        """Let it work until it asks for a window (again), or has ended."""
        with self.at_work(), self.writing():
            self._work.parent = getcurrent()
            self._work.switch()

    @contextmanager
    def at_work(self) -> Iterator[None]:
        """A block in which the random state of this process is the member's."""
        before = Randomness.taken()
        self.randomness.put()
        try:
            yield
        finally:
            self.randomness = Randomness.taken()
            before.put()

    def answer(self, found: Tensor | Exception) -> None:
        """Give it what it asked for: the loss of its window, whose gradients are there, or why there are none."""
        self._answer, self.asked = found, None

    @contextmanager
    def writing(self) -> Iterator[None]:
        """A block in which whatever this process prints is a line of the member's log."""
        before = sys.stdout, sys.stderr
        with self.run.log_path.open("a", buffering=1, encoding="utf-8") as log:
            sys.stdout = sys.stderr = log
            try:
                yield
            finally:
                sys.stdout, sys.stderr = before

    # --- in its greenlet ----------------------------------------------------------------------------------------------

    def load_base(self, ref: str, home: Home, **settings: Any) -> LoadedModel:
        """As `models.load.load_base`, of weights that are in memory once."""
        return self.bases.load_base(ref, home, **settings)

    def accumulate(
        self, task: Task, window: Sequence[Batch], units: int, scaler: torch.amp.GradScaler | None
    ) -> Tensor:
        """As `task.accumulate`: wait until whoever serves the windows of all has found the gradients of this one."""
        self.asked = Window(task, window, units, scaler)
        assert self._work.parent is not None
        self._work.parent.switch()
        found, self._answer = self._answer, None
        if isinstance(found, Exception):
            raise found
        assert found is not None
        return found

    def _execute(self, resume: str | None, root: Path) -> None:
        code = 1
        try:
            code = guarded(self.run.home, self.run, resume, root, self.stop, company=self)
            self.run.clear_stop()  # it obeyed, or was asked too late
        except GreenletExit:
            raise  # nobody lets it go on, as when a process ends at once: to whoever looks it was killed
        except BaseException as error:
            traceback.print_exc()
            self.run.update_status(state="failed", error=repr(error), exit_code=code)
        finally:
            self.code = code


def work_together(members: Sequence[Member], serve: Callable[[Sequence[Member]], Iterable[Sequence[Member]]]) -> None:
    """Let all members work until they have ended; `serve` answers those that ask, some at a time, and these go on at once."""
    for member in members:
        member.go_on()
        return_free_memory()  # of what it planned and evaluated with, or each would add to the holes of those before it
    working = list(members)
    while working:
        if any(member.code is not None for member in working):
            gc.collect()  # models are full of cycles
            return_free_memory()
        working = [member for member in working if member.code is None]
        for answered in serve(working):
            for member in answered:
                member.go_on()


def serve(members: Sequence[Member]) -> Iterator[Sequence[Member]]:
    """Answer each member by itself."""
    for member in members:
        serve_one(member)
        yield [member]


def serve_one(member: Member) -> bool:
    """Answer a member as its task alone would; returns whether there was no error, which it would hear of."""
    window = member.asked
    assert window is not None, "who has not ended asks"
    with member.at_work():
        try:
            loss = window.task.accumulate(window.batches, window.units, window.scaler)
        except Exception as error:
            member.answer(error)
            return False
    member.answer(loss)
    return True
