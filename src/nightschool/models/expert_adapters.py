"""PEFT's adapters on the weights of all experts at once, computed beside those weights.

PEFT keeps the factors of N experts in two matrices, [N·r, in] and [out, r·N], of which the first holds expert after expert
and the second rank after rank. They stay there, so that PEFT saves and loads them; only the pass is ours.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor, nn

from nightschool.layers.adapted_experts import adapted_experts, can_be_adapted
from nightschool.layers.expert_streaming.experts import StreamedExperts
from nightschool.layers.passing_experts import Factors
from nightschool.models.peft_layers import is_adapted_parameter
from nightschool.models.quantized_experts import WEIGHTS, packed_weights

if TYPE_CHECKING:
    from peft.tuners.lora import ParamWrapper


def compute_beside(model: nn.Module) -> None:
    """Have what adapters add to experts computed for the tokens alone, where the experts are laid out as usual."""
    for name, module in model.named_modules():
        if not is_adapted_parameter(module) or name.endswith(".base_layer"):
            continue
        if can_be_adapted(module.get_base_layer()):
            setattr(module, "forward", partial(_forward, module))  # noqa: B010 - a method, for mypy


@contextmanager
def shown_whole(model: nn.Module) -> Iterator[None]:
    """A block in which the weights of packed and streamed experts are parameters of the shape that they stand for, without numbers.

    PEFT makes its factors by that shape.
    """
    shapes = [(module, name, packed.shape) for module, name, packed in packed_weights(model)]
    for module in model.modules():
        if isinstance(module, StreamedExperts):
            shapes += [(module, name, shape) for name, shape in streamed_shapes(module).items()]
    kept = [(module, name, module._parameters.pop(name, None)) for module, name, _ in shapes]
    for module, name, shape in shapes:
        nothing = torch.zeros((), device=_device_of(model)).expand(shape)
        module.register_parameter(name, nn.Parameter(nothing, requires_grad=False))
    try:
        yield
    finally:
        for module, name, parameter in kept:
            del module._parameters[name]
            if parameter is not None:
                module.register_parameter(name, parameter)


def streamed_shapes(experts: StreamedExperts) -> dict[str, torch.Size]:
    """The weights that streamed experts stand for."""
    shape = experts.stream.shape
    return {name: torch.Size(shape.stacked_shape(which)) for which, name in enumerate(WEIGHTS)}


def _device_of(model: nn.Module) -> torch.device:
    return next(model.parameters()).device


def wrappers_of(outermost: ParamWrapper) -> Iterator[ParamWrapper]:
    """PEFT wraps a module once for each of its weights, one in the other."""
    layer: nn.Module = outermost
    while is_adapted_parameter(layer):
        yield layer
        layer = layer.base_layer


def _forward(outermost: ParamWrapper, hidden_td: Tensor, chosen_tk: Tensor, scores_tk: Tensor) -> Tensor:
    wrappers = list(wrappers_of(outermost))
    active = outermost.active_adapters
    if len(active) != 1 or any(wrapper.disable_adapters or wrapper.merged for wrapper in wrappers):
        output: Tensor = type(outermost).forward(outermost, hidden_td, chosen_tk, scores_tk)
        return output
    adapters = {w.parameter_name: _factors(w, active[0]) for w in wrappers if active[0] in w.lora_A}
    return adapted_experts(outermost.get_base_layer(), adapters, hidden_td, chosen_tk, scores_tk)


def _factors(wrapper: ParamWrapper, name: str) -> Factors:
    down_ri, up_or = cast(Tensor, wrapper.lora_A[name].weight), cast(Tensor, wrapper.lora_B[name].weight)
    down_nri = torch.unflatten(down_ri, 0, (wrapper.num_experts, -1))
    up_nor = torch.unflatten(up_or, 1, (-1, wrapper.num_experts)).permute(2, 0, 1)
    return Factors(down_nri, up_nor, float(wrapper.scaling[name]))
