"""The weights of frozen experts in 4 or 8 bits, unpacked one expert at a time.

Each expert is quantised by itself, as a linear layer of its own would be; see `layers.packed_weights`.

Shapes: N experts, B blocks of an expert.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from nightschool.layers.packed_weights import Packing


class PackedExperts(nn.Module):
    """How the weight [N, out, in] of all experts of a layer is packed; the codes themselves are the experts' parameter [N, bytes].

    `dtype` is that of products. Scales are buffers, one row for each expert, and so are the tables of codes, once.
    """

    def __init__(self, label: str, shape: torch.Size, dtype: torch.dtype) -> None:
        super().__init__()
        self.packing = Packing(label)
        self.shape, self.dtype = shape, dtype

    def pack(self, weight_noi: Tensor) -> nn.Parameter:
        """Quantise the weight of each expert: its codes [N, bytes], which know the shape that they stand for."""
        packed = [self.packing.pack(weight_oi.contiguous()) for weight_oi in weight_noi]
        for name in packed[0][1]:
            parts = [scales[name] for _, scales in packed]
            # Persistent, because transformers fills others anew when a model is loaded.
            self.register_buffer(name, parts[0].clone() if self.packing.is_table(name) else torch.stack(parts))
        codes = nn.Parameter(torch.stack([codes for codes, _ in packed]), requires_grad=False)
        codes.stands_for = self.shape  # type: ignore[attr-defined]
        return codes

    def unpacking(self, codes_nb: Tensor) -> Callable[[int], Tensor]:
        """What gives the weight [out, in] of an expert by its number; the scales of all of them are made ready once."""
        parts = dict(self.named_buffers())
        scales, table = self.packing.whole_scales(parts, self.dtype), parts.get("code")

        def unpack(expert: int) -> Tensor:
            return self.packing.unpack(codes_nb[expert], scales[expert], table, self.shape[1:], self.dtype)

        return unpack

    def unpack(self, codes_nb: Tensor, expert: int) -> Tensor:
        """The weight [out, in] of one expert."""
        return self.unpacking(codes_nb)(expert)

    def unpack_all(self, codes_nb: Tensor) -> Tensor:
        """The weight [N, out, in]."""
        return torch.stack([*map(self.unpacking(codes_nb), range(self.shape[0]))])
