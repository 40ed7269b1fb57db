"""The warm process (see warm_start.py): loads everything, then forks for whoever asks.

    warm_process.py SOCKET PYTHON

Says `ready` when it listens, and ends, killing what it forked, when its standard input does.
"""

from __future__ import annotations

import atexit
import fcntl
import gc
import importlib
import json
import os
import runpy
import selectors
import signal
import socket
import sys
from dataclasses import dataclass
from pathlib import Path

MODULES = (
    "nightschool.training.run",
    "nightschool.training.run_together",
    "nightschool.training.planning.peak_bytes",
    "nightschool.engine.compare",
    "nightschool.engine.compare_in_turn",
    "nightschool.engine.evaluate",
    "nightschool.jobs.worker",
    "nightschool.server.run",
    "transformers.models.qwen3.modeling_qwen3",
)


@dataclass
class Request:
    what: str
    folder: str
    files: list[int]
    ignored: list[int]
    words: list[str]
    variables: dict[str, str]
    received: list[int]


def main() -> Request:
    """Serve; returns only in a fork, with what it shall be."""
    gc.disable()
    from nightschool.cli.main import NOUNS, VERBS

    paths = [*VERBS.values(), *(one for _, verbs in NOUNS.values() for one in verbs.values())]
    for name in {*MODULES, *(path.partition(":")[0] for path, _ in paths)}:
        importlib.import_module(name)
    gc.freeze()
    gc.enable()
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    listener.bind(sys.argv[1])
    listener.listen(64)
    print("ready", flush=True)
    selector = selectors.DefaultSelector()
    selector.register(0, selectors.EVENT_READ)
    selector.register(listener, selectors.EVENT_READ)
    forks: dict[int, tuple[int, socket.socket]] = {}  # by number: what tells of its end, and who waits for it
    while True:
        for key, _ in selector.select():
            if key.fd == 0:
                for pid in forks:
                    os.kill(pid, signal.SIGKILL)
                os._exit(0)
            elif key.fileobj is listener:
                channel, _ = listener.accept()
                request = received(channel)
                if request is None:
                    channel.close()
                    continue
                pid = os.fork()
                if pid == 0:
                    return request
                for number in request.received:
                    os.close(number)
                forks[pid] = (os.pidfd_open(pid), channel)
                selector.register(forks[pid][0], selectors.EVENT_READ, pid)
                selector.register(channel, selectors.EVENT_READ, -pid)
                tell(channel, pid)
            elif key.data > 0:
                end, channel = forks.pop(key.data)
                for one in (end, channel):
                    try:
                        selector.unregister(one)
                    except KeyError:
                        continue
                code = os.waitstatus_to_exitcode(os.waitpid(key.data, 0)[1])
                tell(channel, code)
                channel.close()
                os.close(end)
            elif -key.data in forks:
                # Whoever asked was killed.
                selector.unregister(key.fileobj)
                os.kill(-key.data, signal.SIGKILL)


def received(channel: socket.socket) -> Request | None:
    message, files, _, _ = socket.recv_fds(channel, 1 << 20, 253)
    if not message:
        return None
    return Request(received=files, **json.loads(message))


def tell(channel: socket.socket, number: int) -> None:
    try:
        channel.send(str(number).encode())
    except OSError:
        return  # it is gone


def become(request: Request, python: str) -> None:
    """Take over what a process has from the one that starts it."""
    os.setsid()
    mine = [int(one.name) for one in Path("/proc/self/fd").iterdir()]
    base = max(*mine, *request.files) + 1  # out of the way of both
    kept = [fcntl.fcntl(file, fcntl.F_DUPFD, base) for file in request.received]
    os.closerange(0, base)
    for file, number in zip(kept, request.files, strict=True):
        os.dup2(file, number, inheritable=True)
    os.closerange(base, base + len(kept) + 1)
    for number in request.ignored:
        signal.signal(number, signal.SIG_IGN)
    os.chdir(request.folder)
    os.environ.clear()
    os.environ.update(request.variables)
    sys.executable = python
    for number, name in ((1, "stdout"), (2, "stderr")):
        if number in request.files:
            stream = open(number, "w", buffering=1, errors="backslashreplace" if number == 2 else None)  # noqa: PTH123, SIM115
            setattr(sys, name, stream)
            setattr(sys, f"__{name}__", stream)
    sys.stdin = sys.__stdin__ = open(0) if 0 in request.files else None  # noqa: SIM115


def run(request: Request) -> int:
    """Be what was asked for; returns its exit code."""
    how, _, what = request.what.partition(" ")
    try:
        if how == "-m":
            sys.path[0] = request.folder
            sys.modules.pop(what, None)
            sys.argv = [what, *request.words]
            runpy.run_module(what, run_name="__main__", alter_sys=True)
        else:
            sys.path[0] = str(Path(what).absolute().parent)
            sys.argv = [what, *request.words]
            runpy.run_path(what, run_name="__main__")
    except SystemExit as end:
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        sys.excepthook(*sys.exc_info())
        return 1
    return 0


if __name__ == "__main__":
    request = main()
    become(request, sys.argv[2])
    code = run(request)
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os._exit(code)
