"""`nightschool doctor`: what works on this machine, and what to do about the rest."""

from __future__ import annotations

import os
import platform
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Literal

import psutil

from nightschool import __version__
from nightschool.cli.session import answer, colour_wanted
from nightschool.store.home import Home
from nightschool.units import format_bytes

Verdict = Literal["PASS", "WARN", "FAIL"]
PORT = 8001
LITTLE_DISK_BYTES = 2 * 10**9
LITTLE_MEMORY_BYTES = 2 * 10**9
HUB = ("huggingface.co", 443)
HUB_TIMEOUT_SECONDS = 2.0
PRODUCT_WIDTH = 512
PACKAGES = ("torch", "transformers", "tokenizers", "safetensors", "peft", "numpy", "pyarrow", "fastapi", "uvicorn")


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at. `todo` says what to do next; it is empty where there is nothing to do."""

    subject: str
    verdict: Verdict
    found: str
    todo: str = ""


def doctor() -> int:
    """Look at processor, GPU, number formats, disk, memory, port, network, home and versions.

    Exits 1 if something fails that nightschool cannot do without.
    """
    looks: tuple[Callable[[], Finding], ...] = (
        versions,
        processor,
        main_memory,
        gpu,
        number_formats,
        home_folder,
        disk,
        port,
        network,
    )
    findings = [_carefully(look) for look in looks]
    failed = [one for one in findings if one.verdict == "FAIL"]

    def text() -> str:
        lines = []
        for one in findings:
            lines.append(f"{_coloured(one.verdict)}  {one.subject:<8} {one.found}")
            if one.todo:
                lines.append(f"               → {one.todo}")
        lines.append("")
        lines.append(
            f"{len(failed)} of {len(findings)} failed: {', '.join(one.subject for one in failed)}"
            if failed
            else "Everything that is needed works. Next: nightschool demo"
        )
        return "\n".join(lines)

    answer(
        {"ok": not failed, "findings": [asdict(one) for one in findings]},
        text,
        quiet=lambda: "\n".join(f"{one.verdict} {one.subject}" for one in findings if one.verdict != "PASS"),
    )
    return 1 if failed else 0


def versions() -> Finding:
    """Python and the libraries that matter."""
    found, missing = [f"nightschool {__version__}", f"Python {platform.python_version()}"], []
    for package in PACKAGES:
        try:
            found.append(f"{package} {version(package)}")
        except PackageNotFoundError:
            missing.append(package)
    if missing:
        return Finding("versions", "FAIL", f"missing: {', '.join(missing)}", f"pip install {' '.join(missing)}")
    return Finding("versions", "PASS", ", ".join(found))


def processor() -> Finding:
    """Cores, and instructions that decide which number format is fast."""
    from nightschool.models.dtype import num_threads_here

    threads = num_threads_here()
    flags = _cpu_flags()
    known = [name for name in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if name in flags]
    return Finding(
        "CPU",
        "PASS",
        f"{_cpu_name()}, {psutil.cpu_count()} cores, {threads} used for training"
        + (f", {' '.join(known)}" if known else ""),
    )


def main_memory() -> Finding:
    """RAM that is free."""
    memory = psutil.virtual_memory()
    found = f"{format_bytes(memory.available)} free of {format_bytes(memory.total)}"
    if memory.available < LITTLE_MEMORY_BYTES:
        return Finding("RAM", "WARN", found, "Close programs, or train smaller models: nightschool plan says how much.")
    return Finding("RAM", "PASS", found)


def gpu() -> Finding:
    """The GPUs that torch can use, and the driver."""
    import torch

    driver = _nvidia_driver()
    if not torch.cuda.is_available():
        if driver is None:
            return Finding("GPU", "PASS", "none; small models train on the CPU")
        return Finding(
            "GPU",
            "WARN",
            f"driver {driver}, but torch {torch.__version__} cannot use it",
            "Install a torch with CUDA: https://pytorch.org/get-started/locally",
        )
    parts = []
    for index in range(torch.cuda.device_count()):
        free, total = torch.cuda.mem_get_info(index)
        capability = ".".join(str(part) for part in torch.cuda.get_device_capability(index))
        parts.append(
            f"{torch.cuda.get_device_name(index)} (capability {capability}, {format_bytes(free)} free of "
            f"{format_bytes(total)})"
        )
    product = torch.ones(64, 64, device="cuda") @ torch.ones(64, 64, device="cuda")
    if float(product[0, 0]) != 64.0:
        return Finding("GPU", "FAIL", f"{', '.join(parts)}: a product came out wrong", "Update the driver, or reboot.")
    return Finding("GPU", "PASS", f"{', '.join(parts)}, driver {driver or 'unknown'}, CUDA {torch.version.cuda}")


def number_formats() -> Finding:
    """What decides about `dtype: auto` here. On a CPU that is each run's own steps; this is a product alone."""
    from nightschool.models.dtype import bf16_speedup, resolve_device, resolve_dtype

    device = resolve_device()
    if device.type == "cuda":
        return Finding("dtype", "PASS", resolve_dtype("auto", device).why)
    speedup = bf16_speedup(PRODUCT_WIDTH)
    return Finding(
        "dtype",
        "PASS",
        f"bf16 products are {speedup:.2g} times as fast as fp32 ones on this CPU; each run measures its own steps",
    )


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
            "home",
            "FAIL",
            f"{home.path} cannot be written to: {error.strerror}",
            "Set NIGHTSCHOOL_HOME to a folder of yours, or use -C DIR.",
        )
    return Finding("home", "PASS", f"{home.path}" + ("" if home.path.exists() else " (will be made)"))


def disk() -> Finding:
    """Free bytes where the home is."""
    home = Home.find()
    usage = shutil.disk_usage(_existing(home.path))
    found = f"{format_bytes(usage.free)} free of {format_bytes(usage.total)}"
    if usage.free < LITTLE_DISK_BYTES:
        todo = "Free some: nightschool runs rm, nightschool models rm, nightschool checkpoints prune."
        return Finding("disk", "WARN", found, todo)
    return Finding("disk", "PASS", found)


def port() -> Finding:
    """Whether the server's port is free."""
    with socket.socket() as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind(("127.0.0.1", PORT))
        except OSError as error:
            return Finding(
                "port",
                "WARN",
                f"{PORT} is taken ({error.strerror})",
                "A server may be running already; else choose another with nightschool serve --port.",
            )
    return Finding("port", "PASS", f"{PORT} is free")


def network() -> Finding:
    """Whether the model hub can be reached. Working offline is fine."""
    if os.environ.get("HF_HUB_OFFLINE", "").lower() in ("1", "true", "yes", "on"):
        return Finding("network", "PASS", "HF_HUB_OFFLINE is set: models that are here, or in the cache, are used")
    started = time.perf_counter()
    try:
        socket.create_connection(HUB, timeout=HUB_TIMEOUT_SECONDS).close()
    except OSError as error:
        return Finding(
            "network",
            "PASS",
            f"{HUB[0]} cannot be reached ({error}); everything works offline but fetching models",
            "Name a base that is here: ./folder, name@version, or new:tiny.",
        )
    return Finding("network", "PASS", f"{HUB[0]} answers in {(time.perf_counter() - started) * 1000:.0f} ms")


def _carefully(look: Callable[[], Finding]) -> Finding:
    """A look that breaks is a finding too: the doctor must always come to its end."""
    try:
        return look()
    except Exception as error:
        return Finding(
            look.__name__.replace("_", " "), "FAIL", f"{type(error).__name__}: {error}", "Reinstall, and try again."
        )


def _coloured(verdict: Verdict) -> str:
    if not colour_wanted():
        return verdict
    return f"\x1b[{ {'PASS': 32, 'WARN': 33, 'FAIL': 31}[verdict] }m{verdict}\x1b[0m"


def _existing(path: Path) -> Path:
    while not path.exists():
        path = path.parent
    return path


def _cpu_lines(key: str) -> str:
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith(key)), "")


def _cpu_name() -> str:
    return _cpu_lines("model name") or platform.processor() or platform.machine()


def _cpu_flags() -> set[str]:
    return set(_cpu_lines("flags").split())


def _nvidia_driver() -> str | None:
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return None
    asked = [tool, "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(asked, capture_output=True, text=True, timeout=10, check=True)
    except (subprocess.SubprocessError, OSError):
        return None
    return done.stdout.strip().splitlines()[0] if done.stdout.strip() else None
