"""Bases whose linear layers and experts are quantised: 4 bits (NF4, FP4) or 8, by bitsandbytes, on a CPU as on a GPU.

A quantised base is named by what it is made of and how: `smollm2@20261121_023000[nf4-double]`. An adapter that was trained
on one names it so, and is examined and served on the same. Embeddings and the output head stay as they are.

Source: Dettmers et al. 2023, QLoRA, arXiv 2305.14314; Dettmers et al. 2022, LLM.int8(), arXiv 2208.07339.
"""

from __future__ import annotations

from functools import partial
from importlib import import_module
from importlib.util import find_spec
from typing import Any, cast

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn
from transformers import BitsAndBytesConfig, PreTrainedModel

from nightschool.errors import ModelError
from nightschool.layers.expert_streaming.experts import StreamedExperts
from nightschool.layers.packed_experts import PackedExperts
from nightschool.models.quantized_experts import WithExperts, unpack_experts
from nightschool.models.quiet import quiet_libraries

LABELS = ("nf4", "nf4-double", "fp4", "fp4-double", "int8")
# Of the largest logit. 8-bit layers round what comes in, too; plain ones do not.
_SAME = {"int8": 5e-2}
_SAME_4_BIT = {torch.float32: 1e-4}
_SAME_16_BIT = 5e-2


def quantization_config(label: str, dtype: torch.dtype, ref: str) -> BitsAndBytesConfig:
    """How transformers is to quantise while it loads; products run in `dtype`.

    Raises:
        ModelError: If there is no such way, or bitsandbytes is not installed.
    """
    if label not in LABELS:
        raise ModelError(f"The base {ref!r} asks for the quantisation {label!r}. Write one of {', '.join(LABELS)}.")
    if find_spec("bitsandbytes") is None:
        raise ModelError(
            f"The base {ref!r} is to be quantised, which bitsandbytes does. Run: pip install 'nightschool[qlora]'"
        )
    config: Any = partial(WithExperts, label, dtype)
    with quiet_libraries():
        if label == "int8":
            # Columns of outliers are chosen over all rows of a product, so that a text would depend on its neighbours.
            return cast(BitsAndBytesConfig, config(load_in_8bit=True, llm_int8_threshold=0.0))
        kind, _, double = label.partition("-")
        four_bits = config(
            load_in_4bit=True,
            bnb_4bit_quant_type=kind,
            bnb_4bit_use_double_quant=bool(double),
            bnb_4bit_compute_dtype=dtype,
        )
    return cast(BitsAndBytesConfig, four_bits)


def is_quantized(layer: nn.Module) -> bool:
    """Whether this is a linear layer of bitsandbytes."""
    return isinstance(layer, nn.Linear) and type(layer).__module__.startswith("bitsandbytes.")


def quantization_of(model: nn.Module) -> str | None:
    """How the linear layers are quantised: a kind of bitsandbytes, or None."""
    layer = next((module for module in model.modules() if is_quantized(module)), None)
    return None if layer is None else type(layer).__name__


def steady(model: nn.Module, device: torch.device | str) -> None:
    """Have bitsandbytes compute the same on a CPU whether a model is trained or asked.

    On a CPU with AVX-512 BF16, 4-bit layers would be packed anew when they are first asked, and their scales rounded to
    bf16, for good. Layers of 8 bits would round what comes in when they are asked, which they do not in training.
    """
    for layer in model.modules():
        if isinstance(layer, PackedExperts):  # no checkpoint needs the scales of what does not learn
            layer._non_persistent_buffers_set.update(layer._buffers)
        if not is_quantized(layer) or torch.device(device).type != "cpu":
            continue
        if hasattr(layer, "support_avx512bf16_for_cpu"):
            layer.support_avx512bf16_for_cpu = False  # type: ignore[assignment]
        if hasattr(layer, "init_8bit_state"):
            layer.forward = partial(_product_of_8_bits, layer)


def _product_of_8_bits(layer: Any, x: Tensor) -> Tensor:
    """[…, in] → […, out], as bitsandbytes computes it in training."""
    if layer.training:  # it keeps the codes for the backward pass, not what they stand for
        return cast(Tensor, type(layer).forward(layer, x))
    weight = layer.weight.data.to(x.dtype).mul_(scales(layer)[0].unsqueeze(1).mul(1.0 / 127.0))
    return F.linear(x, weight, layer.bias)


def compute_in(model: nn.Module, dtype: torch.dtype) -> None:
    """Have the products of 4-bit layers and of experts run in `dtype`; linear layers of 8 bits have a format of their own."""
    for layer in model.modules():
        if isinstance(layer, PackedExperts):
            layer.dtype = dtype
        if isinstance(layer, StreamedExperts) and not layer.stream.content.stored_dtype.is_floating_point:
            layer.stream.content.dtype = dtype
        if is_quantized(layer) and hasattr(layer, "compute_dtype"):
            layer.compute_dtype = dtype  # type: ignore[assignment]


def num_elements(parameter: Tensor) -> int:
    """Elements of a parameter; of a packed one those that it stands for."""
    state = getattr(parameter, "quant_state", None)
    shape = getattr(parameter, "stands_for", parameter.shape) if state is None else state.shape
    return int(torch.Size(shape).numel())


def scales(layer: nn.Module) -> list[Tensor]:
    """The tensors that a quantised layer needs beside its codes, in a fixed order; none for others."""
    if isinstance(layer, PackedExperts):
        return list(layer.buffers())
    weight: Any = getattr(layer, "weight", None)
    if not is_quantized(layer):
        return []
    state = getattr(weight, "quant_state", None)
    if state is None:
        rows = (
            weight.SCB if weight.SCB is not None else cast(Any, layer).state.SCB
        )  # moved there by the first forward pass
        return [rows]
    found = []
    while state is not None:
        found.append(state.absmax)
        if state.nested:
            found.append(torch.as_tensor(state.offset))
        state = state.state2 if state.nested else None
    return found


def stored_bytes(model: nn.Module) -> int:
    """Bytes of all parameters, with the scales of those that are quantised."""
    tensors = [*model.parameters(), *(scale for layer in model.modules() for scale in scales(layer))]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def dequantized(model: PreTrainedModel, ref: str) -> PreTrainedModel:
    """The same model with plain linear layers and experts that hold what the quantised ones stand for; changed in place.

    Raises:
        ModelError: If its logits change by more than rounding.
    """
    functional: Any = import_module("bitsandbytes.functional")
    dtype = cast(Any, model).get_input_embeddings().weight.dtype
    before = _logits(model)
    kinds = set()
    for name, layer in list(model.named_modules()):
        if not is_quantized(layer):
            continue
        kinds.add(type(layer).__name__)
        weight: Any = layer.weight
        if getattr(weight, "quant_state", None) is not None:
            values = functional.dequantize_4bit(weight.data, weight.quant_state)
        else:
            values = functional.int8_vectorwise_dequant(weight.data, scales(layer)[0])
        plain = nn.Linear(1, 1, bias=layer.bias is not None, device="meta")
        plain.in_features, plain.out_features = layer.in_features, layer.out_features
        plain.weight = nn.Parameter(values.to(dtype), requires_grad=False)
        plain.bias = layer.bias
        parent, _, attribute = name.rpartition(".")
        setattr(model.get_submodule(parent), attribute, plain)
    unpack_experts(model, dtype)
    inner: Any = model
    inner.is_quantized = inner.is_loaded_in_4bit = inner.is_loaded_in_8bit = False
    inner.hf_quantizer = None
    if hasattr(inner.config, "quantization_config"):
        del inner.config.quantization_config
    difference = float((_logits(model) - before).abs().max() / before.abs().max().clamp_min(1e-6))
    limit = _SAME["int8"] if "Linear8bitLt" in kinds else _SAME_4_BIT.get(dtype, _SAME_16_BIT)
    if not difference <= limit:
        raise ModelError(
            f"The quantised base {ref!r} cannot be written as plain weights: its logits would differ by {difference:.1e} of "
            f"the largest, and {limit:.0e} is allowed. Serve the adapter on its quantised base."
        )
    return model


def _logits(model: PreTrainedModel) -> Tensor:
    inner: Any = model
    embedding = inner.get_input_embeddings().weight
    ids = torch.randint(0, embedding.shape[0], (2, 12), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return cast(Tensor, inner(input_ids=ids.to(embedding.device), use_cache=False).logits).float().cpu()
