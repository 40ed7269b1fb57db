"""Looks at drivers, torch, GPUs and matrix products: what the probe found, and what to do about it."""

from __future__ import annotations

import json
import os
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
GET_TORCH = "Install a torch with CUDA: https://pytorch.org/get-started/locally"


class ProbeFailed(NightschoolError):
    """torch could not be asked."""


def probe() -> dict[str, Any]:
    """What the child process found (see probe.py).

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
    environment = os.environ | {"LC_ALL": "C.UTF-8"}  # tools that it asks translate what they say
    try:
        done = subprocess.run(
            command("probe"), capture_output=True, text=True, timeout=PROBE_SECONDS, env=environment, check=False
        )
    except subprocess.TimeoutExpired:
        return f"no answer within {PROBE_SECONDS:.0f} s: torch or the driver hangs"
    last = (done.stderr.strip().splitlines() or [""])[-1]
    if done.returncode != 0:
        return f"torch cannot be used: {how_it_ended(done.returncode)}: {last}"
    try:
        found = json.loads(done.stdout.strip().splitlines()[-1])
    except (ValueError, IndexError):
        return f"torch gave no answer that can be read: {last}"
    return dict(found)


def forget() -> None:
    """Ask anew the next time."""
    _ask_torch.cache_clear()


def system_facts() -> dict[str, Any]:
    """What `torch.utils.collect_env` says of the system; nothing where torch cannot be asked."""
    try:
        return dict(probe()["system"])
    except ProbeFailed:
        return {}


def driver() -> Finding:
    """NVIDIA's driver."""
    facts = probe()
    version, models = (facts["system"][key] for key in ("nvidia_driver_version", "nvidia_gpu_models"))
    if version:
        found = f"NVIDIA {version}, for CUDA up to {facts['driver_cuda'] or 'unknown'}"
        return Finding("PASS", f"{found}: {', '.join(models.splitlines())}" if models else found)
    if facts["driver_failure"]:
        todo = "Load the driver (modprobe nvidia), or restart the machine if the driver was updated."
        return Finding("WARN", f"nvidia-smi fails: {facts['driver_failure']}", todo)
    if files := gpu_files():
        todo = "Install the driver's tools; start a container with --gpus all."
        return Finding("WARN", f"{', '.join(files)} exists, but nvidia-smi does not", todo)
    return Finding("PASS", "no NVIDIA driver and no NVIDIA GPU")


def torch_wheel() -> Finding:
    """Which torch this is, and whether it can use the GPU that is there."""
    try:
        facts = probe()
    except ProbeFailed as error:
        return Finding("FAIL", str(error), "Reinstall torch: pip install --force-reinstall torch")
    system = facts["system"]
    cuda, hip = system["cuda_compiled_version"], system["hip_compiled_version"]
    has_hip = hip not in (None, "N/A")
    kind = f"CUDA {cuda}" if cuda else f"ROCm {hip}" if has_hip else "CPU only"
    cudnn = f", cuDNN {facts['cudnn']}" if facts["cudnn"] else ""
    found = f"{system['torch_version']}, built for {kind}{cudnn}, {facts['threads']} threads"
    if system["nvidia_driver_version"] and not cuda:
        return Finding("WARN", f"{found}, so the GPU is not used", GET_TORCH)
    return Finding("PASS", found)


def gpus() -> Finding:
    """The GPUs that torch can use, and what torch complains of when it begins to use them."""
    facts = probe()
    complaints = " ".join(facts["cuda_complaints"])
    if not facts["devices"]:
        if facts["system"]["nvidia_driver_version"] or gpu_files():
            return Finding("WARN", f"torch cannot use a GPU: {complaints}", "See driver, torch and environment.")
        return Finding("PASS", "none; small models train on the CPU")
    parts, todo = [], [complaints] if complaints else []
    for index, device in enumerate(facts["devices"]):
        parts.append(
            f"{index}: {device['name']} (capability {device['capability']}, {format_bytes(device['free_bytes'])} free "
            f"of {format_bytes(device['total_bytes'])}{', bf16' if device['bf16'] else ', no bf16'})"
        )
        if device["free_bytes"] < 0.1 * device["total_bytes"]:
            todo.append(f"GPU {index} is nearly full: nvidia-smi says who uses it.")
    return Finding("WARN" if todo else "PASS", "; ".join(parts), " ".join(todo))


def products() -> Finding:
    """Products of two matrices in every number format on every device: whether they are right, and how fast."""
    found = probe()["products"]
    wrong = [one for one in found if not one["right"]]
    text = ", ".join(_speed(one) for one in found)
    if any(one["dtype"] == "fp32" or one["device"] != "cpu" for one in wrong):
        return Finding("FAIL", text, "Update the driver or reinstall torch, then try again.")
    if wrong:
        formats = ", ".join(one["dtype"] for one in wrong)
        return Finding("WARN", text, f"Keep train.dtype=fp32: {formats} does not work on this CPU.")
    return Finding("PASS", text)


def number_formats() -> Finding:
    """What decides about `dtype: auto` here. On a CPU that is each run's own steps; this is a layer alone."""
    facts = probe()["dtype"]
    if facts["device"] == "cuda":
        return Finding("PASS", facts["why"])
    return Finding(
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


def gpu_files() -> list[str]:
    """The device files of NVIDIA's GPUs, which a container has only where it was given them."""
    return sorted(str(path) for path in Path("/dev").glob("nvidia[0-9]*"))
