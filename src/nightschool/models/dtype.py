"""Which number format is fast here, by measurement.

bf16 products are 70 times slower than fp32 on a CPU without bf16 instructions and 7 times faster on one with matrix
tiles (both measured), and no flag tells the two apart reliably. So a few products are timed, once a process.
"""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import psutil
import torch
import torch.nn.functional as F  # noqa: N812

from nightschool.errors import ModelError

Wanted = Literal["auto", "fp32", "bf16", "fp16"]
_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
# bf16 rounds to 8 bits; on a CPU it has to be worth it. A whole model gains less than its layers do: measured with matrix
# tiles, 0.9 to 1.2 times where a layer of 128 gains 1.3 to 2.3, 1.3 to 1.5 where a layer of 256 gains 2.9 to 3.9. The limit
# lies between the two, so that noise does not decide.
_WORTH_IT = 2.5
_HOPELESS = 0.25


@dataclass(frozen=True)
class DtypeChoice:
    """How numbers are kept and computed, and why, in words for the plan.

    Parameters and the optimizer stay in `parameters`; matrix products run in `compute`. A resumed run takes the choice
    from its checkpoint, not from a new probe, because a probe may fall out differently on a busy machine.
    """

    parameters: torch.dtype
    compute: torch.dtype
    device_type: str
    why: str

    @property
    def needs_loss_scaling(self) -> bool:
        """fp16 gradients underflow unless the loss is scaled up before the backward pass."""
        return self.compute is torch.float16


def resolve_device(wanted: Literal["auto", "cpu", "cuda"] = "auto") -> torch.device:
    """The device that a recipe's `device` means here.

    Raises:
        ModelError: If a GPU is asked for and there is none.
    """
    if wanted == "cuda" and not torch.cuda.is_available():
        raise ModelError("device is cuda, and this machine has no usable GPU. Write device: cpu, or auto.")
    return torch.device("cuda" if wanted != "cpu" and torch.cuda.is_available() else "cpu")


def resolve_dtype(wanted: Wanted, device: torch.device | str = "cpu", *, hidden_size: int = 1024) -> DtypeChoice:
    """What a recipe's `dtype` means on `device` for a model of this width.

    `auto` takes bf16 on a GPU that has it, and on a CPU if a linear layer of this width, forward and backward, casts
    included, is at least 2.5 times as fast in it as in fp32; fp32 otherwise. fp16 is never chosen, only obeyed.
    """
    device = torch.device(device)
    if wanted != "auto":
        return DtypeChoice(torch.float32, _DTYPES[wanted], device.type, f"{wanted}, as the recipe says")
    if device.type == "cuda":
        if torch.cuda.is_bf16_supported(including_emulation=False):
            return DtypeChoice(torch.float32, torch.bfloat16, "cuda", "bf16, because this GPU computes it natively")
        return DtypeChoice(torch.float32, torch.float32, "cuda", "fp32, because this GPU has no native bf16")
    speedup = bf16_speedup(_width(hidden_size))
    compute = torch.bfloat16 if speedup >= _WORTH_IT else torch.float32
    verb = "is" if speedup >= 1 else "is only"
    why = f"a linear layer of width {_width(hidden_size)} in bf16 {verb} {speedup:.2g} times as fast as in fp32 on this CPU"
    return DtypeChoice(
        torch.float32, compute, "cpu", f"{'bf16' if compute is torch.bfloat16 else 'fp32'}, because {why}"
    )


def probe_dtype(device: torch.device | str, wanted: Wanted = "auto", *, hidden_size: int = 1024) -> torch.dtype:
    """The compute dtype of `resolve_dtype`."""
    return resolve_dtype(wanted, device, hidden_size=hidden_size).compute


@lru_cache
def bf16_speedup(width: int) -> float:
    """How many times faster a linear layer trains under bf16 autocast than in fp32 on this CPU, over 1,024 tokens.

    Takes 5 to 200 ms. Where bf16 is emulated, a layer of 128 on 32 tokens already tells, and nothing larger is tried.
    """
    with torch.enable_grad():
        small = _seconds(32, 128, bf16=False) / _seconds(32, 128, bf16=True)
        if small < _HOPELESS:
            return small
        return _seconds(1024, width, bf16=False) / _seconds(1024, width, bf16=True)


def _seconds(num_tokens: int, width: int, *, bf16: bool) -> float:
    """The best of several passes: the first ones pay for fresh pages and for choosing kernels."""
    x, weight = torch.zeros(num_tokens, width), torch.zeros(width, width, requires_grad=True)
    best = float("inf")
    for _ in range(6):
        start = time.perf_counter()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=bf16):
            out = F.linear(x, weight)
        torch.autograd.grad(out, weight, torch.ones_like(out))
        best = min(best, time.perf_counter() - start)
    return best


def num_threads_here() -> int:
    """CPU threads worth using: physical cores, as far as this process may use them."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(allowed, psutil.cpu_count(logical=False) or allowed))


def _width(hidden_size: int) -> int:
    """Widths fall into few classes, so that one process probes few times and a wide model costs no more."""
    return 128 if hidden_size < 192 else 256 if hidden_size < 384 else 512
