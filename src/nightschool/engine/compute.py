"""All engines of a process compute on one thread, step by step in turn.

Every thread that runs tensor work on several cores has a team of workers of its own (libgomp), which spin while they wait
for the next piece. As soon as there are more workers than cores, all of them sleep instead and are woken for every
operation: the small operations of a decoding step took 2.6 times as long (measured, two cores, two teams of two of which
one was idle). So while a version is swapped, or is kept warm beside the one that serves, both engines use the same thread,
and what prepares an engine is done there, too, in pieces between the steps of the others.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Protocol, TypeVar

import torch

Result = TypeVar("Result")


class Member(Protocol):
    """What takes turns on the thread. This is all of it."""

    def has_work(self) -> bool:
        """Whether a turn would do something. Called often, holding a lock: must not block for long."""
        ...

    def turn(self) -> bool:
        """Do one step; return False to take part no more. Must not raise."""
        ...

    def leave(self) -> None:
        """Called once, when it takes part no more."""
        ...


class ComputeThread:
    """Runs when there is a member or a call, and ends with the last of them."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._members: list[Member] = []
        self._calls: deque[tuple[Callable[[], Any], Future[Any]]] = deque()
        self._thread: threading.Thread | None = None

    @property
    def members(self) -> list[Member]:
        """Who takes part at present."""
        with self._changed:
            return list(self._members)

    def add(self, member: Member) -> None:
        """Let a member take part until its turn says that it is over."""
        with self._changed:
            self._members.append(member)
            self._begin()

    def wake(self) -> None:
        """Say that a member may have work now."""
        with self._changed:
            self._changed.notify_all()

    def call(self, work: Callable[[], Result]) -> Result:
        """Run `work` between two turns and return what it returns, or raise what it raises. Not from the thread itself."""
        assert threading.current_thread() is not self._thread, "the thread would wait for itself"
        future: Future[Result] = Future()
        with self._changed:
            self._calls.append((work, future))
            self._begin()
        return future.result()

    def _begin(self) -> None:
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="engines", daemon=True)
            self._thread.start()
        self._changed.notify_all()

    def _run(self) -> None:
        with torch.inference_mode():
            while self._round():
                pass

    def _round(self) -> bool:
        """Do one call and a turn of each member; False once there is nobody left.

        A function of its own, so that a thread that waits holds on to nobody who left: an engine is as large as its model.
        """
        with self._changed:
            while self._members and not self._calls and not any(member.has_work() for member in self._members):
                self._changed.wait()
            if not self._members and not self._calls:
                self._thread = None
                return False
            call = self._calls.popleft() if self._calls else None
            members = [member for member in self._members if member.has_work()]
        if call is not None:
            _answer(*call)
        for member in members:
            if not member.turn():
                with self._changed:
                    self._members.remove(member)
                member.leave()
        return True


COMPUTE = ComputeThread()


def apart(work: Callable[[], Result]) -> Result:
    """Run `work` on a thread that ends with it, so that no team of workers is left behind, and return what it returns."""
    with ThreadPoolExecutor(1, thread_name_prefix="apart") as pool:
        return pool.submit(work).result()


def _answer(work: Callable[[], Any], future: Future[Any]) -> None:
    try:
        future.set_result(work())
    except BaseException as error:
        future.set_exception(error)
