"""Adapters that are served unmerged: many of them on one base, in one step.

A linear layer that an adapter reaches is wrapped, whatever it is (plain, with further layouts as in `engine.weights`, or
quantised). It computes all rows of a step at once, and then adds to the rows of each adapter what its two factors give.
Rows without an adapter are not touched, so their numbers are those of the base, bit for bit; a layer that no adapter
reaches any more is unwrapped, so that a base alone is as fast as ever. Experts are wrapped a layer at a time (`engine.adapter_experts`).
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Protocol

import torch
from torch import Tensor, nn

from nightschool.engine import kernels
from nightschool.engine.adapter_experts import AdapterExperts, names_of
from nightschool.engine.adapter_kernel import MOST_RANK, KernelFactors, block_of, items
from nightschool.engine.adapter_torch import Pieces, TorchFactors, pieces
from nightschool.engine.step_context import StepContext
from nightschool.engine.weights import LaidOutLinear
from nightschool.layers.mixed_adapters import FactorPair
from nightschool.models.unmerged import LoraWeights, NeedsMerging


class StepRows:
    """The rows of each adapter of a step, by its number; made ready for those who compute with them, when they first ask."""

    def __init__(self, rows_of: Sequence[tuple[int, Sequence[int]]], like: Tensor, num_rows: int) -> None:
        self._rows_of, self._num_rows = rows_of, num_rows
        self._like = like

    @cached_property
    def adapter_of(self) -> Tensor:
        """The number of each row's adapter, 0 for none."""
        numbers = torch.zeros(self._num_rows, dtype=torch.int64)
        for number, rows in self._rows_of:
            numbers[list(rows)] = number
        return numbers.to(self._like.device)

    @cached_property
    def items(self) -> Tensor:
        """As the kernel takes them."""
        return items(self._rows_of)

    @cached_property
    def pieces(self) -> Pieces | None:
        """As torch takes them, where the adapters are."""
        return pieces(self._rows_of, self._like)


class Factors(Protocol):
    """The factors of every adapter that reaches a layer, by its number."""

    def put(self, number: int, down: Tensor, up: Tensor) -> None:
        """Keep [in, r] and [r, out]."""
        ...

    def drop(self, number: int) -> tuple[Tensor, Tensor] | None:
        """Forget an adapter, and return what was put; None if it is not there."""
        ...

    def __len__(self) -> int:
        """How many adapters reach this layer."""
        ...

    def add(self, x_rc: Tensor, out_rc: Tensor, rows: StepRows) -> None:
        """Add to `out_rc` [rows, out] what the adapters give for `x_rc` [rows, in]."""
        ...


class AdapterLinear(nn.Module):
    """A linear layer with the factors of every adapter that reaches it."""

    def __init__(self, layer: nn.Linear | LaidOutLinear, table: AdapterTable, factors: Factors) -> None:
        super().__init__()
        self.layer = layer
        self.factors = factors
        # Not a module of this one: it belongs to the model.
        object.__setattr__(self, "_table", table)

    @property
    def weight(self) -> Tensor:
        """Of the base, [out, in]."""
        return self.layer.weight

    @property
    def bias(self) -> Tensor | None:
        """Of the base, [out]."""
        return self.layer.bias

    def forward(self, x: Tensor) -> Tensor:
        """[…, in] → […, out]."""
        out: Tensor = self.layer(x)
        table: AdapterTable = self._table  # type: ignore[assignment]
        if not table.is_idle:
            x_rc = x.reshape(-1, x.shape[-1])
            self.factors.add(x_rc, out.view(-1, out.shape[-1]), table.rows(len(x_rc)))
        return out


class AdapterTable:
    """The adapters of one model. Only the thread that runs the model may call it.

    Args:
        model: Its linear layers are wrapped where an adapter reaches them, and unwrapped when none does any more.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._layers: dict[str, AdapterLinear] = {}
        self._experts: dict[str, AdapterExperts] = {}
        self._numbers: set[int] = set()
        self._rows: dict[int, StepRows] = {}
        # Quantised layers hold codes; what goes into them and comes out is of the format of the rest.
        self._like = next(p for p in model.parameters() if p.is_floating_point())
        self.is_idle = True

    def add(self, weights: LoraWeights) -> int:
        """Take an adapter in; returns its number, the lowest that is free.

        Raises:
            NeedsMerging: If one of its layers is not a linear layer of this model or has another shape, or its rank is
                beyond use. Nothing was changed.
        """
        for path, (down, up) in weights.factors.items():
            shape = _shape(self._layer(path))
            if shape != (up.shape[1], down.shape[0]):
                raise NeedsMerging(
                    f"its factors of {path} make [{up.shape[1]}, {down.shape[0]}], and the layer is {list(shape)}"
                )
            if down.shape[1] > MOST_RANK:
                raise NeedsMerging(f"its rank for {path} is {down.shape[1]}, and at most {MOST_RANK} stays apart")
        for path, pairs in weights.experts.items():
            names_of(self._experts_at(path), path, pairs)
            most = max(down.shape[1] for down, _ in pairs)
            if most > MOST_RANK:
                raise NeedsMerging(f"its rank for {path} is {most}, and at most {MOST_RANK} stays apart")
        number = next(free for free in range(1, len(self._numbers) + 2) if free not in self._numbers)
        self._numbers.add(number)
        for path, (down, up) in weights.factors.items():
            layer = self._layers.get(path) or self._wrapped(path)
            layer.factors.put(number, down.to(self._like), up.to(self._like))
        for path, pairs in weights.experts.items():
            experts = self._experts.get(path)
            if experts is None:
                experts = self._experts[path] = AdapterExperts(self._experts_at(path), self)
                self._replace(path, experts)
            experts.put(number, [(down.to(self._like), up.to(self._like)) for down, up in pairs])
        return number

    def remove(self, number: int) -> LoraWeights:
        """Let an adapter go, and return what it was."""
        self._numbers.discard(number)
        factors: dict[str, tuple[Tensor, Tensor]] = {}
        for path, layer in list(self._layers.items()):
            dropped = layer.factors.drop(number)
            if dropped is not None:
                factors[path] = dropped
            if not len(layer.factors):
                self._replace(path, layer.layer)
                del self._layers[path]
        of_experts: dict[str, tuple[FactorPair, ...]] = {}
        for path, experts in list(self._experts.items()):
            pairs = experts.drop(number)
            if pairs:
                of_experts[path] = pairs
            if not len(experts):
                self._replace(path, experts.experts)
                del self._experts[path]
        return LoraWeights(factors, of_experts)

    def begin(self, context: StepContext | None, wanted: Sequence[int] | None) -> None:
        """Say whose the tokens of the next step are, and of which of them logits are wanted (None: of all)."""
        self._rows = {}
        self.is_idle = context is None or not any(context.adapters)
        if context is None or self.is_idle:
            return
        numbers = [
            number for span, number in zip(context.spans, context.adapters, strict=True) for _ in range(span.length)
        ]
        # Behind the last layer only the tokens are left whose logits are wanted.
        for of_rows in ([numbers[place] for place in wanted] if wanted is not None else numbers, numbers):
            self._rows[len(of_rows)] = _step_rows(of_rows, self._like)

    def rows(self, num_rows: int) -> StepRows:
        """Each adapter of the step with its rows among so many.

        Raises:
            NeedsMerging: If these are neither all tokens nor those whose logits are wanted.
        """
        if num_rows not in self._rows:
            raise NeedsMerging(f"one of its layers sees {num_rows} rows, which are not the tokens of the step")
        return self._rows[num_rows]

    def adapter_of(self, num_rows: int) -> Tensor:
        """The number of each row's adapter among so many, 0 for none. Raises as `rows`."""
        return self.rows(num_rows).adapter_of

    def _module(self, path: str) -> nn.Module:
        try:
            return self._model.get_submodule(path)
        except AttributeError:
            raise NeedsMerging(f"its layer {path} is not in the base") from None

    def _experts_at(self, path: str) -> nn.Module:
        module = self._module(path)
        return module.experts if isinstance(module, AdapterExperts) else module

    def _layer(self, path: str) -> nn.Linear | LaidOutLinear:
        layer = self._module(path)
        if isinstance(layer, AdapterLinear):
            return layer.layer
        if not isinstance(layer, LaidOutLinear | nn.Linear):
            raise NeedsMerging(f"its layer {path} is a {type(layer).__name__} in the base and not a linear layer")
        return layer

    def _wrapped(self, path: str) -> AdapterLinear:
        inner = self._layer(path)
        width, columns = _shape(inner)
        block = block_of(columns, width) if _has_kernel(self._like) else None
        factors = TorchFactors() if block is None else KernelFactors(columns, width, block)
        layer = self._layers[path] = AdapterLinear(inner, self, factors)
        self._replace(path, layer)
        return layer

    def _replace(self, path: str, layer: nn.Module) -> None:
        parent, _, name = path.rpartition(".")
        setattr(self._model.get_submodule(parent), name, layer)


def _shape(layer: nn.Linear | LaidOutLinear) -> tuple[int, int]:
    """[out, in]; the weights of a quantised layer have another shape."""
    return layer.out_features, layer.in_features


def _has_kernel(like: Tensor) -> bool:
    return like.device.type == "cpu" and like.dtype == torch.float32 and kernels.is_available()


def _step_rows(numbers: Sequence[int], like: Tensor) -> StepRows:
    places: dict[int, list[int]] = {}
    for place, number in enumerate(numbers):
        if number:
            places.setdefault(number, []).append(place)
    return StepRows(list(places.items()), like, len(numbers))
