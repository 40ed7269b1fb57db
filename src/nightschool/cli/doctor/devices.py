"""Looks at drivers, torch, GPUs and matrix products. torch is asked in a child process, once for all of them."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from functools import lru_cache
from pathlib import Path
from typing import Any

from nightschool.cli.doctor.finding import Finding
from nightschool.errors import NightschoolError
from nightschool.jobs.processes import how_it_ended
from nightschool.units import format_bytes
from nightschool.work.processes import command

PROBE_SECONDS = 180.0
DRIVER_SECONDS = 20.0
GET_TORCH = "Install a torch with CUDA: https://pytorch.org/get-started/locally"


class ProbeFailed(NightschoolError):
    """torch could not be asked."""


def probe() -> dict[str, Any]:
    """What the child process found.

    Raises:
        ProbeFailed: If it died, hung or printed no JSON; the message says what it said last.
    """
    found = _ask_torch()
    if isinstance(found, str):
        raise ProbeFailed(found)
    return found


@lru_cache
def _ask_torch() -> dict[str, Any] | str:
    """What it found, or why it found nothing: a torch that hangs is waited for once."""
    try:
        done = subprocess.run(command("probe"), capture_output=True, text=True, timeout=PROBE_SECONDS)
    except subprocess.TimeoutExpired:
        return f"torch gave no answer within {PROBE_SECONDS:.0f} s"
    last = (done.stderr.strip().splitlines() or [""])[-1]
    if done.returncode != 0:
        return f"torch could not be used: {how_it_ended(done.returncode)}: {last}"
    try:
        found = json.loads(done.stdout.strip().splitlines()[-1])
    except (ValueError, IndexError):
        return f"torch gave no answer that can be read: {last}"
    return dict(found)


def forget() -> None:
    """Ask anew the next time."""
    _ask_torch.cache_clear()
    _nvidia_smi.cache_clear()


def driver() -> Finding:
    """NVIDIA's driver, by `nvidia-smi`."""
    tool = shutil.which("nvidia-smi")
    files = _device_files()
    if tool is None:
        if files:
            return Finding(
                "driver",
                "WARN",
                f"{', '.join(files)} are there, but nvidia-smi is not",
                "Install the driver's tools; in a container, start it with --gpus all.",
            )
        return Finding("driver", "PASS", "no NVIDIA driver, and no NVIDIA GPU is seen")
    answer, failure = _nvidia_smi(tool)
    if failure:
        return Finding(
            "driver",
            "WARN",
            f"nvidia-smi fails: {failure}",
            "Load the driver (modprobe nvidia), or restart the machine after an update of the driver.",
        )
    version, highest = _after(answer, r"Driver Version: *([\d.]+)"), _after(answer, r"CUDA(?: UMD)? Version: *([\d.]+)")
    return Finding("driver", "PASS", f"NVIDIA {version or 'unknown'}, for CUDA up to {highest or 'unknown'}")


def torch_wheel() -> Finding:
    """Which torch this is, and whether it fits the driver."""
    try:
        facts = probe()
    except ProbeFailed as error:
        return Finding("torch", "FAIL", str(error), "Reinstall torch: pip install --force-reinstall torch")
    kind = f"CUDA {facts['cuda']}" if facts["cuda"] else f"ROCm {facts['hip']}" if facts["hip"] else "CPU only"
    found = f"{facts['torch']}, built for {kind}" + (f", cuDNN {facts['cudnn']}" if facts["cudnn"] else "")
    found += f", {facts['threads']} threads"
    tool = shutil.which("nvidia-smi")
    answer, failure = _nvidia_smi(tool) if tool else ("", "")
    if tool is None or failure:
        return Finding("torch", "PASS", found)
    if facts["cuda"] is None:
        return Finding("torch", "WARN", f"{found}, so the GPU is not used", GET_TORCH)
    highest = _after(answer, r"CUDA(?: UMD)? Version: *([\d.]+)")
    if highest and _number(facts["cuda"])[:1] > _number(highest)[:1]:
        todo = f"Update the driver, or install a torch for CUDA {highest} or older."
        return Finding("torch", "WARN", f"{found}, but the driver knows CUDA only up to {highest}", todo)
    return Finding("torch", "PASS", found)


def gpus() -> Finding:
    """The GPUs that torch can use."""
    try:
        facts = probe()
    except ProbeFailed:
        return Finding("GPU", "WARN", "not known, because torch cannot be asked", "See torch above.")
    if not facts["devices"]:
        if shutil.which("nvidia-smi") or _device_files():
            return Finding(
                "GPU",
                "WARN",
                f"there is a driver, but torch {facts['torch']} cannot use a GPU",
                "See driver, torch and environment above.",
            )
        return Finding("GPU", "PASS", "none; small models train on the CPU")
    parts, todo = [], []
    for index, device in enumerate(facts["devices"]):
        parts.append(
            f"{index}: {device['name']} (capability {device['capability']}, {format_bytes(device['free_bytes'])} free "
            f"of {format_bytes(device['total_bytes'])}{', bf16' if device['bf16'] else ', no bf16'})"
        )
        if not _supported(device["capability"], facts["architectures"]):
            todo.append(f"torch was not built for capability {device['capability']}: {GET_TORCH}.")
        if device["free_bytes"] < 0.1 * device["total_bytes"]:
            todo.append(f"GPU {index} is nearly full: see nvidia-smi for who uses it.")
    return Finding("GPU", "WARN" if todo else "PASS", "; ".join(parts), " ".join(todo))


def products() -> Finding:
    """Multiply two matrices in every number format on every device: whether it is right, and how fast."""
    try:
        found = probe()["products"]
    except ProbeFailed:
        return Finding("products", "FAIL", "not computed, because torch cannot be asked", "See torch above.")
    wrong = [one for one in found if not one["right"]]
    text = ", ".join(_speed(one) for one in found)
    if any(one["dtype"] == "fp32" or one["device"] != "cpu" for one in wrong):
        return Finding("products", "FAIL", text, "Update the driver, or reinstall torch, and try again.")
    if wrong:
        formats = ", ".join(one["dtype"] for one in wrong)
        return Finding("products", "WARN", text, f"Keep to train.dtype=fp32; {formats} does not work on this CPU.")
    return Finding("products", "PASS", text)


def number_formats() -> Finding:
    """What decides about `dtype: auto` here. On a CPU that is each run's own steps; this is a layer alone."""
    try:
        facts = probe()["dtype"]
    except ProbeFailed:
        return Finding("dtype", "WARN", "not known, because torch cannot be asked", "See torch above.")
    if facts["device"] == "cuda":
        return Finding("dtype", "PASS", facts["why"])
    return Finding(
        "dtype",
        "PASS",
        f"bf16 layers are {facts['speedup']:.2g} times as fast as fp32 ones on this CPU; each run measures its own steps",
    )


def _speed(product: dict[str, Any]) -> str:
    name = f"{product['device']} {product['dtype']}"
    if "failure" in product:
        return f"{name} fails ({product['failure']})"
    speed = f"{name} {product['width']}² in {product['seconds'] * 1000:.3g} ms ({product['flops'] / 1e9:.3g} GFLOP/s)"
    if product["right"]:
        return speed
    error = product["error"]
    return f"{speed} WRONG by {error:.2g}" if error is not None else f"{speed} WRONG: not finite"


@lru_cache
def _nvidia_smi(tool: str) -> tuple[str, str]:
    """What it prints, and in place of it what it says when it fails."""
    try:
        done = subprocess.run([tool], capture_output=True, text=True, timeout=DRIVER_SECONDS)
    except subprocess.TimeoutExpired:
        return "", f"no answer within {DRIVER_SECONDS:.0f} s"
    except OSError as error:
        return "", str(error)
    if done.returncode != 0:
        said = (done.stdout + done.stderr).strip().splitlines()
        return "", said[0] if said else how_it_ended(done.returncode)
    return done.stdout, ""


def _device_files() -> list[str]:
    return sorted(str(path) for path in Path("/dev").glob("nvidia[0-9]*"))


def _supported(capability: str, architectures: list[str]) -> bool:
    """Whether torch has code for a GPU: of its own generation and not newer, or code that the driver can translate."""
    major, minor = _number(capability)
    for name in architectures:
        kind, _, digits = name.partition("_")
        number = re.match(r"\d+", digits)
        if number is None:
            return True
        built = divmod(int(number.group()), 10)
        if kind == "compute" and built <= (major, minor):
            return True
        if kind == "sm" and built[0] == major and built[1] <= minor:
            return True
    return not architectures


def _after(text: str, pattern: str) -> str | None:
    match = re.search(pattern, text)
    return match.group(1) if match else None


def _number(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", text)[:2])
