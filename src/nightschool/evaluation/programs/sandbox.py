"""Run a program that nobody has read, and say whether it came to its end.

It is a process of its own, in a session of its own: Python with its standard library, without the environment, with an empty folder to
write in. The kernel holds it: Landlock in what it opens (nothing is read but the libraries, nothing written but its folder), a seccomp
filter in what it asks for (no process, no socket, no signal), limits in what it takes, no capabilities even if we are root. Whoever
waits here kills it at the end of its time. Nothing of this needs a privilege or a program beside Python.

A program that means to deceive can: it runs in the process that says that it has passed. What a model writes by mistake, such as an
early `exit()`, is told from a pass by a word that is said only at the end.
"""

from __future__ import annotations

import ctypes
import json
import os
import platform
import secrets
import select
import signal
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

from nightschool.errors import NightschoolError, NotInstalled
from nightschool.evaluation.programs import confined
from nightschool.evaluation.programs.syscalls import MACHINES, seccomp_filter

Outcome = Literal["passed", "failed", "time", "room", "ended"]
Confinement = Literal["confined", "unconfined"]

_LANDLOCK_CREATE_RULESET, _ASK_VERSION = 444, 1
_GET_SECCOMP = 21
_LOOK_SECONDS = 0.05
_VERDICT_BYTES = 1 << 16
_SHARED_LIBRARIES = ("/lib", "/lib64", "/usr/lib", "/usr/lib64", "/usr/local/lib", "/etc/ld.so.cache")
_DEVICES = ("/dev/urandom", "/dev/zero")


@dataclass(frozen=True)
class Limits:
    """What a program may take: seconds of a core, seconds by the clock, bytes of memory, bytes and files in its folder."""

    cpu_seconds: int = 10
    seconds: float = 20.0
    memory_bytes: int = 1 << 30
    folder_bytes: int = 64 << 20
    folder_files: int = 256

    def of_process(self) -> dict[str, int]:
        """Those that the kernel holds it to."""
        return {
            "cpu_seconds": self.cpu_seconds,
            "memory_bytes": self.memory_bytes,
            "file_bytes": self.folder_bytes,
            "files": 64,
            "core_bytes": 0,
        }


@dataclass(frozen=True)
class Ended:
    """How a program ended: `time` and `room` are limits, `ended` is an end before its last line. `why` says more."""

    outcome: Outcome
    why: str = ""

    @property
    def passed(self) -> bool:
        return self.outcome == "passed"


@cache
def why_not_confined() -> str | None:
    """What this machine lacks to hold a program; None if nothing."""
    if sys.platform != "linux":
        return f"the system is {sys.platform}, and Landlock and seccomp are Linux's"
    if platform.machine() not in MACHINES:
        return f"the processor is {platform.machine()}, and the filter is known for {' and '.join(MACHINES)}"
    if landlock_version() < 1:
        return (
            "the kernel has no Landlock (Linux 5.13 or newer, with landlock among its security modules: lsm=landlock,…)"
        )
    if ctypes.CDLL(None).prctl(_GET_SECCOMP, 0, 0, 0, 0) < 0:
        return "the kernel has no seccomp"
    return None


@cache
def landlock_version() -> int:
    """The version of Landlock that the kernel has; below 1 if none."""
    version: int = ctypes.CDLL(None).syscall(_LANDLOCK_CREATE_RULESET, None, ctypes.c_size_t(0), _ASK_VERSION)
    return version


def check_confinement() -> None:
    """Make sure that programs can be held here.

    Raises:
        NotInstalled: If not; the message says what is missing and what to do.
    """
    why = why_not_confined()
    if why is not None:
        raise NotInstalled(
            f"Programs cannot be held on this machine: {why}. Ask on a Linux that has both, in a container for example; or write "
            "--programs off, which asks no questions whose answers are programs, or --programs unconfined, which lets them do all that you may."
        )


def run_program(program: str, limits: Limits | None = None, *, confinement: Confinement = "confined") -> Ended:
    """Run Python source to its end.

    Args:
        program: The source, its tests at the end; an exception in it is a failure.
        limits: What it may take.
        confinement: `unconfined` leaves away all that the kernel holds but the limits. It may then read, write and send whatever you may.

    Raises:
        NotInstalled: If programs cannot be held here.
        NightschoolError: If the kernel refuses to hold this one, which is then not run.
    """
    limits = limits or Limits()
    if confinement == "confined":
        check_confinement()
    with tempfile.TemporaryDirectory(prefix="nightschool-program-", ignore_cleanup_errors=True) as folder:
        reading, writing = os.pipe()
        try:
            return _run(program, limits, Path(folder).resolve(), reading, writing, confinement)
        finally:
            os.close(reading)


def _run(program: str, limits: Limits, folder: Path, reading: int, writing: int, confinement: Confinement) -> Ended:
    is_held, token = confinement == "confined", secrets.token_hex(16)
    order: dict[str, Any] = {
        "program": program,
        "token": token,
        "folder": str(folder),
        "limits": limits.of_process(),
        "parent": os.getpid(),
        "read": list(_readable()),
        "landlock": landlock_version() if is_held else 0,
        "filter": seccomp_filter(platform.machine()).hex() if is_held else None,
    }
    try:
        child = subprocess.Popen(
            [sys.executable, "-I", "-S", "-B", str(confined.__file__), str(writing)],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            cwd=folder,
            env={"HOME": str(folder), "TMPDIR": str(folder), "LANG": "C.UTF-8", "PYTHONHASHSEED": "0"},
            pass_fds=(writing,),
            start_new_session=True,
        )
    finally:
        os.close(writing)
    try:
        return _watch(child, json.dumps(order).encode("utf-8", "surrogatepass"), limits, folder, reading, token)
    finally:
        _kill(child)


def _watch(
    child: subprocess.Popen[bytes], order: bytes, limits: Limits, folder: Path, reading: int, token: str
) -> Ended:
    assert child.stdin is not None
    try:
        child.stdin.write(order)
        child.stdin.close()
    except BrokenPipeError:
        return Ended("ended", "it ended before it was told what to do")
    deadline, said = time.monotonic() + limits.seconds, b""
    while True:
        if _is_full(folder, limits):
            return Ended(
                "room", f"more than {limits.folder_bytes:,} bytes or {limits.folder_files} files in its folder"
            )
        if time.monotonic() >= deadline:
            return Ended("time", f"still running after {limits.seconds:g} s")
        if not select.select([reading], [], [], _LOOK_SECONDS)[0]:
            continue
        piece = os.read(reading, _VERDICT_BYTES)
        said += piece
        if not piece or b"\n" in said or len(said) > _VERDICT_BYTES:
            return _verdict(child, said, limits, token)


def _verdict(child: subprocess.Popen[bytes], said: bytes, limits: Limits, token: str) -> Ended:
    try:
        facts = json.loads(said.partition(b"\n")[0])
    except (ValueError, RecursionError):
        facts = None
    if not isinstance(facts, dict):
        return _end_without_a_word(child, limits)
    if "refused" in facts:
        raise NightschoolError(
            f"The kernel does not let a program be held: {facts['refused']}. It was not run; write --programs off."
        )
    if facts.get("passed") == token:
        return Ended("passed")
    # Half a character could be written nowhere.
    why = str(facts.get("failed", "it said something of its own")).encode("utf-8", "replace").decode("utf-8")
    return Ended("room" if why.startswith("MemoryError") else "failed", why)


def _end_without_a_word(child: subprocess.Popen[bytes], limits: Limits) -> Ended:
    try:
        code = child.wait(timeout=1.0)
    except subprocess.TimeoutExpired:
        return Ended("ended", "it closed what it speaks through")
    if code in (-signal.SIGXCPU, -signal.SIGKILL):
        return Ended("time", f"more than {limits.cpu_seconds} s of a core")
    if code == -signal.SIGXFSZ:
        return Ended("room", f"a file of more than {limits.folder_bytes:,} bytes")
    return Ended("ended", f"it ended itself, with {code}, before its last line")


def _kill(child: subprocess.Popen[bytes]) -> None:
    """End it and all that it started, if anything."""
    try:
        os.killpg(child.pid, signal.SIGKILL)
    except ProcessLookupError:
        child.kill()
    child.wait()


def _is_full(folder: Path, limits: Limits) -> bool:
    """Whether more lies in the folder than may. It is flat: no folder can be made in it."""
    size = count = 0
    with os.scandir(folder) as found:
        for entry in found:
            count += 1
            try:
                size += entry.stat(follow_symlinks=False).st_size
            except FileNotFoundError:
                continue
            if count > limits.folder_files or size > limits.folder_bytes:
                return True
    return False


@cache
def _readable() -> tuple[str, ...]:
    """Python's library, what its modules are linked with, time zones, and two devices: those that are there."""
    return tuple(dict.fromkeys(path for path in _libraries() if os.path.exists(path)))  # noqa: PTH110


def _libraries() -> Iterator[str]:
    for name in ("stdlib", "platstdlib"):
        yield sysconfig.get_path(name, vars={"base": sys.base_prefix, "platbase": sys.base_exec_prefix})
    yield str(Path(sysconfig.get_config_var("DESTSHARED") or confined.__file__))
    yield from _SHARED_LIBRARIES
    yield from ("/usr/share/zoneinfo", "/etc/localtime")
    yield from _DEVICES
