"""What a base takes, before it is loaded: how many elements its files hold, and in which number format."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import torch

from nightschool.models.folder import FolderInfo, inspect_folder
from nightschool.models.load import Located, down_to_weights, load_config, locate, located_version
from nightschool.store.home import Home
from nightschool.store.registry import Version

_DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16}


@dataclass(frozen=True)
class StoredWeights:
    """The full weights that a reference stands on.

    `num_elements` counts those of the model, adapters on it not included. `dtype` is the format of most of them: bf16
    or fp16; fp32 for all others, and where adapters were merged on the way, because a sum is rounded to no less.
    """

    num_elements: int
    dtype: torch.dtype
    hidden_size: int


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
    return StoredWeights(
        num_elements=sum(tensor.num_elements for tensor in facts.tensors),
        dtype=torch.float32 if len(adapters) > 1 else _dtype_of_most(facts),
        hidden_size=int(config.get_text_config().hidden_size),
    )


def _dtype_of_most(facts: FolderInfo) -> torch.dtype:
    elements: Counter[str] = Counter()
    for tensor in facts.tensors:
        elements[tensor.dtype] += tensor.num_elements
    most = max(elements, key=lambda name: elements[name], default="F32")
    return _DTYPES.get(most, torch.float32)
