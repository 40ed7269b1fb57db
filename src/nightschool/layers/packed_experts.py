"""The weights of frozen experts in 4 or 8 bits, unpacked one expert at a time, by bitsandbytes.

Each expert is quantised by itself, as a linear layer of its own would be: 4 bits in blocks of 64, or 8 bits with a scale for each row.

Shapes: N experts, B blocks of an expert.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any, cast

import torch
from torch import Tensor, nn

_BLOCK, _BLOCK_OF_SCALES = 64, 256


class PackedExperts(nn.Module):
    """How the weight [N, out, in] of all experts of a layer is packed; the codes themselves are the experts' parameter [N, bytes].

    `dtype` is that of products. Scales are buffers: of 8 bits one for each row; of 4 bits one for each block, which are
    codes themselves where they are quantised again (`is_double`).
    """

    absmax: Tensor
    code: Tensor
    scale_of_scales: Tensor
    code_of_scales: Tensor
    offset: Tensor

    def __init__(self, label: str, shape: torch.Size, dtype: torch.dtype) -> None:
        super().__init__()
        self.kind, _, double = label.partition("-")
        self.is_double = bool(double)
        self.shape, self.dtype = shape, dtype

    def pack(self, weight_noi: Tensor) -> nn.Parameter:
        """Quantise the weight of each expert: its codes [N, bytes], which know the shape that they stand for."""
        packed = [self._pack_one(weight_oi.contiguous()) for weight_oi in weight_noi]
        for name in packed[0][1]:
            shared = name.startswith("code")
            parts = [scales[name] for _, scales in packed]
            # Persistent, because transformers fills others anew when a model is loaded.
            self.register_buffer(name, parts[0].clone() if shared else torch.stack(parts))
        codes = nn.Parameter(torch.stack([codes.flatten() for codes, _ in packed]), requires_grad=False)
        codes.stands_for = self.shape  # type: ignore[attr-defined]
        return codes

    def _pack_one(self, weight_oi: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        if self.kind == "int8":
            absmax_o = weight_oi.float().abs().amax(-1).clamp_min(torch.finfo(torch.float32).tiny) / 127
            codes = torch.round(weight_oi.float() / absmax_o[:, None]).to(torch.int8)
            return codes.view(torch.uint8), {"absmax": absmax_o}
        codes, state = _functional().quantize_4bit(
            weight_oi, blocksize=_BLOCK, compress_statistics=self.is_double, quant_type=self.kind
        )
        scales = {"absmax": state.absmax, "code": state.code}
        if self.is_double:
            scales |= {"offset": state.offset, "scale_of_scales": state.state2.absmax}
            scales["code_of_scales"] = state.state2.code
        return codes, scales

    def unpacking(self, codes_nb: Tensor) -> Callable[[int], Tensor]:
        """What gives the weight [out, in] of an expert by its number; the scales of all of them are made ready once."""
        shape, scales = self.shape[1:], self._scales()
        functional: Any = None if self.kind == "int8" else _functional()

        def unpack(expert: int) -> Tensor:
            codes = codes_nb[expert]
            if self.kind == "int8":
                return codes.view(torch.int8).view(shape).to(self.dtype).mul_(scales[expert][:, None])
            state = functional.QuantState(
                absmax=scales[expert],
                shape=shape,
                code=self.code,
                blocksize=_BLOCK,
                quant_type=self.kind,
                dtype=self.dtype,
            )
            return cast(Tensor, functional.dequantize_4bit(codes.view(-1, 1), state))

        return unpack

    def _scales(self) -> Tensor:
        """A scale for each row of 8 bits [N, out], for each block of 4 bits [N, B]."""
        if self.kind == "int8":
            return self.absmax.to(self.dtype)
        if not self.is_double:
            return self.absmax
        of_blocks = self.scale_of_scales.repeat_interleave(_BLOCK_OF_SCALES, dim=1)[:, : self.absmax.shape[1]]
        return self.code_of_scales[self.absmax.long()] * of_blocks + self.offset[:, None]

    def unpack(self, codes_nb: Tensor, expert: int) -> Tensor:
        """The weight [out, in] of one expert."""
        return self.unpacking(codes_nb)(expert)

    def unpack_all(self, codes_nb: Tensor) -> Tensor:
        """The weight [N, out, in]."""
        return torch.stack([*map(self.unpacking(codes_nb), range(self.shape[0]))])


def _functional() -> Any:
    return import_module("bitsandbytes.functional")
