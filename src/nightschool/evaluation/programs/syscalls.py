"""What a confined program may not ask of the kernel: a seccomp filter, as the bytes that the kernel takes.

A program that cannot start another one, open a socket, signal a process or raise its own limits is held by its limits, and by
Landlock in what it opens. Landlock does not look at owners, modes and times of files, so that these calls are refused here.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Mapping

# Of linux/audit.h; the place in the tuples below.
MACHINES: Mapping[str, tuple[int, int]] = {"x86_64": (0xC000003E, 0), "aarch64": (0xC00000B7, 1)}

# Numbers on x86_64 and on aarch64, of asm/unistd_64.h and asm-generic/unistd.h; None where there is no such call.
_REFUSED: Mapping[str, tuple[int | None, int | None]] = {
    # other processes
    "fork": (57, None),
    "vfork": (58, None),
    "execve": (59, 221),
    "execveat": (322, 281),
    "kill": (62, 129),
    "tkill": (200, 130),
    "tgkill": (234, 131),
    "rt_sigqueueinfo": (129, 138),
    "rt_tgsigqueueinfo": (297, 240),
    "pidfd_open": (434, 434),
    "pidfd_send_signal": (424, 424),
    "pidfd_getfd": (438, 438),
    "process_vm_readv": (310, 270),
    "process_vm_writev": (311, 271),
    "process_madvise": (440, 440),
    "process_mrelease": (448, 448),
    "ptrace": (101, 117),
    "kcmp": (312, 272),
    "setpriority": (141, 140),
    "sched_setscheduler": (144, 119),
    "sched_setparam": (142, 118),
    "sched_setattr": (314, 274),
    "sched_setaffinity": (203, 122),
    "ioprio_set": (251, 30),
    "migrate_pages": (256, 238),
    "move_pages": (279, 239),
    # the network, and what reaches others without it
    "socket": (41, 198),
    "socketpair": (53, 199),
    "connect": (42, 203),
    "bind": (49, 200),
    "io_uring_setup": (425, 425),
    "io_uring_enter": (426, 426),
    "io_uring_register": (427, 427),
    "mq_open": (240, 180),
    "mq_unlink": (241, 181),
    "shmget": (29, 194),
    "shmat": (30, 196),
    "semget": (64, 190),
    "msgget": (68, 186),
    # memory that no limit counts
    "memfd_create": (319, 279),
    "memfd_secret": (447, 447),
    # other views of the file system, and what Landlock does not look at
    "mount": (165, 40),
    "umount2": (166, 39),
    "pivot_root": (155, 41),
    "chroot": (161, 51),
    "unshare": (272, 97),
    "setns": (308, 268),
    "move_mount": (429, 429),
    "open_tree": (428, 428),
    "fsopen": (430, 430),
    "fsmount": (432, 432),
    "fsconfig": (431, 431),
    "fspick": (433, 433),
    "mount_setattr": (442, 442),
    "name_to_handle_at": (303, 264),
    "open_by_handle_at": (304, 265),
    "chmod": (90, None),
    "fchmod": (91, 52),
    "fchmodat": (268, 53),
    "chown": (92, None),
    "fchown": (93, 55),
    "lchown": (94, None),
    "fchownat": (260, 54),
    "utime": (132, None),
    "utimes": (235, None),
    "utimensat": (280, 88),
    "futimesat": (261, None),
    "setxattr": (188, 5),
    "lsetxattr": (189, 6),
    "fsetxattr": (190, 7),
    "removexattr": (197, 14),
    "lremovexattr": (198, 15),
    "fremovexattr": (199, 16),
    "truncate": (76, 45),
    # the kernel itself
    "bpf": (321, 280),
    "perf_event_open": (298, 241),
    "userfaultfd": (323, 282),
    "keyctl": (250, 219),
    "add_key": (248, 217),
    "request_key": (249, 218),
    "setrlimit": (160, 164),
}
_CLONE, _CLONE3, _OPENAT2 = (56, 220), 435, 437
_PRLIMIT, _FCNTL, _IOCTL = (302, 261), (72, 25), (16, 29)
# With the place of their flags.
_OPENS: tuple[tuple[tuple[int | None, int | None], int], ...] = (((2, None), 1), ((257, 56), 2))
_NEWEST = 450
"""Later calls than were looked at are not there, as for a program on an older kernel."""

_X32 = 0x4000_0000
_CLONE_THREAD = 0x10000
_OPEN_KIND_AND_TRUNC, _TRUNC = 0o1003, 0o1000
_SET_OWNER = (8, 10, 15)  # F_SETOWN, F_SETSIG, F_SETOWN_EX: signals to others
_IOCTL_SET_OWNER = (0x8901, 0x8902, 0x5412)  # FIOSETOWN, SIOCSPGRP, and TIOCSTI, which types into a terminal

_EPERM, _ENOSYS = 1, 38
_ALLOW, _KILL, _ERRNO = 0x7FFF_0000, 0x8000_0000, 0x0005_0000
_LOAD, _AND, _EQUAL, _GREATER, _AT_LEAST, _RETURN = 0x20, 0x54, 0x15, 0x25, 0x35, 0x06
_NUMBER, _ARCHITECTURE, _ARGUMENTS = 0, 4, 16

_Instruction = tuple[int, int, int, int]  # code, jump if true, jump if false, operand


def seccomp_filter(machine: str) -> bytes:
    """The filter for a machine of `MACHINES`: an array of `struct sock_filter`."""
    architecture, place = MACHINES[machine]

    def on(numbers: tuple[int | None, int | None]) -> int | None:
        return numbers[place]

    refused = _return(_ERRNO | _EPERM)
    program: list[_Instruction] = [
        (_LOAD, 0, 0, _ARCHITECTURE),
        (_EQUAL, 1, 0, architecture),
        _return(_KILL),
        (_LOAD, 0, 0, _NUMBER),
        (_AT_LEAST, 0, 1, _X32),
        _return(_ERRNO | _ENOSYS),
        (_GREATER, 0, 1, _NEWEST),
        _return(_ERRNO | _ENOSYS),
    ]
    for number in (_CLONE3, _OPENAT2):  # libraries then take the older calls, whose flags can be looked at
        program += [(_EQUAL, 0, 1, number), _return(_ERRNO | _ENOSYS)]
    for numbers in _REFUSED.values():
        if (number_here := on(numbers)) is not None:
            program += [(_EQUAL, 0, 1, number_here), refused]
    program += _of_call(on(_CLONE), [_argument(0), (_AND, 0, 0, _CLONE_THREAD), (_EQUAL, 0, 1, 0), refused])
    # Limits may be asked for and not be set: the new ones are a pointer, of two halves.
    program += _of_call(
        on(_PRLIMIT), [_argument(2), (_EQUAL, 1, 0, 0), refused, _argument(2, 4), (_EQUAL, 1, 0, 0), refused]
    )
    program += _of_call(on(_FCNTL), [_argument(1), *_any_of(_SET_OWNER, refused)])
    program += _of_call(on(_IOCTL), [_argument(1), *_any_of(_IOCTL_SET_OWNER, refused)])
    # Landlock did not look at it before its third version.
    for numbers, flags in _OPENS:
        looked = [_argument(flags), (_AND, 0, 0, _OPEN_KIND_AND_TRUNC), (_EQUAL, 0, 1, _TRUNC), refused]
        program += _of_call(on(numbers), looked)
    program.append(_return(_ALLOW))
    return b"".join(struct.pack("=HBBI", *instruction) for instruction in program)


def _return(verdict: int) -> _Instruction:
    return (_RETURN, 0, 0, verdict)


def _argument(number: int, half: int = 0) -> _Instruction:
    """Load the lower half of an argument of the call, or the upper one with 4; both machines are little-endian."""
    return (_LOAD, 0, 0, _ARGUMENTS + 8 * number + half)


def _any_of(values: Iterable[int], refused: _Instruction) -> list[_Instruction]:
    return [one for value in values for one in ((_EQUAL, 0, 1, value), refused)]


def _of_call(number: int | None, block: list[_Instruction]) -> list[_Instruction]:
    """Instructions that only one call comes to; what they do not refuse is let through to the end."""
    if number is None:
        return []
    inside = [*block, _return(_ALLOW)]
    return [(_LOAD, 0, 0, _NUMBER), (_EQUAL, 0, len(inside), number), *inside]
