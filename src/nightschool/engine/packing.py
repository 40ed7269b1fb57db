"""Finds formats of few bits that hold fp32 weights exactly, in the weights themselves.

Files of 4 or 8 bits a weight are read back into fp32, and 16-bit models are served in fp32 on a CPU, but the numbers
still are the few that the narrow format knows. So it does not matter where weights come from: a format is tried on them,
and it is taken if it gives back every one of them, equal as a number. One that does not ends the attempt.

A weight [out, in] is packed as words [out / 16, in / 32, words, 16] of 32 bits: 16 rows side by side, and 32 columns in
turn, first their codes, then what turns those into numbers. `engine.kernels` multiplies with it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
import torch.nn.functional as F  # noqa: N812 - the name under which everybody knows it
from torch import Tensor

# Columns that share their parameters, as in Q4_0, Q4_1, Q5_0 and Q8_0 of GGUF; and rows that are multiplied at once.
GROUP, LANES = 32, 16
# Numbers that are packed at once: so few that torch uses one thread for them, and a core's own cache holds them.
_CHUNK = 1 << 15
# A small number that this is added to and subtracted from is rounded. `round` would wake the other threads.
_ROUNDING = 1.5 * 2**23
# Groups on which a format is tried before anything else is done.
_TRIED = 8

Meaning = Literal["affine", "scaled", "bf16", "fp16"]
# Groups [n, 32] → their codes as bytes, and words of parameters [n, P] (int32); None if they are not held exactly.
Encoder = Callable[[Tensor], tuple[Tensor, Tensor] | None]


@dataclass(frozen=True)
class Format:
    """Codes of `bits` bits; `num_parameters` words belong to the 32 of a group.

    Args:
        meaning: A weight is step × code + low (affine), step × code (scaled; signed), or the upper half of an fp32 or
            an fp16 number.
        halves: Whether step and low are fp16 in one word, instead of fp32 in two.
    """

    name: str
    bits: int
    meaning: Meaning
    num_parameters: int = 0
    halves: bool = False

    @property
    def words(self) -> int:
        """Of a group and a row."""
        return self.bits * GROUP // 32 + self.num_parameters


@dataclass(frozen=True, eq=False)
class Packed:
    """A weight [out, in] in a narrow format."""

    format: Format
    words: Tensor
    shape: tuple[int, int]

    @property
    def nbytes(self) -> int:
        return self.words.numel() * self.words.element_size()


def pack(weight: Tensor) -> Packed | None:
    """`weight` [out, in] (fp32) in the narrowest format that holds it exactly; None if there is no such."""
    if weight.shape[1] % GROUP:
        return None
    for format_, encode in _ENCODERS.items():
        words = _packed(weight.detach(), format_, encode)
        if words is not None:
            return Packed(format_, words, (weight.shape[0], weight.shape[1]))
    return None


def as_packed(weight: Tensor, format_name: str, words: Tensor) -> Packed | None:
    """`words` as those of `weight`, if they have its form and its first rows; a kernel would read beyond others."""
    for format_, encode in _ENCODERS.items():
        if format_.name == format_name and not weight.shape[1] % GROUP:
            out, columns = weight.shape
            first = _packed(weight[:LANES].detach(), format_, encode)
            shape = (-(-out // LANES), columns // GROUP, format_.words, LANES)
            if first is not None and words.shape == shape and torch.equal(words[:1], first):
                return Packed(format_, words.contiguous(), (out, columns))
    return None


def _packed(weight: Tensor, format_: Format, encode: Encoder) -> Tensor | None:
    if encode(weight[0].view(-1, GROUP)[:_TRIED]) is None:
        return None
    out, columns = weight.shape
    tiles, groups = -(-out // LANES), columns // GROUP
    packed = torch.empty(tiles, groups, format_.words, LANES, dtype=torch.int32)
    for first, rows in _chunks(weight):
        encoded = encode(rows.view(-1, GROUP))
        if encoded is None:
            return None
        codes, parameters = encoded
        words = torch.cat([codes.view(torch.int32), parameters], dim=1).view(-1, LANES, groups, format_.words)
        packed[first : first + len(words)] = words.permute(0, 2, 3, 1)
    return packed


def _chunks(weight: Tensor) -> Iterator[tuple[int, Tensor]]:
    """Whole tiles of rows, the last one filled up with zeros, each with the number of its first tile."""
    size = max(1, _CHUNK // (weight.shape[1] * LANES)) * LANES
    for start in range(0, len(weight), size):
        rows = weight[start : start + size]
        yield start // LANES, F.pad(rows, (0, 0, 0, -len(rows) % LANES))


def _affine(groups: Tensor, *, halves: bool) -> tuple[Tensor, Tensor] | None:
    """If every group has 16 evenly spaced values at most; with `halves`, if fp16 holds their least and their distance."""
    low, high = groups.amin(1, keepdim=True), groups.amax(1, keepdim=True)
    if halves and not torch.equal(low.half().float(), low):
        return None

    def tried(part: Tensor | slice, most: int) -> tuple[Tensor, Tensor, Tensor]:
        step = (high[part] - low[part]) / most
        step = step.half().float() if halves else step
        return step, *_codes(groups[part], step, low[part], torch.float32 if halves else torch.float64)

    # The code of the largest is 15 in nearly all groups; the others are tried for the rest.
    step, codes, is_exact = tried(slice(None), 15)
    for most in range(14, 0, -1):
        left = (~is_exact).nonzero()[:, 0]
        if not len(left):
            break
        step[left], codes[left], is_exact[left] = tried(left, most)
    if not bool(is_exact.all()):
        return None
    nibbles = codes.to(torch.uint8)
    parameters = torch.cat([step, low], dim=1)
    return nibbles[:, ::2] | nibbles[:, 1::2] << 4, (parameters.half() if halves else parameters).view(torch.int32)


def _scaled(groups: Tensor) -> tuple[Tensor, Tensor] | None:
    largest = groups.abs().amax(1, keepdim=True)
    # The code of the largest is 127 in Q8_0 and 16 in Q5_0.
    for most in (127, 16):
        step = largest / most
        codes, is_exact = _codes(groups, step, torch.zeros_like(step), torch.float64)
        if bool(is_exact.all()):
            return codes.to(torch.int8), step.view(torch.int32)
    return None


def _codes(groups: Tensor, step: Tensor, low: Tensor, compared: torch.dtype) -> tuple[Tensor, Tensor]:
    """Codes [n, 32], and of which groups [n] a kernel gets every weight of step × code + low, rounded once to fp32.

    Rounding it twice, to fp64 and then to fp32, is the same if step is an fp16 number, as fp32 holds the product then.
    """
    codes = (groups - low).div_(torch.where(step == 0, 1, step)).add_(_ROUNDING).sub_(_ROUNDING)
    back = torch.addcmul(low.double(), codes.double(), step.double())
    return codes, (back.to(compared) == groups).all(1)


def _bf16(groups: Tensor) -> tuple[Tensor, Tensor] | None:
    lower, upper = groups.view(torch.int16).view(-1, GROUP, 2).unbind(-1)
    return (upper.contiguous(), _no_parameters(groups)) if not bool(lower.any()) else None


def _fp16(groups: Tensor) -> tuple[Tensor, Tensor] | None:
    halves = groups.half()
    return (halves, _no_parameters(groups)) if torch.equal(halves.float(), groups) else None


def _no_parameters(groups: Tensor) -> Tensor:
    return torch.empty(len(groups), 0, dtype=torch.int32)


# The narrowest first.
_ENCODERS: dict[Format, Encoder] = {
    Format("4-bit", 4, "affine", 1, halves=True): partial(_affine, halves=True),
    Format("4-bit with fp32 scales", 4, "affine", 2): partial(_affine, halves=False),
    Format("8-bit", 8, "scaled", 1): _scaled,
    Format("bf16", 16, "bf16"): _bf16,
    Format("fp16", 16, "fp16"): _fp16,
}
