"""What `lora.target_modules` means in a model: names of layers, and words for groups of them.

`all-linear` are all linear layers but the output head, and the experts of a mixture. `attention` are the linear layers of
attention, `experts` the weights of all experts: bare tensors [N, out, in], no layers, which PEFT takes as `target_parameters`.
Expert routers stay as they are unless they are named.
"""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

from torch import nn

from nightschool.errors import ModelError
from nightschool.layers.expert_streaming.experts import StreamedExperts
from nightschool.models.expert_adapters import streamed_shapes
from nightschool.models.peft_layers import is_adapted_layer, is_adapted_parameter

ALL_LINEAR, ATTENTION, EXPERTS = "all-linear", "attention", "experts"
_PREFIX = "base_model.model."


@dataclass(frozen=True)
class Targets:
    """As PEFT takes them: `modules` by name or pattern, `parameters` by the names of a module and a tensor in it.

    `layers` are the full names of what is meant; none where a pattern is, of which PEFT alone knows what it matches.
    """

    modules: str | list[str]
    parameters: list[str]
    layers: frozenset[str]


def linear_layers(model: nn.Module) -> list[str]:
    """The full names of all linear layers but the output head, with adapters or without."""
    plain: Any = model
    if hasattr(plain, "get_base_model"):
        plain = plain.get_base_model()
    head = plain.get_output_embeddings() if hasattr(plain, "get_output_embeddings") else None
    found = []
    for name, module in model.named_modules():
        layer = module.get_base_layer() if is_adapted_layer(module) else module
        if isinstance(layer, nn.Linear) and layer is not head and not _within_adapter(name):
            found.append(name.removeprefix(_PREFIX))
    return found


def expert_weights(model: nn.Module) -> dict[str, int]:
    """The weights of experts that are one tensor for all of a layer, by their full names, adapted or not: how many numbers each is."""
    found: dict[str, int] = {}
    for name, module in model.named_modules():
        place = name.removeprefix(_PREFIX).replace(".base_layer", "")
        if isinstance(module, StreamedExperts):
            found |= {f"{place}.{own}": shape.numel() for own, shape in streamed_shapes(module).items()}
        if is_adapted_parameter(module) or "expert" not in f"{place} {type(module).__name__}".lower():
            continue
        for own, parameter in module.named_parameters(recurse=False):
            shape = getattr(parameter, "stands_for", parameter.shape)  # where it is packed, its codes are a matrix
            if len(shape) == 3:
                found[f"{place}.{own}"] = shape.numel()
    return found


def reached_layers(model: nn.Module) -> set[str]:
    """The full names of all layers and tensors with an adapter."""
    found = set()
    for name, module in model.named_modules():
        if is_adapted_layer(module):
            place = name.removeprefix(_PREFIX).replace(".base_layer", "")
            tensor = module.parameter_name if is_adapted_parameter(module) else "weight"
            found.add(place if tensor == "weight" else f"{place}.{tensor}")
    return found


def find_targets(model: nn.Module, wanted: str | Sequence[str]) -> Targets:
    """What is meant by `lora.target_modules` in this model.

    Raises:
        ModelError: If a name fits nothing, with the nearest one.
    """
    linear, experts = linear_layers(model), sorted(expert_weights(model))
    if isinstance(wanted, str):
        if wanted != ALL_LINEAR or not experts:
            return Targets(wanted, [], frozenset(linear) if wanted == ALL_LINEAR else frozenset())
        return Targets(sorted({_last(name) for name in linear}), _parameters(experts), frozenset([*linear, *experts]))
    modules: list[str] = []
    parameters: set[str] = set()
    layers: set[str] = set()
    for target in wanted:
        of_attention = [name for name in linear if _in_attention(name)] if target == ATTENTION else []
        of_experts = experts if target == EXPERTS else [name for name in experts if _fits(name, target)]
        named = of_attention or [name for name in linear if _fits(name, target)]
        if not named and not of_experts:  # what else PEFT may know, such as an embedding
            named = [name for name in _modules(model) if _fits(name, target)]
            if not named:
                raise _nothing_of_that_name(target, linear, experts)
        if of_attention:
            modules += sorted({".".join(name.split(".")[-2:]) for name in of_attention})
        elif named:
            modules.append(target)
        parameters |= set(_parameters(of_experts))
        layers |= {*named, *of_experts}
    return Targets(modules, sorted(parameters), frozenset(layers))


def refuse_frozen(model: nn.Module, targets: Targets, wanted: str | Sequence[str]) -> None:
    """Raise ModelError if something that was asked for has got no adapter."""
    frozen = sorted(targets.layers - reached_layers(model))
    if (
        wanted == ALL_LINEAR
    ):  # layers that PEFT cannot reach are in the plan; experts that learn nothing would look like success
        frozen = [name for name in frozen if name in expert_weights(model)]
    if frozen:
        kinds = sorted({kind(name) for name in frozen})
        raise ModelError(
            f"lora.target_modules asks for {', '.join(kinds)}, and {len(frozen)} of these, such as {frozen[0]}, would stay frozen: "
            f"PEFT reaches none of them in a {cast(Any, model).config.model_type}. Leave these names out."
        )


def kind(name: str) -> str:
    """How layers like this one are called in a report."""
    parts = name.split(".")
    return ".".join(parts[-2:]) if len(parts) > 1 and "expert" in parts[-2] else parts[-1]


def _modules(model: nn.Module) -> list[str]:
    return [name.removeprefix(_PREFIX) for name, _ in model.named_modules() if not _within_adapter(name)]


def _nothing_of_that_name(target: str, linear: Sequence[str], experts: Sequence[str]) -> ModelError:
    names = sorted({_last(name) for name in linear})
    words = [ALL_LINEAR, ATTENTION, *([EXPERTS] if experts else [])]
    if target in (ATTENTION, EXPERTS):
        fact = f"lora.target_modules has {target}, and this model has none that are told apart."
    else:
        fact = f"lora.target_modules has {target}, and no module of this model is called so."
    near = difflib.get_close_matches(target, names, n=1, cutoff=0.6)
    fused = f" Its experts are one tensor a layer: write {EXPERTS}." if experts and target in _OF_EXPERTS else ""
    return ModelError(
        fact
        + (f" Did you mean {near[0]}?" if near and not fused else "")
        + fused
        + f" Write {', '.join(words[:-1])} or {words[-1]}, or names among {', '.join(names)}."
    )


# What the layers of an expert are called where each has its own.
_OF_EXPERTS = frozenset({"gate_proj", "up_proj", "w1", "w2", "w3"})


def _parameters(experts: Sequence[str]) -> list[str]:
    return sorted({".".join(name.split(".")[-2:]) for name in experts})


def _fits(name: str, target: str) -> bool:
    return name == target or name.endswith(f".{target}")


def _last(name: str) -> str:
    return name.rsplit(".", 1)[-1]


def _in_attention(name: str) -> bool:
    return any("attn" in part or "attention" in part for part in name.split(".")[:-1])


def _within_adapter(name: str) -> bool:
    return name.endswith(".base_layer") or ".lora_" in name
