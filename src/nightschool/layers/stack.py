"""The parts of a plain stack: decoder layers one after the other, then a norm, then the head."""

from __future__ import annotations

from torch import nn

from nightschool.layers.forward import backbone


def stacked_layers(model: nn.Module) -> nn.ModuleList | None:
    """The decoder layers, in their order; None if they are not all in one list."""
    config = backbone(model).config.get_text_config()
    lists = (module for module in backbone(model).children() if isinstance(module, nn.ModuleList))
    return next((layers for layers in lists if len(layers) == config.num_hidden_layers), None)


def last_norm(model: nn.Module) -> nn.Module | None:
    """What the last layer's output passes before the head; None if it passes nothing."""
    found: list[nn.Module] = [module for name, module in backbone(model).named_children() if "norm" in name]
    return found[-1] if found else None
