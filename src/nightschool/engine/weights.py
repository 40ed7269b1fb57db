"""Weights laid out for the few tokens of a decoding step.

A linear layer stores its weights [out, in]. To multiply a few rows with that, a CPU's library rearranges the weights at
every call, which costs as much as the product itself. Blocks [in, columns] that fit into a core's own cache need no
rearranging (measured, fp32, all layers of a model of 42 million weights, one thread, caches cold: 4 rows 18 ms against
28, 16 rows 25 against 33, 72 rows 42 against 54; 1 row 14.5 against 14). They are a second copy of the weights, beside
the one that is shared with the model that was loaded, so they have a limit, and they are made only where a measurement
on this machine says that they pay.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from functools import cache, partial
from itertools import accumulate

import torch
import torch.nn.functional as F  # noqa: N812 - the name under which everybody knows it
from torch import Tensor, nn

from nightschool.engine.compute import COMPUTE

# With 1 or 2 rows a product takes as long as reading the weights does, which the usual layout is best for; with very many
# the rearranging is a small part.
_FEWEST_ROWS, _MOST_ROWS = 3, 192
# Columns of a block: 512 by 256 numbers are half a megabyte.
_COLUMNS = 256
# Smaller layers, such as the routers of experts, are not worth it.
_LEAST_NUMBERS = 1 << 14
# What is measured: a step of this many rows over so many bytes of layers, which is more than a core's own cache, so that
# reading them is part of it; and by how much blocks have to be faster.
_MEASURED_ROWS = 16
_MEASURED_BYTES = 32 << 20
_WORTH_IT = 1.05


class BlockedLinear(nn.Module):
    """A linear layer that also keeps its weights in blocks [B, in, columns]."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.weight = linear.weight
        self.bias = linear.bias
        self._out = linear.weight.shape[0]
        columns = _columns(self._out)
        padded = F.pad(linear.weight.detach(), (0, 0, 0, -self._out % columns))
        self._blocks = padded.view(-1, columns, padded.shape[1]).transpose(1, 2).contiguous()
        # One batched product is one parallel region instead of one per block; with a single thread it is slower.
        self._is_batched = torch.get_num_threads() > 1

    def forward(self, x: Tensor) -> Tensor:
        """[…, in] → […, out]."""
        rows = x.numel() // x.shape[-1]
        if not _FEWEST_ROWS <= rows <= _MOST_ROWS:
            return F.linear(x, self.weight, self.bias)
        out_rc = self.product(x.reshape(rows, x.shape[-1]))
        if self.bias is not None:
            out_rc = out_rc + self.bias
        return out_rc.view(*x.shape[:-1], self._out)

    def product(self, x_rc: Tensor) -> Tensor:
        """[rows, in] → [rows, out] by the blocks, without bias."""
        count, _, columns = self._blocks.shape
        if count == 1:
            out = torch.mm(x_rc, self._blocks[0])
        elif self._is_batched:
            out = torch.matmul(x_rc, self._blocks).transpose(0, 1).reshape(x_rc.shape[0], count * columns)
        else:
            out = x_rc.new_empty(x_rc.shape[0], count * columns)
            for block, part in zip(self._blocks, torch.split(out, columns, dim=1), strict=True):
                torch.mm(x_rc, block, out=part)
        return out if count * columns == self._out else out[:, : self._out].contiguous()


def block_weights(model: nn.Module, limit_bytes: int) -> int:
    """Give the linear layers of `model` blocks where they pay; return the bytes that these take.

    Nothing is done if they would take more than `limit_bytes`, on other devices than CPUs, or in other formats than fp32.
    """
    layers = {
        name: module
        for name, module in model.named_modules()
        if type(module) is nn.Linear and module.weight.numel() >= _LEAST_NUMBERS
    }
    needed = sum(layer.weight.numel() * layer.weight.element_size() for layer in layers.values())
    if not layers or needed > limit_bytes:
        return 0
    if any(layer.weight.device.type != "cpu" or layer.weight.dtype != torch.float32 for layer in layers.values()):
        return 0
    if _speedup(_sample(list(layers.values())), torch.get_num_threads()) < _WORTH_IT:
        return 0
    for name, layer in layers.items():
        parent, _, attribute = name.rpartition(".")
        # Layer by layer, so that an engine which answers meanwhile waits for one layer and not for all.
        setattr(model.get_submodule(parent), attribute, COMPUTE.call(partial(BlockedLinear, layer)))
    return needed


def _columns(out: int) -> int:
    """Columns of a block: what divides `out` and is closest to `_COLUMNS`, so that nothing has to be filled up."""
    fitting = [columns for columns in range(_COLUMNS // 2, 2 * _COLUMNS + 1) if out % columns == 0]
    return min(fitting, key=lambda columns: abs(columns - _COLUMNS), default=min(_COLUMNS, out))


def _sample(layers: Sequence[nn.Linear]) -> tuple[tuple[int, int], ...]:
    """Shapes of the last layers, with the output head, which together make up the bytes to be measured."""
    sizes = accumulate(layer.weight.numel() * layer.weight.element_size() for layer in reversed(layers))
    count = next((count for count, size in enumerate(sizes, start=1) if size >= _MEASURED_BYTES), len(layers))
    return tuple((layer.in_features, layer.out_features) for layer in layers[-count:])


def _made(shape: tuple[int, int]) -> BlockedLinear:
    return BlockedLinear(nn.Linear(*shape, bias=False))


@cache
def _speedup(shapes: tuple[tuple[int, int], ...], num_threads: int) -> float:  # noqa: ARG001 - it depends on them
    """How many times faster blocks are here for layers of these shapes. Measured once a process."""
    layers = [COMPUTE.call(partial(_made, shape)) for shape in shapes]
    inputs = [torch.zeros(_MEASURED_ROWS, shape[0]) for shape in shapes]

    def seconds(multiply: Callable[[BlockedLinear, Tensor], Tensor]) -> float:
        started = time.perf_counter()
        for layer, x in zip(layers, inputs, strict=True):
            multiply(layer, x)
        return time.perf_counter() - started

    def both() -> tuple[float, float]:
        return seconds(lambda layer, x: F.linear(x, layer.weight)), seconds(lambda layer, x: layer.product(x))

    # One after the other, so that a busy moment of the machine hits both.
    pairs = [COMPUTE.call(both) for _ in range(7)]
    return statistics.median(usual / blocked for usual, blocked in pairs)
