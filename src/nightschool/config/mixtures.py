"""Mixtures of experts that can be made from nothing: `base: new:moe-…`, or `model.preset: …`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Mixture:
    """A shape whose experts are as wide as is needed for `parameters`, whatever the vocabulary; None: as the width says.

    `expert_size` is the width of an expert where nothing is to be reached.
    """

    hidden_size: int
    num_layers: int
    num_experts: int
    parameters: int | None = None
    expert_size: int | None = None
    head_dim: int = 64
    context_tokens: int = 2048


# The names are those of their source, and so are width, layers and experts; it counts heads and experts' widths itself.
MIXTURES: Mapping[str, Mixture] = {
    "moe-tiny": Mixture(128, 4, 8, expert_size=128, head_dim=32, context_tokens=1024),
    "moe-350m": Mixture(512, 8, 8, 350_000_000),
    "moe-1b": Mixture(768, 12, 16, 1_000_000_000),
    "moe-3b": Mixture(1024, 24, 32, 3_000_000_000),
    "moe-7b": Mixture(1536, 32, 64, 7_000_000_000),
    "moe-13b": Mixture(2048, 40, 96, 13_000_000_000),
}

CUSTOM = "moe-custom"
"""A mixture whose width, layers and experts the recipe says."""

NEEDED_OF_CUSTOM = ("hidden_size", "num_hidden_layers", "num_experts")
DEFAULT_ACTIVE_EXPERTS = 2


_PRESETS = {
    "moe-tiny": "moe-tiny",
    **{name: f"moe-{name.lower()}" for name in ("350M", "1B", "3B", "7B", "13B")},
    "custom": CUSTOM,
}


def base_of_preset(preset: object) -> str:
    """The `base` that the short name of a preset stands for: `new:moe-350m` for `350M`.

    Raises:
        ValueError: If there is no such preset.
    """
    for name, full in _PRESETS.items():
        if str(preset).lower() in (name.lower(), full):
            return f"new:{full}"
    raise ValueError(f"{preset!r} is not a preset of mixtures; write one of {', '.join(_PRESETS)}")
