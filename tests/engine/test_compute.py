"""One thread for all engines: in turn, calls in between, gone with the last of them."""

import threading

import pytest
import torch

from nightschool.engine.compute import ComputeThread, apart
from tests.support.live_server import eventually


class Worker:
    """Has so many steps to do, notes each, and leaves after the last."""

    def __init__(self, name, steps, log):
        self.name, self.steps, self.log, self.left = name, steps, log, threading.Event()

    def has_work(self):
        return self.steps > 0

    def turn(self):
        self.log.append((self.name, threading.current_thread(), torch.is_inference_mode_enabled()))
        self.steps -= 1
        return self.steps > 0

    def leave(self):
        self.left.set()


def test_members_alternate_on_one_thread_that_ends_with_them():
    compute, log, go = ComputeThread(), [], threading.Event()
    blocker = threading.Thread(target=compute.call, args=(lambda: go.wait(30),))
    blocker.start()
    eventually(lambda: compute._thread is not None)
    workers = [Worker("a", 3, log), Worker("b", 5, log)]
    for worker in workers:
        compute.add(worker)
    assert compute.members == workers
    go.set()
    assert all(worker.left.wait(30) for worker in workers)
    assert "".join(name for name, *_ in log) == "abababbb"
    assert len({thread for _, thread, _ in log}) == 1
    assert all(is_inference for *_, is_inference in log)
    assert compute.members == []
    eventually(lambda: compute._thread is None)
    eventually(lambda: not log[0][1].is_alive())
    blocker.join()


def test_a_call_is_answered_between_turns_and_without_members():
    compute, log = ComputeThread(), []
    assert compute.call(lambda: 7) == 7
    with pytest.raises(KeyError, match="x"):
        compute.call(lambda: {}["x"])
    worker = Worker("a", 1, log)
    worker.has_work = lambda: False
    compute.add(worker)
    assert compute.call(lambda: threading.current_thread()) is compute._thread
    del worker.has_work
    compute.wake()
    assert worker.left.wait(30)


def test_who_waits_is_woken_when_there_is_work():
    compute, log = ComputeThread(), []
    worker = Worker("a", 0, log)
    compute.add(worker)
    worker.steps = 1
    compute.wake()
    assert worker.left.wait(30)


def test_work_apart_leaves_no_thread_behind():
    assert apart(lambda: threading.current_thread()) is not threading.current_thread()
    with pytest.raises(ValueError, match="no"):
        apart(lambda: int("no"))
    eventually(lambda: not any(thread.name.startswith("apart") for thread in threading.enumerate()))
