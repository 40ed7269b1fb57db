"""How fast this device can multiply at best, so that a run can say which share of it is used."""

from __future__ import annotations

import re
import time
from functools import lru_cache

import torch

# Dense products without sparsity, in 10¹² floating-point operations a second, as the makers' data sheets state them.
_STATED_TERAFLOPS = {
    "B200": {torch.bfloat16: 2250.0, torch.float16: 2250.0},
    "H200": {torch.bfloat16: 989.0, torch.float16: 989.0},
    "H100 PCIe": {torch.bfloat16: 756.0, torch.float16: 756.0},
    "H100": {torch.bfloat16: 989.0, torch.float16: 989.0},
    "A100": {torch.bfloat16: 312.0, torch.float16: 312.0},
    "L40S": {torch.bfloat16: 362.0, torch.float16: 362.0},
    "L4": {torch.bfloat16: 121.0, torch.float16: 121.0},
    "A10": {torch.bfloat16: 125.0, torch.float16: 125.0},
    "RTX 4090": {torch.bfloat16: 165.0, torch.float16: 165.0},
    "RTX 3090": {torch.bfloat16: 71.0, torch.float16: 71.0},
    "T4": {torch.float16: 65.0},
}
_SIZES = {"cpu": (256, 1024), "cuda": (8192,)}
_ATTEMPTS = 5
# A format whose larger product would take longer is emulated: the smaller one has told, without seconds of fp16 on such a CPU.
_LONGEST_SECONDS = 0.2


def peak_flops(device: torch.device, dtype: torch.dtype) -> tuple[float, str]:
    """The best rate of products in floating-point operations a second, and where the figure comes from.

    For known GPUs it is the maker's; for others, and for CPUs, that of the fastest of a few products, as large as is quick.
    """
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        for known, stated in _STATED_TERAFLOPS.items():
            if re.search(rf"\b{known}\b", name):  # an L40 is no L4, and a T400 no T4
                if dtype in stated:
                    return stated[dtype] * 1e12, f"stated for {known}"
                break
    return _measured(device.type, dtype, torch.get_num_threads()), "the fastest of a few products"


@lru_cache
def _measured(device_type: str, dtype: torch.dtype, num_threads: int) -> float:  # noqa: ARG001 - it depends on them
    rate = float("inf")
    for size in _SIZES[device_type]:
        if 2 * size**3 / rate > _LONGEST_SECONDS:
            break
        a = torch.zeros(size, size, dtype=dtype, device=device_type)
        best = float("inf")
        with torch.no_grad():
            for _ in range(_ATTEMPTS):
                started = time.perf_counter()
                a @ a
                if device_type == "cuda":
                    torch.cuda.synchronize()
                best = min(best, time.perf_counter() - started)
        rate = 2 * size**3 / best
    return rate
