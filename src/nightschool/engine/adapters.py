"""Adapters that are served unmerged: many of them on one base, in one step.

A linear layer that an adapter reaches is wrapped, whatever it is (plain, or with further layouts; see `engine.weights`). It computes
all rows of a step at once, and then adds to the rows of each adapter what its two factors give. Rows without an adapter
are not touched, so their numbers are those of the base, bit for bit; a layer that no adapter reaches any more is
unwrapped, so that a base alone is as fast as ever.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from nightschool.engine.step_context import StepContext
from nightschool.engine.weights import LaidOutLinear
from nightschool.models.unmerged import LoraWeights, NeedsMerging

# The number of an adapter with its rows.
Segment = tuple[int, slice | Tensor]


class AdapterLinear(nn.Module):
    """A linear layer with the factors [in, r] and [r, out] of every adapter that reaches it."""

    def __init__(self, layer: nn.Module, table: AdapterTable) -> None:
        super().__init__()
        self.layer = layer
        self.factors: dict[int, tuple[Tensor, Tensor]] = {}
        # Not a module of this one: it belongs to the model.
        object.__setattr__(self, "_table", table)

    @property
    def weight(self) -> Tensor:
        """Of the base, [out, in]."""
        return self.layer.weight  # type: ignore[return-value]

    @property
    def bias(self) -> Tensor | None:
        """Of the base, [out]."""
        return self.layer.bias  # type: ignore[return-value]

    def forward(self, x: Tensor) -> Tensor:
        """[…, in] → […, out]."""
        out: Tensor = self.layer(x)
        table: AdapterTable = self._table  # type: ignore[assignment]
        if table.is_idle:
            return out
        x_rc, out_rc = x.reshape(-1, x.shape[-1]), out.view(-1, out.shape[-1])
        for number, rows in table.segments(len(x_rc)):
            factors = self.factors.get(number)
            if factors is None:
                continue
            down, up = factors
            if isinstance(rows, slice):
                out_rc[rows].addmm_(x_rc[rows] @ down, up)
            else:
                out_rc.index_add_(0, rows, (x_rc.index_select(0, rows) @ down) @ up)
        return out


class AdapterTable:
    """The adapters of one model. Only the thread that runs the model may call it.

    Args:
        model: Its linear layers are wrapped where an adapter reaches them, and unwrapped when none does any more.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._layers: dict[str, AdapterLinear] = {}
        self._numbers = itertools.count(1)
        self._segments: dict[int, list[Segment]] = {}
        self.is_idle = True

    def add(self, weights: LoraWeights) -> int:
        """Take an adapter in; returns its number.

        Raises:
            NeedsMerging: If one of its layers is not a linear layer of this model or has another shape. Nothing was changed.
        """
        for path, (down, up) in weights.factors.items():
            layer = self._layer(path)
            if tuple(layer.weight.shape) != (up.shape[1], down.shape[0]):
                raise NeedsMerging(
                    f"its factors of {path} make [{up.shape[1]}, {down.shape[0]}], and the layer is {list(layer.weight.shape)}"
                )
        number = next(self._numbers)
        for path, (down, up) in weights.factors.items():
            layer = self._layers.get(path) or self._wrapped(path)
            layer.factors[number] = down.to(layer.weight), up.to(layer.weight)
        return number

    def remove(self, number: int) -> None:
        """Let an adapter go."""
        for path, layer in list(self._layers.items()):
            layer.factors.pop(number, None)
            if not layer.factors:
                self._replace(path, layer.layer)
                del self._layers[path]

    def begin(self, context: StepContext | None, wanted: Sequence[int] | None) -> None:
        """Say whose the tokens of the next step are, and of which of them logits are wanted (None: of all)."""
        self._segments = {}
        self.is_idle = context is None or not any(context.adapters)
        if context is None or self.is_idle:
            return
        device = next(self._model.parameters()).device
        numbers = [
            number for span, number in zip(context.spans, context.adapters, strict=True) for _ in range(span.length)
        ]
        # Behind the last layer only the tokens are left whose logits are wanted.
        for of_rows in ([numbers[place] for place in wanted] if wanted is not None else numbers, numbers):
            self._segments[len(of_rows)] = _segments(of_rows, device)

    def segments(self, num_rows: int) -> list[Segment]:
        """Each adapter of the step with its rows among so many.

        Raises:
            NeedsMerging: If these are neither all tokens nor those whose logits are wanted.
        """
        if num_rows not in self._segments:
            raise NeedsMerging(f"one of its layers sees {num_rows} rows, which are not the tokens of the step")
        return self._segments[num_rows]

    def _layer(self, path: str) -> nn.Linear | LaidOutLinear | AdapterLinear:
        try:
            layer = self._model.get_submodule(path)
        except AttributeError:
            raise NeedsMerging(f"its layer {path} is not in the base") from None
        if not isinstance(layer, AdapterLinear | LaidOutLinear) and type(layer) is not nn.Linear:
            raise NeedsMerging(f"its layer {path} is a {type(layer).__name__} in the base and not a linear layer")
        return layer

    def _wrapped(self, path: str) -> AdapterLinear:
        layer = self._layers[path] = AdapterLinear(self._layer(path), self)
        self._replace(path, layer)
        return layer

    def _replace(self, path: str, layer: nn.Module) -> None:
        parent, _, name = path.rpartition(".")
        setattr(self._model.get_submodule(parent), name, layer)


def _segments(numbers: Sequence[int], device: torch.device) -> list[Segment]:
    """The rows of each adapter: a slice where they lie side by side."""
    places: dict[int, list[int]] = {}
    for place, number in enumerate(numbers):
        if number:
            places.setdefault(number, []).append(place)
    return [
        (
            number,
            slice(rows[0], rows[-1] + 1) if rows[-1] - rows[0] == len(rows) - 1 else torch.tensor(rows, device=device),
        )
        for number, rows in places.items()
    ]
