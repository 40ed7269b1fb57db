"""Weights laid out for the few tokens of a decoding step.

A linear layer stores its weights [out, in] in fp32. To multiply one row with that takes as long as reading it does, and
for a few rows a CPU's library rearranges the weights at every call, which costs as much as the product itself. So a layer
may keep its weights in a second layout, too, which gives the same products up to the order of the sums:

- packed: in the narrowest format that holds them exactly (`engine.packing`), multiplied by a kernel (`engine.kernels`);
- in blocks [in, columns] that fit into a core's own cache and need no rearranging.

Second layouts lie beside the weights that are shared with the model that was loaded, so they have a limit; and they are
used only for as many rows as a measurement on this machine says that they pay for.
"""

from __future__ import annotations

import statistics
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import Protocol

import torch
import torch.nn.functional as F  # noqa: N812 - the name under which everybody knows it
from torch import Tensor, nn

from nightschool.engine import kernels, packed_cache
from nightschool.engine.compute import COMPUTE
from nightschool.engine.packing import Packed, as_packed, pack

PLAIN, BLOCKS = "fp32", "fp32 in blocks"
# Rows with which the layouts are measured, and up to how many rows the fastest is used then. With more, rearranging is a
# small part of the work.
_ROWS = {1: 2, 4: 8, 16: 32, 64: 192}
# Columns of a block: 512 by 256 numbers are half a megabyte.
_COLUMNS = 256
# Smaller layers, such as the routers of experts, are not worth it.
_LEAST_NUMBERS = 1 << 14
# What is measured: layers of so many bytes in fp32, and what is read before, so that none of them is in a cache, as in a
# real step; how often; and by how much a layout has to be faster than one that takes less memory.
_MEASURED_BYTES = 32 << 20
_EVICTING_BYTES = 64 << 20
_ROUNDS = 3
_WORTH_IT = 1.05


class Layout(Protocol):
    """The weights of a layer in a certain order, and the product with them."""

    name: str
    nbytes: int

    def product(self, x_rc: Tensor) -> Tensor:
        """[rows, in] → [rows, out]."""
        ...


class Plain:
    """The weights as they are stored."""

    name, nbytes = PLAIN, 0

    def __init__(self, weight: Tensor) -> None:
        self._weight = weight

    def product(self, x_rc: Tensor) -> Tensor:
        return F.linear(x_rc, self._weight)


class Narrow:
    """Codes of few bits."""

    def __init__(self, packed: Packed) -> None:
        self.name, self.nbytes = packed.format.name, packed.nbytes
        self._packed = packed
        self._kernel = kernels.kernel(packed.format)

    def product(self, x_rc: Tensor) -> Tensor:
        return self._kernel(x_rc, self._packed)


class Blocks:
    """Blocks [B, in, columns]."""

    name = BLOCKS

    def __init__(self, weight: Tensor) -> None:
        self._out = weight.shape[0]
        columns = _columns(self._out)
        padded = F.pad(weight.detach(), (0, 0, 0, -self._out % columns))
        self._blocks = padded.view(-1, columns, padded.shape[1]).transpose(1, 2).contiguous()
        self.nbytes = self._blocks.numel() * self._blocks.element_size()
        # One batched product is one parallel region instead of one per block; with a single thread it is slower.
        self._is_batched = torch.get_num_threads() > 1

    def product(self, x_rc: Tensor) -> Tensor:
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


class LaidOutLinear(nn.Module):
    """A linear layer that keeps its weights in further layouts.

    Args:
        linear: Whose weights and bias are shared.
        layouts: The fastest, in the order of `_ROWS`.
    """

    def __init__(self, linear: nn.Linear, layouts: Sequence[Layout]) -> None:
        super().__init__()
        self.weight = linear.weight
        self.bias = linear.bias
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.layouts = list(zip(_ROWS.values(), layouts, strict=True))

    def forward(self, x: Tensor) -> Tensor:
        """[…, in] → […, out]."""
        rows = x.numel() // x.shape[-1]
        layout = next((layout for most, layout in self.layouts if rows <= most), None)
        if layout is None or layout.name == PLAIN:
            return F.linear(x, self.weight, self.bias)
        out_rc = layout.product(x.reshape(rows, x.shape[-1]))
        if self.bias is not None:
            out_rc = out_rc + self.bias
        return out_rc.view(*x.shape[:-1], -1)


def lay_out(model: nn.Module, limit_bytes: int, *, packed_folder: Path | None = None) -> dict[str, int]:
    """Give the linear layers of `model` further layouts where they pay; return how many layers have each of them.

    All of them together take `limit_bytes` at most. Nothing is done on other devices than CPUs, or in other formats than
    fp32. What was packed is kept in `packed_folder` for the next load. Packing goes on beside an engine that answers meanwhile, on this thread alone; what several threads do, is done on
    its thread, layer by layer, so that it waits for one layer and not for all.
    """
    layers = {
        name: module
        for name, module in model.named_modules()
        if type(module) is nn.Linear and module.weight.numel() >= _LEAST_NUMBERS
    }
    if any(layer.weight.device.type != "cpu" or layer.weight.dtype != torch.float32 for layer in layers.values()):
        return {}
    packed = _packed_within(layers, limit_bytes, packed_folder) if kernels.is_available() else {}
    narrow = {name: Narrow(one) for name, one in packed.items()}
    limit_bytes -= sum(one.nbytes for one in packed.values())
    kinds: dict[str, list[str]] = {}
    for name in layers:
        kinds.setdefault(narrow[name].name if name in narrow else PLAIN, []).append(name)
    counts: Counter[str] = Counter()
    for kind, names in kinds.items():
        alike = {name: (layers[name], narrow.get(name)) for name in names}
        needed = sum(4 * layer.weight.numel() for layer, _ in alike.values())
        fastest = _fastest(kind, list(alike.values()), with_blocks=needed <= limit_bytes)
        if set(fastest) == {PLAIN}:
            continue
        limit_bytes -= needed if BLOCKS in fastest else 0
        for name, (layer, codes) in alike.items():
            parent, _, attribute = name.rpartition(".")
            laid_out = COMPUTE.call(partial(_laid_out, layer, codes, fastest))
            setattr(model.get_submodule(parent), attribute, laid_out)
        counts.update(dict.fromkeys(set(fastest) - {PLAIN}, len(names)))
    return dict(counts)


def _packed_within(layers: Mapping[str, nn.Linear], limit_bytes: int, folder: Path | None) -> dict[str, Packed]:
    """What narrow formats hold exactly, as far as it fits, from the folder or made now."""
    kept = packed_cache.read(folder) if folder is not None else {}
    packed: dict[str, Packed] = {}
    made = False
    for name, layer in layers.items():
        known = as_packed(layer.weight, *kept[name]) if name in kept else None
        one = known or pack(layer.weight)
        if one is not None and one.nbytes <= limit_bytes:
            packed[name] = one
            limit_bytes -= one.nbytes
            made = made or known is None
    if folder is not None and made:
        packed_cache.write(folder, packed)
    return packed


def _laid_out(layer: nn.Linear, narrow: Narrow | None, names: Sequence[str]) -> LaidOutLinear:
    made = _candidates(layer, narrow, with_blocks=BLOCKS in names)
    return LaidOutLinear(layer, [made[name] for name in names])


def _candidates(layer: nn.Linear, narrow: Narrow | None, *, with_blocks: bool) -> dict[str, Layout]:
    """By name, that which takes the least memory first."""
    made: list[Layout] = [Plain(layer.weight)]
    if narrow is not None:
        made.append(narrow)
    if with_blocks:
        made.append(Blocks(layer.weight))
    return {layout.name: layout for layout in made}


def _columns(out: int) -> int:
    """Columns of a block: what divides `out` and is closest to `_COLUMNS`, so that nothing has to be filled up."""
    fitting = [columns for columns in range(_COLUMNS // 2, 2 * _COLUMNS + 1) if out % columns == 0]
    return min(fitting, key=lambda columns: abs(columns - _COLUMNS), default=min(_COLUMNS, out))


# By the kind of weights, whether blocks were tried, the shapes and the number of threads.
_MEASURED: dict[tuple[str, bool, tuple[tuple[int, int], ...], int], list[str]] = {}


def _fastest(kind: str, layers: Sequence[tuple[nn.Linear, Narrow | None]], *, with_blocks: bool) -> list[str]:
    """The name of the fastest layout here, in the order of `_ROWS`. Measured once a process for layers of these shapes."""
    sizes = accumulate(4 * layer.weight.numel() for layer, _ in reversed(layers))
    count = next((count for count, size in enumerate(sizes, start=1) if size >= _MEASURED_BYTES), len(layers))
    sample = layers[-count:]
    shapes = tuple((layer.in_features, layer.out_features) for layer, _ in sample)
    key = (kind, with_blocks, shapes, torch.get_num_threads())
    if key not in _MEASURED:
        made = [COMPUTE.call(partial(_candidates, layer, narrow, with_blocks=with_blocks)) for layer, narrow in sample]
        contestants = {name: [of_layer[name] for of_layer in made] for name in made[0]}
        # Made once: to map so much memory takes longer than what is measured.
        others = COMPUTE.call(lambda: torch.ones(_EVICTING_BYTES // 4)) if len(contestants) > 1 else torch.ones(0)
        _MEASURED[key] = [_fastest_with(rows, shapes, others, contestants) for rows in _ROWS]
    return _MEASURED[key]


def _fastest_with(
    rows: int, shapes: Sequence[tuple[int, int]], others: Tensor, contestants: dict[str, list[Layout]]
) -> str:
    if len(contestants) == 1:
        return PLAIN
    inputs = [torch.zeros(rows, columns) for columns, _ in shapes]
    # In turn, so that a busy moment of the machine hits all.
    rounds = [COMPUTE.call(partial(_round, inputs, others, contestants)) for _ in range(_ROUNDS)]
    best, best_speedup = PLAIN, 1.0
    for name in contestants:
        speedup = statistics.median(seconds[PLAIN] / seconds[name] for seconds in rounds)
        if speedup >= best_speedup * _WORTH_IT:
            best, best_speedup = name, speedup
    return best


def _round(inputs: Sequence[Tensor], others: Tensor, contestants: dict[str, list[Layout]]) -> dict[str, float]:
    """Seconds that each of the layouts takes for all layers of the sample; `others` are read before each."""

    def seconds(multiply: Sequence[Callable[[Tensor], Tensor]]) -> float:
        others.sum()
        started = time.perf_counter()
        for product, x in zip(multiply, inputs, strict=True):
            product(x)
        return time.perf_counter() - started

    return {name: seconds([layout.product for layout in layouts]) for name, layouts in contestants.items()}
