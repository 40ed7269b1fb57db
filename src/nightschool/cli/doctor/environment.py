"""Looks at the environment variables that change which devices, how many threads and which models are used."""

from __future__ import annotations

import os

import psutil

from nightschool.cli.doctor.finding import Finding

SHOWN = (
    "CUDA_VISIBLE_DEVICES",
    "CUDA_DEVICE_ORDER",
    "NVIDIA_VISIBLE_DEVICES",
    "NVIDIA_DRIVER_CAPABILITIES",
    "PYTORCH_ALLOC_CONF",
    "PYTORCH_CUDA_ALLOC_CONF",
    "HF_HOME",
    "HF_HUB_OFFLINE",
    "TOKENIZERS_PARALLELISM",
    "NIGHTSCHOOL_HOME",
)
SHOWN_PREFIXES = ("OMP_", "MKL_NUM", "MALLOC_", "NCCL_", "CUDA_LAUNCH")
# Of these only that they are set: their values are secrets, or hold them.
SECRET = (
    "DATABASE_URL",
    "GOOGLE_APPLICATION_CREDENTIALS",
    "AWS_ACCESS_KEY_ID",
    "AZURE_STORAGE_ACCOUNT_KEY",
    "HF_TOKEN",
)


def variables() -> Finding:
    """What is set, and what of it is wrong."""
    set_here = {
        name: value for name, value in sorted(os.environ.items()) if name in SHOWN or name.startswith(SHOWN_PREFIXES)
    }
    shown = [f"{name}={value}" for name, value in set_here.items()]
    shown += [f"{name} is set" for name in SECRET if os.environ.get(name)]
    problems = [*_threads(set_here), *_devices(set_here)]
    found = ", ".join(shown) or "nothing that matters is set"
    return Finding("WARN" if problems else "PASS", found, " ".join(problems))


def _threads(variables: dict[str, str]) -> list[str]:
    value, cores = variables.get("OMP_NUM_THREADS"), psutil.cpu_count() or 1
    if value is None:
        return []
    # A list gives the threads of each level of nesting.
    first = value.partition(",")[0].strip()
    if not first.isdecimal() or int(first) < 1:
        return [f"OMP_NUM_THREADS={value} is not a number of threads: unset it, or write 1 to {cores}."]
    if int(first) > cores:
        return [f"OMP_NUM_THREADS={value} is more than the {cores} cores here: lower it, or unset it."]
    return []


def _devices(variables: dict[str, str]) -> list[str]:
    problems = []
    visible = variables.get("CUDA_VISIBLE_DEVICES")
    if visible is not None and visible.strip() in ("", "-1", "none", "NoDevFiles"):
        problems.append(f"CUDA_VISIBLE_DEVICES={visible} hides every GPU: unset it to use them.")
    container = variables.get("NVIDIA_VISIBLE_DEVICES")
    if container is not None and container.strip() in ("", "none"):
        problems.append(
            f"NVIDIA_VISIBLE_DEVICES={container} keeps GPUs out of this container: start it with --gpus all."
        )
    if visible is not None and "," in visible and variables.get("CUDA_DEVICE_ORDER") != "PCI_BUS_ID":
        problems.append(
            "CUDA numbers GPUs by speed: set CUDA_DEVICE_ORDER=PCI_BUS_ID to number them as nvidia-smi does."
        )
    return problems
