"""Experts of a stock mixture that are packed while a base is read, layer by layer, as its linear layers are.

transformers' quantisers take linear layers only and leave experts, which are nearly all of a mixture, in full.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import BitsAndBytesConfig
from transformers.core_model_loading import ConversionOps
from transformers.quantizers.auto import register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.quantizers.quantizer_bnb_4bit import Bnb4BitHfQuantizer
from transformers.quantizers.quantizer_bnb_8bit import Bnb8BitHfQuantizer
from transformers.quantizers.quantizers_utils import get_module_from_name

from nightschool.layers.adapted_experts import adapted_experts, can_be_adapted
from nightschool.layers.packed_experts import PackedExperts

WEIGHTS = ("gate_up_proj", "down_proj")


class WithExperts(BitsAndBytesConfig):
    """A quantisation of linear layers and experts. `label` names it, `dtype` is that of products."""

    def __init__(self, label: str, dtype: torch.dtype, **settings: Any) -> None:
        super().__init__(**settings)  # type: ignore[no-untyped-call]
        self.label, self.product_dtype = label, dtype
        # By which transformers finds the quantisers below.
        self.quant_method: Any = "nightschool_8bit" if self.load_in_8bit else "nightschool_4bit"

    def to_dict(self) -> dict[str, Any]:
        """As plain values."""
        plain: dict[str, Any] = super().to_dict()
        return plain | {"product_dtype": str(self.product_dtype).removeprefix("torch.")}


class _Packing(ConversionOps):
    """Packs experts, and leaves linear layers to transformers' own."""

    def __init__(self, quantizer: Any, of_linear_layers: ConversionOps) -> None:
        self._quantizer, self._of_linear_layers = quantizer, of_linear_layers

    def convert(self, input_dict: dict[str, Any], *patterns: Any, **settings: Any) -> dict[str, Any]:
        """Of one parameter, by its name."""
        ((name, value),) = input_dict.items()
        model = settings["model"]
        if not _is_of_experts(model, name):
            converted: dict[str, Any] = self._of_linear_layers.convert(input_dict, *patterns, **settings)
            return converted
        experts, weight = get_module_from_name(model, name)
        config = self._quantizer.quantization_config
        whole: Tensor = value[0] if isinstance(value, list) else value
        packed = PackedExperts(config.label, whole.shape, config.product_dtype)
        experts.add_module(f"packed_{weight}", packed)
        experts.forward = partial(adapted_experts, experts, {})
        return {name: packed.pack(whole)}


def _is_of_experts(model: nn.Module, name: str) -> bool:
    module, weight = get_module_from_name(model, name)
    return weight in WEIGHTS and can_be_adapted(module)


@register_quantizer("nightschool_4bit")
class _FourBits(Bnb4BitHfQuantizer):
    def param_needs_quantization(self, model: Any, param_name: str, **settings: Any) -> bool:
        return _is_of_experts(model, param_name) or bool(
            super().param_needs_quantization(model, param_name, **settings)
        )

    def get_quantize_ops(self) -> ConversionOps:
        return _Packing(self, super().get_quantize_ops())  # type: ignore[no-untyped-call]


@register_quantizer("nightschool_8bit")
class _EightBits(Bnb8BitHfQuantizer):
    def param_needs_quantization(self, model: Any, param_name: str, **settings: Any) -> bool:
        return _is_of_experts(model, param_name) or bool(
            super().param_needs_quantization(model, param_name, **settings)
        )

    def get_quantize_ops(self) -> ConversionOps:
        return _Packing(self, super().get_quantize_ops())  # type: ignore[no-untyped-call]


def quantizer_of(config: WithExperts) -> HfQuantizer:
    """What quantises by these settings, a model that is not packed yet."""
    return (_EightBits if config.load_in_8bit else _FourBits)(config, pre_quantized=False)


class QuantizedWhileRead:
    """A block in which the linear layers of a model, whose experts are elsewhere, get their weights and are packed at once."""

    def __init__(self, model: Any, config: WithExperts, device: torch.device) -> None:
        self._model, self._device = model, device
        quantizer: Any = quantizer_of(config)
        self._quantizer, self._packing = quantizer, quantizer.get_quantize_ops()

    def __enter__(self) -> QuantizedWhileRead:
        self._quantizer.preprocess_model(self._model, device_map={"": self._device})
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: Any) -> None:
        if kind is None:
            self._quantizer.postprocess_model(self._model)
            self._model.hf_quantizer = self._quantizer

    def take(self, name: str, value: Tensor) -> bool:
        """Have a parameter be this, packed; False, and nothing done, if it is not to be."""
        if not self._quantizer.param_needs_quantization(self._model, name):
            return False
        here = value.to(self._device, self._model.dtype)
        packed = self._packing.convert({name: here}, model=self._model)[name]
        module, own = get_module_from_name(self._model, name)
        setattr(module, own, packed)
        return True


def packed_weights(model: nn.Module) -> Iterator[tuple[nn.Module, str, PackedExperts]]:
    """Each packed weight: the experts' module, the weight's name there, and how it is packed."""
    for module in model.modules():
        for weight in WEIGHTS:
            packed = module._modules.get(f"packed_{weight}")
            if isinstance(packed, PackedExperts):
                yield module, weight, packed


def unpack_experts(model: nn.Module, dtype: torch.dtype) -> None:
    """Put plain weights, which hold what the codes stand for, in their places."""
    for module, weight, packed in list(packed_weights(model)):
        whole = packed.unpack_all(getattr(module, weight)).to(dtype)
        setattr(module, weight, nn.Parameter(whole, requires_grad=False))
        del module._modules[f"packed_{weight}"]
        module.__dict__.pop("forward", None)
