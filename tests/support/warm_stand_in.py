"""The stand-in of a program (see warm_start.py): asks the warm process for a fork, and lasts as long as that.

It is copied, and finds beside itself, in settings.json, the real Python, the socket, and the modules that begin warm. It
imports little, because it is started often.
"""
# ruff: noqa: PTH109, PTH119, PTH120, PTH123, PTH208

import json
import os
import signal
import socket
import sys


def main() -> None:
    folder, words = os.path.dirname(sys.argv[0]), sys.argv[1:]
    with open(f"{folder}/settings.json") as file:
        settings = json.load(file)
    if os.path.basename(sys.argv[0]) == "nightschool":
        what = "-m nightschool.cli"
    elif words[:1] == ["-m"] and words[1:2] and words[1] in settings["warm"]:
        what, words = f"-m {words[1]}", words[2:]
    elif words and words[0].endswith(".py"):
        what, words = f"-f {words[0]}", words[1:]
    else:
        os.execv(settings["python"], [settings["python"], *words])
    ignored = [number for number in (1, 2, 3, 15) if signal.getsignal(number) == signal.SIG_IGN]
    files = [int(name) for name in os.listdir("/proc/self/fd")]
    files = [number for number in files if is_open(number)]
    channel = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    channel.connect(f"{folder}/socket")
    fields = {"what": what, "words": words, "folder": os.getcwd(), "variables": dict(os.environ)}
    message = json.dumps(fields | {"files": files, "ignored": ignored})
    socket.send_fds(channel, [message.encode()], files)
    pid = int(channel.recv(32))
    for number in {signal.SIGHUP, signal.SIGINT, signal.SIGQUIT, signal.SIGTERM} - {*map(signal.Signals, ignored)}:
        signal.signal(number, lambda number, _: pass_on(pid, number))
    for number in files:
        os.close(number)  # whoever reads a pipe of ours waits for the fork alone
    code = int(channel.recv(32))
    if code < 0:
        if -code != signal.SIGKILL:
            signal.signal(-code, signal.SIG_DFL)
        os.kill(os.getpid(), -code)
    os._exit(code)


def is_open(number: int) -> bool:
    try:
        os.fstat(number)
    except OSError:  # the one through which the folder was listed
        return False
    return True


def pass_on(pid: int, number: int) -> None:
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        return


main()
