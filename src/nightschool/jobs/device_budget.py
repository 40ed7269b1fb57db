"""Whether a job fits: what its plan needs against what the device has, and what those that run have taken."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import psutil

from nightschool.store.home import Home
from nightschool.store.job_files import JobFiles
from nightschool.store.job_queue import Job, JobQueue
from nightschool.units import format_bytes
from nightschool.work.host_memory import host_bytes
from nightschool.work.identity import ProcessIdentity

# What a process of training holds on the host beside its tensors: the interpreter and the libraries (measured: 440 MB).
PROCESS_BYTES = 450_000_000

_LIMIT = "MAX_GPU_MEMORY_GB"

Verdict = Literal["fits", "waits", "never"]


@dataclass(frozen=True)
class Need:
    """What a job takes, as its plan says. `device_total_bytes` is what its GPU has in all; None on a CPU.

    `common_bytes` of it are taken once by all that share its base and its process; `pass_bytes` of it are there during a pass
    alone, and a pass that it has together with others takes `joint_pass_bytes`. `cpus` and `gpus` are those that all its
    processes keep busy.
    """

    device_bytes: int
    device_total_bytes: int | None
    common_bytes: int = 0
    cpus: int = 1
    gpus: int = 0
    pass_bytes: int = 0
    joint_pass_bytes: int = 0

    @classmethod
    def of(cls, plan: dict[str, Any] | None) -> Need | None:
        """What a plan says; None without one."""
        if plan is None:
            return None
        total, processes = plan["device_total_bytes"], int(plan.get("processes", 1))
        host = 0 if total is not None else PROCESS_BYTES
        return cls(
            int(plan["expected_peak_bytes"]) + host,
            total,
            int(plan.get("base_bytes", 0)) + host,
            cpus=int(plan.get("cpu_threads", 1)) if total is None else processes,
            gpus=0 if total is None else processes,
            pass_bytes=int(plan.get("pass_bytes", 0)),
            joint_pass_bytes=int(plan.get("joint_pass_bytes", 0)),
        )

    @classmethod
    def together(cls, needs: Sequence[Need]) -> Need | None:
        """What jobs take that share a base; None if there are none."""
        if not needs:
            return None
        own = sum(need.device_bytes - need.common_bytes - need.pass_bytes for need in needs)
        common = max(need.common_bytes for need in needs)
        # A pass takes some of their tokens, or all that they have.
        joint = max(need.joint_pass_bytes for need in needs)
        one_pass = min(joint, sum(need.pass_bytes for need in needs))
        return replace(
            needs[0],
            device_bytes=common + own + one_pass,
            common_bytes=common,
            pass_bytes=one_pass,
            joint_pass_bytes=joint,
        )


@dataclass(frozen=True)
class Room:
    """The verdict on one job, and the figures behind it for people."""

    verdict: Verdict
    why: str


def needs_here(home: Home, queue: JobQueue, *, besides: Job) -> list[tuple[Need, ProcessIdentity | None]]:
    """What the other jobs that run on this machine need, whichever worker watches them, and the process of each.

    Those that share a base are one. `besides` is a job that is not meant, nor those that share its base.
    """
    processes: dict[str, ProcessIdentity | None] = {}
    needs: dict[str, list[Need]] = defaultdict(list)
    for job in queue.ls(states=("running",)):
        owner, files = job.lease.owner, JobFiles.of(home, job)
        need, group = Need.of(files.plan()), job.group_id or job.id
        if group != (besides.group_id or besides.id) and owner is not None and owner.is_here and need is not None:
            needs[group].append(need)
            processes[group] = files.process()
    together = {group: Need.together(those) for group, those in needs.items()}
    return [(need, processes[group]) for group, need in together.items() if need is not None]


def room_for(need: Need | None, running: Sequence[tuple[Need, ProcessIdentity | None]], limit: int | None) -> Room:
    """Whether a job may begin beside those that run, each with its process.

    `limit` bounds what all jobs together may take, in bytes. A job without a plan fits: its run will say what is wrong.
    """
    if need is None:
        return Room("fits", "There is no plan")
    on_gpu = need.device_total_bytes is not None
    host = host_bytes()
    total = need.device_total_bytes or host.total
    if limit is not None and limit < total:
        total, owner = limit, _LIMIT
    else:
        owner = "this GPU" if on_gpu else "this machine"
    if need.device_bytes > total:
        return _never(need, owner, total)
    free = total - sum(other.device_bytes for other, _ in running)
    if not on_gpu:
        # What the others have not taken yet is not free either.
        coming = sum(max(0, other.device_bytes - _held_bytes(process)) for other, process in running)
        free = min(free, host.free - coming)
    wanted = f"The job needs about {format_bytes(need.device_bytes)}"
    if need.device_bytes > free:
        return Room("waits", f"{wanted}, and {format_bytes(max(0, free))} are free now: it waits for its turn.")
    return Room("fits", f"{wanted} of {format_bytes(free)} that are free")


def room_within(need: Need | None, limit: int | None) -> Room | None:
    """The refusal of a job that is larger than `limit` by itself; None if it is not."""
    return None if need is None or limit is None or need.device_bytes <= limit else _never(need, _LIMIT, limit)


def _never(need: Need, owner: str, total: int) -> Room:
    return Room(
        "never",
        f"The job needs about {format_bytes(need.device_bytes)}, and {owner} allows {format_bytes(total)} in all. Lower "
        f"train.batch_size or train.max_seq_len, write train.gradient_checkpointing=true, or take a smaller base.",
    )


def _held_bytes(process: ProcessIdentity | None) -> int:
    """What a process and those that it started hold on the host now."""
    found = None if process is None else process.find()
    if found is None:
        return 0
    held = 0
    for one in (found, *_children(found)):
        try:
            held += int(one.memory_info().rss)
        except psutil.Error:  # it has ended meanwhile
            continue
    return held


def _children(process: psutil.Process) -> list[psutil.Process]:
    try:
        return list(process.children(recursive=True))
    except psutil.Error:
        return []
