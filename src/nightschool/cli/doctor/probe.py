"""`python -m nightschool.cli.doctor.probe`: what torch sees and computes here, as one JSON object on the last line.

In a process of its own, because a broken driver may hang or kill whoever asks it.
"""

from __future__ import annotations

import json
import math
import re
import shutil
import time
import warnings
from typing import Any

import torch
from torch import Tensor
from torch.utils.collect_env import get_env_info, run

from nightschool.jobs.processes import how_it_ended
from nightschool.models.dtype import bf16_speedup, num_threads_here, resolve_device, resolve_dtype

# The width of the products whose results are compared, and of those that are timed on a GPU.
WIDTH, GPU_WIDTH = 1000, 4096
# A format that is slower than this at the small width is emulated; the large width, 125 times as much, would take seconds.
SMALL_WIDTH, SLOW_SECONDS = 200, 0.01
MOST_PRODUCTS, ENOUGH_SECONDS = 5, 0.5
LAYER_WIDTH = 512
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
# The largest relative error of a product of normal numbers (Frobenius norm), several times what is measured.
TOLERANCE = {"fp32": 1e-4, "bf16": 2e-2, "fp16": 4e-3}
# GPUs may round fp32 to 10 bits first (TF32).
GPU_FP32_TOLERANCE = 5e-3


def main() -> None:
    """Print what was found."""
    complaints = start_cuda()
    facts: dict[str, Any] = {
        "system": get_env_info()._asdict(),  # type: ignore[no-untyped-call]
        **ask_driver(),
        "cuda_complaints": complaints,
        "cudnn": torch.backends.cudnn.version() if torch.cuda.is_available() else None,  # type: ignore[no-untyped-call]
        "threads": num_threads_here(),
        "devices": [_device(index) for index in range(torch.cuda.device_count())],
    }
    facts["products"] = [_product("cpu", name) for name in DTYPES]
    for index in range(len(facts["devices"])):
        facts["products"] += [_product(f"cuda:{index}", name) for name in DTYPES]
    device = resolve_device()
    if device.type == "cuda":
        facts["dtype"] = {"device": "cuda", "why": resolve_dtype("auto", device).why}
    else:
        facts["dtype"] = {"device": "cpu", "speedup": bf16_speedup(LAYER_WIDTH)}
    print(json.dumps(facts))


def start_cuda() -> list[str]:
    """What torch says when it begins to use the GPUs: that the driver is too old, or that it has no code for them."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            torch.cuda.init()  # type: ignore[no-untyped-call]
        except Exception as error:  # whatever it is, it is why no GPU can be used
            return [" ".join(str(error).split())]
    return [" ".join(str(one.message).split()) for one in caught]


def ask_driver() -> dict[str, Any]:
    """What collect_env does not say: the newest CUDA that the driver knows, and why nvidia-smi fails where it does."""
    if shutil.which("nvidia-smi") is None:
        return {"driver_cuda": None, "driver_failure": ""}
    code, said, complaint = run("nvidia-smi")  # type: ignore[no-untyped-call]
    found = re.search(r"CUDA(?: UMD)? Version: *([\d.]+)", said)
    failure = "" if code == 0 else (f"{said}\n{complaint}".strip().splitlines() or [how_it_ended(code)])[0]
    return {"driver_cuda": found[1] if found else None, "driver_failure": failure}


def _device(index: int) -> dict[str, Any]:
    facts = torch.cuda.get_device_properties(index)
    free, total = torch.cuda.mem_get_info(index)
    return {
        "name": facts.name,
        "capability": f"{facts.major}.{facts.minor}",
        "free_bytes": free,
        "total_bytes": total,
        "bf16": torch.cuda.is_bf16_supported(including_emulation=False),
    }


def _product(device: str, name: str) -> dict[str, Any]:
    """One product of two matrices on a device: its error against the same product in fp64, and its speed."""
    found: dict[str, Any] = {"device": device, "dtype": name}
    try:
        dtype, width = DTYPES[name], WIDTH
        if device == "cpu" and _seconds(*_pair(SMALL_WIDTH, dtype, device)) > SLOW_SECONDS:
            width = SMALL_WIDTH
        a, b = _pair(width, dtype, device)
        wanted = a.double().cpu() @ b.double().cpu()
        error = float(((a @ b).double().cpu() - wanted).norm() / wanted.norm())
        limit = GPU_FP32_TOLERANCE if device != "cpu" and name == "fp32" else TOLERANCE[name]
        right = math.isfinite(error) and error <= limit
        if device != "cpu":
            width = GPU_WIDTH
            a, b = _pair(width, dtype, device)
        seconds = _seconds(a, b)
        return found | {
            "width": width,
            "error": error if math.isfinite(error) else None,
            "right": right,
            "seconds": seconds,
            "flops": 2 * width**3 / seconds,
        }
    except Exception as error:  # whatever the driver says is what the user has to know
        return found | {"right": False, "failure": f"{type(error).__name__}: {error}".splitlines()[0]}


def _pair(width: int, dtype: torch.dtype, device: str) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(width, width, generator=generator) for _ in range(2))
    return a.to(device, dtype), b.to(device, dtype)


def _seconds(a: Tensor, b: Tensor) -> float:
    """The best of several products, each awaited; of fewer where they take long."""
    taken: list[float] = []
    while len(taken) < MOST_PRODUCTS and sum(taken) < ENOUGH_SECONDS:
        started = time.perf_counter()
        a @ b
        if a.device.type == "cuda":
            torch.cuda.synchronize(a.device)
        taken.append(time.perf_counter() - started)
    return min(taken)


if __name__ == "__main__":
    main()
