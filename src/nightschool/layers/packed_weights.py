"""A matrix in 4 or 8 bits, by bitsandbytes: 4 bits in blocks of 64, or 8 bits with a scale for each row.

Shapes: B blocks of a matrix. What is written for one matrix also holds for several in a row, whose tensors have their number in front.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from typing import Any, cast

import torch
from torch import Tensor

_BLOCK, _BLOCK_OF_SCALES = 64, 256


class Packing:
    """A way of packing, by its name such as `nf4-double`.

    Scales are, of 8 bits, `absmax` of each row; of 4 bits `absmax` of each block, which are codes themselves where they are
    quantised again (`double`), with `offset` and `scale_of_scales`. `code` and `code_of_scales` are tables of what codes stand
    for, the same for all matrices.
    """

    def __init__(self, label: str) -> None:
        self.kind, _, double = label.partition("-")
        self.is_double = bool(double)

    def pack(self, weight_oi: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """The codes, flat, and the scales and tables."""
        if self.kind == "int8":
            absmax_o = weight_oi.float().abs().amax(-1).clamp_min(torch.finfo(torch.float32).tiny) / 127
            codes = torch.round(weight_oi.float() / absmax_o[:, None]).to(torch.int8)
            return codes.view(torch.uint8).flatten(), {"absmax": absmax_o}
        codes, state = _functional().quantize_4bit(
            weight_oi, blocksize=_BLOCK, compress_statistics=self.is_double, quant_type=self.kind
        )
        scales = {"absmax": state.absmax, "code": state.code}
        if self.is_double:
            scales |= {"offset": state.offset, "scale_of_scales": state.state2.absmax}
            scales["code_of_scales"] = state.state2.code
        return codes.flatten(), scales

    @staticmethod
    def is_table(name: str) -> bool:
        """Whether this part is the same for all matrices."""
        return name.startswith("code")

    def whole_scales(self, parts: Mapping[str, Tensor], dtype: torch.dtype) -> Tensor:
        """A scale for each row of 8 bits [out], in the format of products; for each block of 4 bits [B]."""
        absmax = parts["absmax"]
        if self.kind == "int8":
            return absmax.to(dtype)
        if not self.is_double:
            return absmax
        of_blocks = parts["scale_of_scales"].repeat_interleave(_BLOCK_OF_SCALES, dim=-1)[..., : absmax.shape[-1]]
        return parts["code_of_scales"][absmax.long()] * of_blocks + parts["offset"][..., None]

    def unpack(
        self, codes: Tensor, whole_scales: Tensor, table: Tensor | None, shape: torch.Size, dtype: torch.dtype
    ) -> Tensor:
        """The matrix [out, in] that the codes of one stand for."""
        if self.kind == "int8":
            return codes.view(torch.int8).view(shape).to(dtype).mul_(whole_scales[:, None])
        functional = _functional()
        state = functional.QuantState(
            absmax=whole_scales, shape=shape, code=table, blocksize=_BLOCK, quant_type=self.kind, dtype=dtype
        )
        return cast(Tensor, functional.dequantize_4bit(codes.view(-1, 1), state))


def _functional() -> Any:
    return import_module("bitsandbytes.functional")
