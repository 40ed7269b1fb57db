"""Looks at the machine: processor, memory, container, home, disk, ports and network."""

from __future__ import annotations

import os
import platform
import shutil
import socket
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import psutil

from nightschool.cli.doctor.devices import gpu_files, system_facts
from nightschool.cli.doctor.finding import Finding
from nightschool.store.home import Home
from nightschool.units import format_bytes

SERVER_PORT, TENSORBOARD_PORT = 8001, 6006
LITTLE_DISK_BYTES = 2 * 10**9
LITTLE_MEMORY_BYTES = 2 * 10**9
LITTLE_SHARED_BYTES = 10**9
HUB = ("huggingface.co", 443)
HUB_TIMEOUT_SECONDS = 2.0
INSTRUCTIONS = ("avx2", "avx512f", "avx512_bf16", "amx_bf16", "asimd", "bf16")
# File systems on which locks, or maps of files that another machine removes, do not behave as on a disk.
_SHARED_FILE_SYSTEMS = ("nfs", "nfs4", "cifs", "smb3", "fuse.sshfs", "fuse.gcsfuse", "fuse.s3fs", "9p")
_ROOT = Path("/")


def processor() -> Finding:
    """Cores, and instructions that decide which number format is fast."""
    facts = _processor_facts()
    flags = facts.get("Flags", "").split()
    known = [name for name in INSTRUCTIONS if name in flags]
    physical, logical = psutil.cpu_count(logical=False), psutil.cpu_count()
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else logical
    name = facts.get("Model name") or platform.processor() or platform.machine()
    found = f"{name}, {physical or logical} cores, {logical} threads, {allowed} for this process"
    quota = _quota()
    if quota is not None:
        found += f", {quota:.3g} by the container's quota"
    return Finding("PASS", found + (f", {' '.join(known)}" if known else ""))


def main_memory() -> Finding:
    """Bytes that are free, to the machine and to this container."""
    free, total = psutil.virtual_memory().available, psutil.virtual_memory().total
    found = f"{format_bytes(free)} free of {format_bytes(total)}"
    limit = _memory_limit()
    if limit is not None and limit[1] < total:
        used, most = limit
        free = min(free, max(0, most - used))
        found += f"; this container may use {format_bytes(most)}, {format_bytes(max(0, most - used))} are left"
    swap = psutil.swap_memory()
    found += f"; swap {format_bytes(swap.total)}" if swap.total else "; no swap"
    if free < LITTLE_MEMORY_BYTES:
        return Finding(
            "WARN", found, "Close programs or train a smaller model; nightschool plan says how much a run needs."
        )
    return Finding("PASS", found)


def container() -> Finding:
    """Whether this is a container or a virtual machine, and what that limits."""
    kinds = [*_containers()]
    if vendor := _processor_facts().get("Hypervisor vendor"):
        kinds.append(f"virtual machine ({vendor})")
    found = ", ".join(kinds) if kinds else "neither a container nor a virtual machine"
    shared = Path("/dev/shm")  # noqa: S108  looked at, not written to
    if not shared.is_dir():
        return Finding("PASS", found)
    size = shutil.disk_usage(shared).total
    found += f"; /dev/shm {format_bytes(size)}"
    if size < LITTLE_SHARED_BYTES and len(gpu_files()) > 1:
        todo = "Several GPUs exchange gradients through /dev/shm: start the container with --shm-size 8g."
        return Finding("WARN", found, todo)
    return Finding("PASS", found)


def home_folder() -> Finding:
    """Whether the home can be written to, atomically."""
    home = Home.find()
    parent = _existing(home.path)
    try:
        with tempfile.TemporaryDirectory(dir=parent, prefix=".nightschool-doctor-") as folder:
            file = Path(folder) / "a"
            file.write_text("x")
            os.replace(file, Path(folder) / "b")  # noqa: PTH105  the very call that publishing relies on
    except OSError as error:
        return Finding(
            "FAIL",
            f"{home.path} cannot be written to: {error.strerror}",
            "Set NIGHTSCHOOL_HOME to a folder of yours, or use -C DIR.",
        )
    return Finding("PASS", f"{home.path}" + ("" if home.path.exists() else " (not made yet)"))


def disk() -> Finding:
    """Free bytes where the home is, and the kind of file system."""
    parent = _existing(Home.find().path)
    usage, kind = shutil.disk_usage(parent), _file_system(parent)
    found = f"{format_bytes(usage.free)} free of {format_bytes(usage.total)}" + (f", {kind}" if kind else "")
    if usage.free < LITTLE_DISK_BYTES:
        todo = "Free some: nightschool runs rm, nightschool models rm, nightschool checkpoints prune."
        return Finding("WARN", found, todo)
    if kind in _SHARED_FILE_SYSTEMS:
        return Finding("WARN", found, "Put the home on a disk of this machine: NIGHTSCHOOL_HOME=/a/local/folder.")
    if kind == "tmpfs":
        return Finding("WARN", found, "This disk is memory: a restart empties it.")
    return Finding("PASS", found)


def ports() -> Finding:
    """Whether the ports of the server and of TensorBoard are free."""
    taken = [port for port in (SERVER_PORT, TENSORBOARD_PORT) if not _is_free(port)]
    if not taken:
        return Finding("PASS", f"{SERVER_PORT} (server) and {TENSORBOARD_PORT} (TensorBoard) are free")
    verb = "are" if len(taken) > 1 else "is"
    return Finding(
        "WARN",
        f"{' and '.join(map(str, taken))} {verb} taken",
        "One may be running already. Otherwise choose another: nightschool serve --port N, tensorboard --port N.",
    )


def network() -> Finding:
    """Whether the model hub can be reached. Working offline is fine."""
    if os.environ.get("HF_HUB_OFFLINE", "").lower() in ("1", "true", "yes", "on"):
        return Finding("PASS", "HF_HUB_OFFLINE is set: only models on this machine are used")
    started = time.perf_counter()
    try:
        socket.create_connection(HUB, timeout=HUB_TIMEOUT_SECONDS).close()
    except OSError as error:
        return Finding(
            "PASS",
            f"{HUB[0]} cannot be reached ({error}); everything but downloading models works offline",
            "Use a base that you have: ./folder, name@version, or new:tiny.",
        )
    return Finding("PASS", f"{HUB[0]} answers in {(time.perf_counter() - started) * 1000:.0f} ms")


def _containers() -> Iterator[str]:
    if (_ROOT / ".dockerenv").exists():
        yield "Docker"
    elif (_ROOT / "run" / ".containerenv").exists():
        yield "Podman"
    elif os.environ.get("container"):  # noqa: SIM112  systemd and its friends write it small
        yield f"container ({os.environ['container']})"  # noqa: SIM112
    if os.environ.get("KUBERNETES_SERVICE_HOST"):
        yield "Kubernetes"
    if "microsoft" in platform.release().lower():
        yield "WSL"


def _memory_limit() -> tuple[int, int] | None:
    """Bytes that this control group uses, and the most that it may use."""
    for used, most in (
        ("memory.current", "memory.max"),
        ("memory/memory.usage_in_bytes", "memory/memory.limit_in_bytes"),
    ):
        texts = [_text(_ROOT / "sys" / "fs" / "cgroup" / name) for name in (used, most)]
        if all(text.isdecimal() for text in texts):
            return int(texts[0]), int(texts[1])
    return None


def _quota() -> float | None:
    """Cores that this control group may use at a time."""
    parts = _text(_ROOT / "sys" / "fs" / "cgroup" / "cpu.max").split()
    return int(parts[0]) / int(parts[1]) if len(parts) == 2 and parts[0].isdecimal() else None


def _file_system(path: Path) -> str | None:
    """The kind of file system that `path` lies on."""
    mounts = [part for part in psutil.disk_partitions(all=True) if path.is_relative_to(part.mountpoint)]
    return max(mounts, key=lambda part: len(part.mountpoint)).fstype if mounts else None


def _is_free(port: int) -> bool:
    with socket.socket() as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True


def _existing(path: Path) -> Path:
    while not path.exists():
        path = path.parent
    return path


def _text(path: Path) -> str:
    try:
        return path.read_text(errors="replace").strip()
    except OSError:
        return ""


def _processor_facts() -> dict[str, str]:
    """What lscpu says, by its own names; nothing where torch cannot be asked, or there is no lscpu."""
    lines = str(system_facts().get("cpu_info", "")).splitlines()
    return {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
