"""The experts of a layer with adapters that are served apart from them, many in one step; see `engine.adapters`."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Protocol

from torch import Tensor, nn

from nightschool.layers.adapted_experts import EXPERT_WEIGHTS, can_be_adapted, weight_shapes
from nightschool.layers.mixed_adapters import FactorPair, experts_of_mixed_adapters
from nightschool.models.unmerged import NeedsMerging


class StepAdapters(Protocol):
    """Whose adapter the tokens of a step have."""

    @property
    def is_idle(self) -> bool:
        """Whether none has any."""
        ...

    def adapter_of(self, num_rows: int) -> Tensor:
        """The number of each token's adapter, 0 for none, of so many."""
        ...


class AdapterExperts(nn.Module):
    """The experts of a layer, whatever they are (all there, packed, or streamed), with the factors of every adapter that reaches them."""

    def __init__(self, experts: nn.Module, step: StepAdapters) -> None:
        super().__init__()
        self.experts = experts
        self._factors: dict[str, dict[int, FactorPair]] = {name: {} for name in EXPERT_WEIGHTS}
        # Not a module of this one: it belongs to the model.
        object.__setattr__(self, "_step", step)

    def put(self, number: int, pairs: Iterable[FactorPair]) -> None:
        """Keep the factors of one or both weights, of which `names_of` is true."""
        for name, (down_nri, up_nor) in names_of(self.experts, "", pairs).items():
            self._factors[name][number] = down_nri.contiguous(), up_nor.contiguous()

    def drop(self, number: int) -> tuple[FactorPair, ...]:
        """Forget an adapter, and return what was put."""
        found = [factors.pop(number, None) for factors in self._factors.values()]
        return tuple(pair for pair in found if pair is not None)

    def __len__(self) -> int:
        """How many adapters reach these experts."""
        return len(set().union(*self._factors.values()))

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """[T, D], the chosen experts [T, K] and their weights [T, K] → [T, D]."""
        step: StepAdapters = self._step  # type: ignore[assignment]
        if step.is_idle:
            plain: Tensor = self.experts(hidden_states, top_k_index, top_k_weights)
            return plain
        adapter_of_t = step.adapter_of(len(hidden_states))
        return experts_of_mixed_adapters(
            self.experts, self._factors, adapter_of_t, hidden_states, top_k_index, top_k_weights
        )


def names_of(experts: Any, path: str, pairs: Iterable[FactorPair]) -> dict[str, FactorPair]:
    """Which of the two weights each pair of factors is for. Their shapes tell, as no expert has two weights of one shape.

    Raises:
        NeedsMerging: If these experts take none, or not of such shapes.
    """
    if not can_be_adapted(experts):
        raise NeedsMerging(
            f"its layer {path} is a {type(experts).__name__} in the base and has no experts in the usual layout"
        )
    names = {shape: name for name, shape in weight_shapes(experts).items()}
    found = {}
    for down_nri, up_nor in pairs:
        shape = (down_nri.shape[0], up_nor.shape[1], down_nri.shape[2])
        if shape not in names:
            raise NeedsMerging(
                f"its factors of {path} make {list(shape)}, and the experts there are {[list(one) for one in names]}"
            )
        found[names[shape]] = down_nri, up_nor
    return found
