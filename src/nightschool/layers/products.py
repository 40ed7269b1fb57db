"""Products with weights in fp32, by the library of torch's that uses the vectors of this machine.

Shapes: N rows, D columns of x, F rows of a weight.

torch multiplies fp32 with MKL, which takes vectors of 256 bits on processors that are not Intel's. oneDNN, which comes with torch
too, takes those of 512 bits where there are any (measured, AMD EPYC of family 26, 193 and 386 rows by 576 to 1,536 columns, one core:
112 and 240 GFLOPS). Both add up in fp32, in orders of their own.

oneDNN compiles for each shape, which takes about a millisecond, and would keep what it compiled for the last 1,024, 0.7 to 1 MB each. A
pass of a dense model has ten shapes at most, and the next one has another number of rows.
"""

from __future__ import annotations

import os
import platform
from functools import cache
from pathlib import Path

import torch
import torch.nn.functional as F  # noqa: N812 - the name under which everybody knows it
from torch import Tensor

_SHAPES_KEPT = 16
# Smaller weights are not worth compiling for: a pass of two layers of 64 to 128 columns took 2 ms longer, and one of ten layers of 256
# columns half the time, from 48 rows on.
_LEAST_NUMBERS = 1 << 14
# What oneDNN, and torch's layer above it, read when they multiply for the first time.
_LIMITS = ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY")


def linear(x_nd: Tensor, weight_fd: Tensor, bias_f: Tensor | None = None, *, out: Tensor | None = None) -> Tensor:
    """xWᵀ + b [N,F], in `out` if there is one. No gradient flows."""
    with torch.no_grad():
        if multiplies_wider(x_nd, weight_fd):
            product: Tensor = torch.ops.mkldnn._linear_pointwise(x_nd, weight_fd, bias_f, "none", [], "")
            return product if out is None else out.copy_(product)
        if out is None:
            return F.linear(x_nd, weight_fd, bias_f)
        if bias_f is None:
            return torch.mm(x_nd, weight_fd.T, out=out)
        return torch.addmm(bias_f, x_nd, weight_fd.T, out=out)


def multiplies_wider(x: Tensor, weight: Tensor) -> bool:
    """Whether oneDNN takes wider vectors for this product than MKL would."""
    is_plain = x.device.type == "cpu" and x.dtype == weight.dtype == torch.float32
    return is_plain and weight.numel() >= _LEAST_NUMBERS and _mkl_is_narrow()


@cache
def _mkl_is_narrow() -> bool:
    """Told from what the processor is and not from a measurement, so that a run that goes on has the bits that it began with."""
    has_both = torch.backends.mkl.is_available() and torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    # What torch's own compiler calls: no promise, so another version may lack it.
    has_both = has_both and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    is_narrow = has_both and torch.backends.cpu.get_cpu_capability() == "AVX512" and not _is_made_by_intel()
    if is_narrow:
        for limit in _LIMITS:
            os.environ.setdefault(limit, str(_SHAPES_KEPT))
    return is_narrow


def _is_made_by_intel() -> bool:
    try:
        return "GenuineIntel" in Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return "GenuineIntel" in platform.processor()
