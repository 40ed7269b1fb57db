"""Run one program in this process, which can do nothing else afterwards: `python -I -S confined.py FD < order.json`.

It takes nothing but the standard library. The order says what may be read, what the limits are, and the program; what became of it is
written to FD as one line of JSON. See `nightschool.evaluation.programs.sandbox`.
"""

from __future__ import annotations

import ctypes
import json
import os
import resource
import sys
import types
from typing import Any

_NO_NEW_PRIVILEGES, _DIE_WITH_PARENT, _SECCOMP, _FILTER = 38, 1, 22, 2
_CREATE_RULESET, _ADD_RULE, _RESTRICT_SELF = 444, 445, 446
_BENEATH = 1
_LIMITS = {
    "cpu_seconds": resource.RLIMIT_CPU,
    "memory_bytes": resource.RLIMIT_AS,
    "file_bytes": resource.RLIMIT_FSIZE,
    "files": resource.RLIMIT_NOFILE,
    "core_bytes": resource.RLIMIT_CORE,
}
_CAPABILITIES_VERSION = 0x20080522

_EXECUTE, _WRITE_FILE, _READ_FILE, _READ_DIR = 1 << 0, 1 << 1, 1 << 2, 1 << 3
_REMOVE_FILE, _MAKE_FILE, _TRUNCATE = 1 << 5, 1 << 8, 1 << 14
_READ = _READ_FILE | _READ_DIR
# Folders, links, devices and sockets are not made: the folder stays flat, so that what lies in it is soon counted.
_OWN = _READ | _WRITE_FILE | _REMOVE_FILE | _MAKE_FILE | _TRUNCATE
_OF_FILES = _EXECUTE | _WRITE_FILE | _READ_FILE | _TRUNCATE
# What each version of Landlock can handle: rights to files, to the network, and scopes.
_FILE_RIGHTS = ((1, 0x1FFF), (2, 0x3FFF), (3, 0x7FFF), (5, 0xFFFF))
_NET_FROM, _NET_RIGHTS = 4, 0x3
_SCOPES_FROM, _SCOPES = 6, 0x3


class _Ruleset(ctypes.Structure):
    _fields_ = (("files", ctypes.c_uint64), ("net", ctypes.c_uint64), ("scopes", ctypes.c_uint64))


class _Beneath(ctypes.Structure):
    _pack_ = 1
    _layout_ = "ms"
    _fields_ = (("allowed", ctypes.c_uint64), ("parent_fd", ctypes.c_int32))


class _Program(ctypes.Structure):
    _fields_ = (("length", ctypes.c_ushort), ("instructions", ctypes.c_void_p))


class Refused(Exception):
    """The kernel did not do what was asked."""


def main() -> None:
    """Read the order, give everything up, and run."""
    verdict = os.fdopen(int(sys.argv[1]), "w")
    order = json.loads(sys.stdin.read())
    try:
        _limit(order["limits"])
        if order["filter"] is not None:
            _confine(order)
            _load_filter(bytes.fromhex(order["filter"]))
    except (OSError, ValueError, Refused) as error:
        _say(verdict, refused=str(error))
    _say(verdict, **_run(order["program"], order["token"]))


def _run(program: str, token: str) -> dict[str, str]:
    module = types.ModuleType("program")
    sys.modules["program"] = module
    sys.argv = ["program"]
    try:
        exec(compile(program, "program.py", "exec", dont_inherit=True), module.__dict__)  # noqa: S102 - what this is for
    except BaseException as error:
        return {"failed": f"{type(error).__name__}: {error}"[:500]}
    return {"passed": token}


def _say(verdict: Any, **facts: str) -> None:
    verdict.write(json.dumps(facts) + "\n")
    verdict.flush()
    # Threads and exit handlers of the program have nothing more to say.
    os._exit(0)


def _limit(limits: dict[str, int]) -> None:
    for name, value in limits.items():
        kind = _LIMITS[name]
        _, most = resource.getrlimit(kind)
        least = value if most == resource.RLIM_INFINITY else min(value, most)
        resource.setrlimit(kind, (least, least))


def _confine(order: dict[str, Any]) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    _check(libc.prctl(_DIE_WITH_PARENT, 9, 0, 0, 0), "prctl(PR_SET_PDEATHSIG)")
    if os.getppid() != order["parent"]:
        raise Refused("whoever ordered it is gone")
    _check(libc.prctl(_NO_NEW_PRIVILEGES, 1, 0, 0, 0), "prctl(PR_SET_NO_NEW_PRIVS)")
    _restrict_files(libc, order)
    # A root without capabilities is a user who owns many files, and Landlock keeps it from them.
    header = (ctypes.c_uint32 * 2)(_CAPABILITIES_VERSION, 0)
    _check(libc.capset(header, (ctypes.c_uint32 * 6)()), "capset")


def _restrict_files(libc: Any, order: dict[str, Any]) -> None:
    version = order["landlock"]
    files = max(rights for since, rights in _FILE_RIGHTS if since <= version)
    ruleset = _Ruleset(files, _NET_RIGHTS if version >= _NET_FROM else 0, _SCOPES if version >= _SCOPES_FROM else 0)
    size = 24 if version >= _SCOPES_FROM else 16 if version >= _NET_FROM else 8
    handle = _check(
        libc.syscall(_CREATE_RULESET, ctypes.byref(ruleset), ctypes.c_size_t(size), 0), "landlock_create_ruleset"
    )
    allowed = [(path, _READ | _EXECUTE) for path in order["read"]]
    allowed += [(order["folder"], _OWN), ("/dev/null", _READ_FILE | _WRITE_FILE)]
    for path, rights in allowed:
        place = os.open(path, os.O_PATH | os.O_CLOEXEC)
        if not os.path.isdir(path):  # noqa: PTH112 - pathlib takes longer to import than a program to run
            rights &= _OF_FILES
        beneath = _Beneath(rights & files, place)
        _check(libc.syscall(_ADD_RULE, handle, _BENEATH, ctypes.byref(beneath), 0), f"landlock_add_rule of {path}")
        os.close(place)
    _check(libc.syscall(_RESTRICT_SELF, handle, 0), "landlock_restrict_self")
    os.close(handle)


def _load_filter(instructions: bytes) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    buffer = ctypes.create_string_buffer(instructions, len(instructions))
    program = _Program(len(instructions) // 8, ctypes.cast(buffer, ctypes.c_void_p))
    _check(libc.prctl(_SECCOMP, _FILTER, ctypes.byref(program), 0, 0), "prctl(PR_SET_SECCOMP)")


def _check(result: int, call: str) -> int:
    if result < 0:
        raise Refused(f"{call}: {os.strerror(ctypes.get_errno())}")
    return result


if __name__ == "__main__":
    main()
