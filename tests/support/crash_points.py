"""Break a piece of work at every point where it touches the disk: by SIGKILL, or with a full disk.

The work runs in a forked child, which is broken at its n-th touch, for n = 1, 2, … until it survives.
"""

import errno
import os
import signal
import sys
import traceback
from collections.abc import Callable, Iterator

from nightschool.errors import DiskFull

TOUCHES = {"open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.chmod", "fcntl.flock", "os.truncate"}
NEEDS_ROOM = {"os.mkdir", "os.rename"}
SURVIVED, WRONG_ERROR, GAVE_UP = 0, 1, 7


def kill_everywhere(work: Callable[[], object], *, most: int = 400) -> Iterator[int]:
    """Yield after each killed child, for the caller to look at what it left behind; ends when a child survives."""
    for point in range(1, most):
        status = _in_child(work, point, kill=True, stays_full=False)
        if os.WIFEXITED(status):
            assert os.WEXITSTATUS(status) == SURVIVED, "the work failed by itself"
            return
        assert os.WTERMSIG(status) == signal.SIGKILL
        yield point
    raise AssertionError(f"the work touches the disk more than {most} times")


def fill_disk_everywhere(work: Callable[[], object], *, stays_full: bool, most: int = 400) -> Iterator[int]:
    """Yield after each child whose disk was full from (or only at) the n-th write; each must have raised DiskFull."""
    for point in range(1, most):
        status = _in_child(work, point, kill=False, stays_full=stays_full)
        assert os.WIFEXITED(status)
        if os.WEXITSTATUS(status) == SURVIVED:
            return
        assert os.WEXITSTATUS(status) == GAVE_UP, "the work raised something else than DiskFull"
        yield point
    raise AssertionError(f"the work writes more than {most} times")


def _in_child(work: Callable[[], object], point: int, *, kill: bool, stays_full: bool) -> int:
    child = os.fork()
    if child:
        return os.waitpid(child, 0)[1]
    try:
        _break_at(point, kill=kill, stays_full=stays_full)
        work()
        os._exit(SURVIVED)
    except DiskFull:
        os._exit(GAVE_UP)
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
    finally:
        os._exit(WRONG_ERROR)


def _break_at(point: int, *, kill: bool, stays_full: bool) -> None:
    touched = 0

    def touch(what: str) -> None:
        nonlocal touched
        touched += 1
        if kill and touched == point:
            os.kill(os.getpid(), signal.SIGKILL)
        if not kill and (touched == point or (stays_full and touched > point)):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), what)

    def hook(event: str, arguments: tuple) -> None:
        if event == "open" and not isinstance(arguments[0], int):
            creates = bool(arguments[2] & os.O_CREAT)
            if creates or kill:
                touch(f"open {arguments[0]}")
        elif event in (TOUCHES if kill else NEEDS_ROOM) and event != "open":
            touch(event)

    sys.addaudithook(hook)
    for name in ("fsync", "write", "pwrite"):
        original = getattr(os, name)

        def broken(*arguments, original=original, name=name):
            touch(name)
            return original(*arguments)

        setattr(os, name, broken)
