"""What a base takes, before it is loaded: how many elements its files hold, and in which number format."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import torch

from nightschool.models.folder import FolderInfo, inspect_folder
from nightschool.models.load import Located, down_to_weights, load_config, locate, located_version
from nightschool.store.home import Home
from nightschool.store.registry import Version

# Codes with their scales: a byte or four for each 64 of them.
_SCALES = 1.07
_EXPERT = re.compile(r"(.*\.experts\.\d+)\.")
_ALL_OF_A_LAYER = re.compile(r"\.experts\.(gate_up_proj|down_proj)$")
_DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16}


@dataclass(frozen=True)
class StoredWeights:
    """The full weights that a reference stands on.

    `num_elements` counts those of the model, adapters on it not included. `dtype` is the format of most of them: bf16
    or fp16; fp32 for all others, and where adapters were merged on the way, because a sum is rounded to no less.
    `num_quantized` elements, those of linear layers, are loaded with `bits` each. `num_in_experts` are those of the `num_experts`
    of all layers of a mixture.
    """

    num_elements: int
    dtype: torch.dtype
    hidden_size: int
    num_quantized: int = 0
    bits: int = 32
    num_experts: int = 0
    num_in_experts: int = 0

    def loaded_bytes(self, dtype: torch.dtype, experts_resident: int | None = None) -> int:
        """What they take in memory where those that are not quantised are kept in `dtype`, and no more experts than that."""
        size = torch.empty((), dtype=dtype).element_size()
        each_quantized = self.bits / 8 * _SCALES
        whole = size * (self.num_elements - self.num_quantized) + int(self.num_quantized * each_quantized)
        if not self.num_experts or experts_resident is None:
            return whole
        elsewhere = self.num_in_experts * (1 - min(1.0, experts_resident / self.num_experts))
        return whole - int(elsewhere * (each_quantized if self.num_quantized else size))


def stored_weights(ref: str, home: Home, root: Path | None = None) -> StoredWeights:
    """Look at what `ref` (see `load_base`; not `new:`) means, adapters followed down to their base.

    Raises:
        NotFound: If nothing of that name is here.
        ModelError, Damaged: If it is not a causal language model, or a file is broken.
    """
    return _inspect(locate(ref, home, root), home)


def stored_weights_of(version: Version, home: Home) -> StoredWeights:
    """The same for a published version."""
    return _inspect(located_version(version), home)


def _inspect(found: Located, home: Home) -> StoredWeights:
    *adapters, weights = down_to_weights(found, home)
    facts = inspect_folder(weights.folder, weights.ref)
    config = load_config(weights.folder, weights.ref)
    quantization = weights.quantization
    stacked = [tensor for tensor in facts.tensors if _ALL_OF_A_LAYER.search(tensor.name)]
    return StoredWeights(
        num_elements=sum(tensor.num_elements for tensor in facts.tensors),
        dtype=torch.float32 if len(adapters) > 1 else _dtype_of_most(facts),
        hidden_size=int(config.get_text_config().hidden_size),
        num_quantized=0 if quantization is None else _in_linear_layers(facts),
        num_experts=len({match[1] for tensor in facts.tensors if (match := _EXPERT.match(tensor.name))})
        + sum(tensor.shape[0] for tensor in stacked if tensor.name.endswith(".down_proj")),
        num_in_experts=sum(tensor.num_elements for tensor in facts.tensors if _EXPERT.match(tensor.name))
        + sum(tensor.num_elements for tensor in stacked),
        bits=32 if quantization is None else 8 if quantization == "int8" else 4,
    )


def _in_linear_layers(facts: FolderInfo) -> int:
    """Elements of matrices that are neither embeddings nor the output head."""
    return sum(
        tensor.num_elements
        for tensor in facts.tensors
        if (len(tensor.shape) == 2 or _ALL_OF_A_LAYER.search(tensor.name))
        and not any(word in tensor.name for word in ("embed", "wte", "lm_head"))
    )


def _dtype_of_most(facts: FolderInfo) -> torch.dtype:
    elements: Counter[str] = Counter()
    for tensor in facts.tensors:
        elements[tensor.dtype] += tensor.num_elements
    most = max(elements, key=lambda name: elements[name], default="F32")
    return _DTYPES.get(most, torch.float32)
