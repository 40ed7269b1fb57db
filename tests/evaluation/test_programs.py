"""Programs that a model wrote: what they may do, what they may not, and that nothing is left of them."""

from __future__ import annotations

import platform
import socket
import struct
from pathlib import Path

import pytest

from nightschool.errors import NightschoolError, NotInstalled
from nightschool.evaluation.programs import sandbox
from nightschool.evaluation.programs.sandbox import Limits, run_program, why_not_confined
from nightschool.evaluation.programs.syscalls import MACHINES, seccomp_filter

confined = pytest.mark.skipif(why_not_confined() is not None, reason=f"programs cannot be held: {why_not_confined()}")


@confined
@pytest.mark.parametrize(
    "program",
    [
        "assert sorted([2, 1]) == [1, 2]",
        "import bisect, cmath, collections, datetime, decimal, functools, hashlib, heapq, itertools, json, math, random, re, typing",
        "from dataclasses import dataclass\n@dataclass\nclass P:\n    a: int\nassert P(1) == P(1)",
        "with open('notes', 'w') as f:\n    f.write('x')\nassert open('notes').read() == 'x'\nimport os\nos.remove('notes')",
        "import tempfile\nwith tempfile.NamedTemporaryFile() as f:\n    f.write(b'a')",
        "import threading\nseen = []\nt = threading.Thread(target=seen.append, args=(1,))\nt.start()\nt.join()\nassert seen == [1]",
        "import os\nassert not {'PATH', 'NIGHTSCHOOL_HOME', 'HF_TOKEN'} & set(os.environ)",
        "import resource\nassert resource.getrlimit(resource.RLIMIT_CORE) == (0, 0)",
        "if __name__ == '__main__':\n    raise SystemExit",
        "print('x' * 1_000_000)",
        "assert 'é' == '\\u00e9'",
    ],
)
def test_what_an_honest_program_needs_is_there(program: str) -> None:
    assert run_program(program).passed


@confined
@pytest.mark.parametrize(
    ("program", "outcome", "why"),
    [
        ("assert 1 == 2, 'no'", "failed", "AssertionError: no"),
        ("def f(:", "failed", "SyntaxError"),
        ("import sys\nsys.exit(0)", "failed", "SystemExit: 0"),
        ("import os\nos._exit(0)", "ended", "before its last line"),
        ("import ctypes\nctypes.string_at(0)", "ended", "before its last line"),
        ("def f():\n    f()\nf()", "failed", "RecursionError"),
        ("import os\nfor fd in range(3, 64):\n    try: os.write(fd, b'{\"passed\": \"yes\"}\\n')\n    except OSError: pass", "failed", "of its own"),
        ("raise ValueError('\\ud800')", "failed", "ValueError: ?"),
        ("class E(Exception):\n    def __str__(self):\n        raise self\nraise E", "ended", "before its last line"),
        ("import os\nfor fd in range(3, 64):\n    try: os.write(fd, b'[' * 60_000 + b'\\n')\n    except OSError: pass\nos._exit(0)", "ended", "before"),
        ("import os\nos.closerange(3, 64)\nimport time\ntime.sleep(99)", "ended", "closed what it speaks through"),
    ],
)  # fmt: skip
def test_only_the_end_of_the_tests_is_a_pass(program: str, outcome: str, why: str) -> None:
    ended = run_program(program)
    assert (ended.outcome, ended.passed) == (outcome, False)
    assert why in ended.why


@confined
@pytest.mark.parametrize(
    ("program", "limits", "outcome"),
    [
        ("while True: pass", {"cpu_seconds": 1}, "time"),
        ("while True: print('x' * 100_000)", {"cpu_seconds": 1}, "time"),
        ("import time\ntime.sleep(99)", {"seconds": 0.5}, "time"),
        ("import signal, time\nsignal.signal(15, signal.SIG_IGN)\ntime.sleep(99)", {"seconds": 0.5}, "time"),
        ("x = bytearray(1 << 30)", {"memory_bytes": 256 << 20}, "room"),
        ("n = 0\nwhile True:\n    open(str(n), 'w').close()\n    n += 1", {"folder_files": 20}, "room"),
        (
            "n = 0\nwhile True:\n    open(str(n), 'wb').write(b'x' * 90_000)\n    n += 1",
            {"folder_bytes": 100_000},
            "room",
        ),
        ("open('a', 'wb').write(b'x' * 200_000)", {"folder_bytes": 100_000}, "failed"),
    ],
)
def test_what_takes_too_much_is_ended(program: str, limits: dict, outcome: str) -> None:
    assert run_program(program, Limits(**limits)).outcome == outcome


# Each is asked to harm for real; `HOME` stands for a folder of the test that is not the program's.
ATTACKS = {
    "forks": "import os\nif os.fork() == 0: os._exit(0)",
    "starts a process": "import subprocess\nsubprocess.run(['/bin/sh', '-c', 'true'], check=True)",
    "becomes another program": "import os\nos.execv('/bin/true', ['true'])",
    "writes outside": "open('HOME/written', 'w').write('x')",
    "appends outside": "open('HOME/secret', 'a').write('x')",
    "empties outside": "import os\nos.open('HOME/secret', os.O_RDONLY | os.O_TRUNC)\nassert not os.stat('HOME/secret').st_size",
    "truncates outside": "import os\nos.truncate('HOME/secret', 0)",
    "deletes outside": "import os\nos.unlink('HOME/secret')",
    "renames outside": "import os\nos.rename('HOME/secret', 'HOME/renamed')",
    "links to what is outside": "import os\nos.link('HOME/secret', 'mine')\nopen('mine').read()",
    "makes a folder outside": "import os\nos.mkdir('HOME/made')",
    "changes modes": "import os\nos.chmod('HOME/secret', 0o777)",
    "changes times": "import os\nos.utime('HOME/secret', (0, 0))",
    "reads the home": "assert open('HOME/secret').read() == 'secret'",
    "lists the home": "import os\nassert os.listdir('HOME')",
    "reads of processes": "open('/proc/self/environ', 'rb').read()",
    "opens a socket": "import socket\nsocket.create_connection(('127.0.0.1', PORT), timeout=5)",
    "sends a datagram": "import socket\nsocket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(b'x', ('127.0.0.1', PORT))",
    "speaks to a local socket": "import socket\nsocket.socket(socket.AF_UNIX).connect('\\0nobody')",
    "signals": "import os\nos.kill(os.getppid(), 0)",
    "hides memory": "import os\nos.memfd_create('x')",
}
HARMLESS_UNCONFINED = {"speaks to a local socket", "becomes another program"}


@pytest.fixture
def outside(tmp_path: Path):
    (tmp_path / "secret").write_text("secret")
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(0)
        yield tmp_path, server


def state(folder: Path) -> dict[str, tuple]:
    return {path.name: (path.stat().st_mode, path.stat().st_mtime_ns, path.read_bytes()) for path in folder.iterdir()}


def aimed(attack: str, folder: Path, server: socket.socket) -> str:
    return ATTACKS[attack].replace("HOME", str(folder)).replace("PORT", str(server.getsockname()[1]))


@confined
@pytest.mark.parametrize("attack", ATTACKS)
def test_a_program_that_attacks_is_held_and_wrong(attack: str, outside) -> None:
    folder, server = outside
    before = state(folder)
    ended = run_program(aimed(attack, folder, server))
    assert not ended.passed
    # What Landlock says of a link that would move a file's rights.
    assert "PermissionError" in ended.why or "Invalid cross-device link" in ended.why, ended
    assert state(folder) == before
    with pytest.raises(BlockingIOError):
        server.accept()


@pytest.mark.parametrize("attack", sorted(set(ATTACKS) - HARMLESS_UNCONFINED))
def test_the_same_attack_gets_through_where_nobody_is_held(attack: str, outside) -> None:
    ended = run_program(aimed(attack, *outside), confinement="unconfined")
    assert ended.passed, ended


@confined
def test_calls_of_the_kernel_are_refused_whoever_makes_them() -> None:
    number = {"x86_64": 57, "aarch64": 220}[platform.machine()]
    program = f"""
import ctypes, fcntl, os, resource
libc = ctypes.CDLL(None, use_errno=True)
assert libc.syscall({number}, 17, 0, 0, 0, 0) == -1 and ctypes.get_errno() == 1
for what in (lambda: fcntl.fcntl(0, fcntl.F_SETOWN, os.getppid()), lambda: fcntl.fcntl(0, 10, 9), lambda: os.mkdir('x'),
             lambda: os.symlink('/etc', 'x'), lambda: os.mkfifo('x'), lambda: open('/etc/passwd'), lambda: open('/dev/shm/x', 'w')):
    try:
        what()
    except PermissionError:
        continue
    raise AssertionError
assert resource.getrlimit(resource.RLIMIT_CPU) == (10, 10)
try:
    resource.setrlimit(resource.RLIMIT_CPU, (99, 99))
except (ValueError, PermissionError):
    pass
assert resource.getrlimit(resource.RLIMIT_CPU) == (10, 10)
"""
    ended = run_program(program)
    assert ended.passed, ended


@confined
def test_nothing_is_left_of_a_program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    descriptors = len(list(Path("/proc/self/fd").iterdir()))
    assert run_program("open('kept', 'w').write('x')").passed
    assert run_program("import time\nopen('kept', 'w')\ntime.sleep(99)", Limits(seconds=0.2)).outcome == "time"
    assert list(tmp_path.iterdir()) == []
    assert len(list(Path("/proc/self/fd").iterdir())) == descriptors


def test_where_nothing_holds_a_program_it_is_not_run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(sandbox, "why_not_confined", lambda: "the kernel has no Landlock")
    with pytest.raises(NotInstalled, match=r"the kernel has no Landlock.*--programs off"):
        run_program(f"open({str(tmp_path / 'x')!r}, 'w')")
    assert not list(tmp_path.iterdir())


@confined
def test_a_kernel_that_refuses_is_no_wrong_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sandbox, "seccomp_filter", lambda machine: struct.pack("=HBBI", 0xFFFF, 0, 0, 0))
    with pytest.raises(NightschoolError, match=r"does not let a program be held: prctl\(PR_SET_SECCOMP\)"):
        run_program("pass")


# --- the filter, by what it decides ---

ALLOW, KILL = 0x7FFF0000, 0x80000000
PROBES = {
    # name: (x86_64, aarch64, arguments, verdict)
    "read": (0, 63, (), ALLOW),
    "openat to read": (257, 56, (0, 0, 0), ALLOW),
    "openat to write and truncate": (257, 56, (0, 0, 0o1101), ALLOW),
    "openat to read and truncate": (257, 56, (0, 0, 0o1000), 1),
    "clone of a process": (56, 220, (17,), 1),
    "clone of a thread": (56, 220, (0x3D0F00,), ALLOW),
    "clone3": (435, 435, (), 38),
    "a call that is newer": (470, 470, (), 38),
    "prlimit that asks": (302, 261, (0, 0, 0), ALLOW),
    "prlimit that sets": (302, 261, (0, 0, 0x7F00_0000_0000), 1),
    "fcntl of flags": (72, 25, (0, 4), ALLOW),
    "fcntl of the owner": (72, 25, (0, 8), 1),
    "ioctl that types": (16, 29, (0, 0x5412), 1),
    "socket": (41, 198, (), 1),
    "execve": (59, 221, (), 1),
    "kill": (62, 129, (), 1),
    "memfd_create": (319, 279, (), 1),
    "fchmodat": (268, 53, (), 1),
}


def decided(program: bytes, architecture: int, number: int, arguments: tuple[int, ...]) -> int:
    """Run the filter as the kernel does."""
    data = struct.pack("=IIQ6Q", number, architecture, 0, *[*arguments, *[0] * (6 - len(arguments))])
    instructions = list(struct.iter_unpack("=HBBI", program))
    place, value = 0, 0
    while True:
        code, jump_true, jump_false, operand = instructions[place]
        place += 1
        match code:
            case 0x20:
                (value,) = struct.unpack_from("=I", data, operand)
            case 0x54:
                value &= operand
            case 0x06:
                return operand & 0xFFFF if operand & 0xFFFF0000 == 0x50000 else operand
            case _:
                holds = {0x15: value == operand, 0x25: value > operand, 0x35: value >= operand}[code]
                place += jump_true if holds else jump_false


@pytest.mark.parametrize("machine", MACHINES)
@pytest.mark.parametrize("probe", PROBES)
def test_what_the_filter_decides(machine: str, probe: str) -> None:
    architecture, place = MACHINES[machine]
    *numbers, arguments, verdict = PROBES[probe]
    program = seccomp_filter(machine)
    assert decided(program, architecture, numbers[place], arguments) == verdict
    assert decided(program, architecture ^ 1, numbers[place], arguments) == KILL
    assert decided(program, architecture, numbers[place] | 0x40000000, arguments) == 38
