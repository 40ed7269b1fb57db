"""A process of several runs has one heap, whichever libraries start threads."""

import subprocess
import sys

import pytest

# What the process says at its end of the heaps of glibc, after four threads have asked for memory.
_PROGRAM = """
import atexit, ctypes, runpy, sys, threading

def report():
    together = threading.Barrier(4)
    def work():
        kept = [bytes(300) for _ in range(1000)]
        together.wait()
    threads = [threading.Thread(target=work) for _ in range(4)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    ctypes.CDLL(None).malloc_stats()

atexit.register(report)
sys.argv[1:] = ["--help"]
runpy.run_module({module!r}, run_name="__main__", alter_sys=True)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's heaps")
@pytest.mark.parametrize(("module", "is_one"), [("nightschool.training.run_together", True), ("json.tool", False)])
def test_threads_of_several_runs_share_one_heap(module, is_one):
    done = subprocess.run(
        [sys.executable, "-c", _PROGRAM.format(module=module)], capture_output=True, text=True, timeout=120, check=True
    )
    assert "usage" in done.stdout
    heaps = done.stderr.count("Arena ")
    if not heaps:
        pytest.skip("another C library")
    assert (heaps == 1) is is_one


_HOLES = """
import numpy, psutil, sys
from nightschool.work.heap import return_free_memory

pieces = [numpy.ones(100_000, dtype=numpy.uint8) for _ in range(1000)]
kept, pieces = pieces[::10], None
rss = lambda: psutil.Process().memory_info().rss
before = rss()
return_free_memory()
print(before - rss(), sum(int(piece.sum()) for piece in kept))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's heaps")
def test_holes_between_what_is_used_are_returned_and_what_is_used_stays():
    done = subprocess.run([sys.executable, "-c", _HOLES], capture_output=True, text=True, timeout=120, check=True)
    returned, kept = map(int, done.stdout.split())
    assert returned > 50_000_000
    assert kept == 100 * 100_000
