"""What a base takes, before it is loaded: how many elements its files hold, and in which number format."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoConfig

from nightschool.errors import ModelError
from nightschool.models.adapters import adapter_base
from nightschool.models.folder import FolderInfo, inspect_folder, is_adapter_folder
from nightschool.models.hub import fetch_from_hub
from nightschool.models.load import as_path, plain_folder
from nightschool.models.quiet import quiet_libraries
from nightschool.store.home import Home
from nightschool.store.registry import Registry, Version

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
        ModelError, Damaged: If it is no causal language model, or a file is broken.
    """
    return _inspect(ref, home, root, num_adapters=0)


def stored_weights_of(version: Version, home: Home) -> StoredWeights:
    """The same for a published version."""
    return _of_folder(version.path, version.ref, home, version.facts.base, num_adapters=0)


def _inspect(ref: str, home: Home, root: Path | None, *, num_adapters: int) -> StoredWeights:
    path = as_path(ref, root)
    if path is not None:
        return _of_folder(plain_folder(path, home), ref, home, None, num_adapters=num_adapters)
    registry = Registry(home)
    if "@" in ref or ref in registry.names():
        version = registry.resolve(ref)
        return _of_folder(version.path, version.ref, home, version.facts.base, num_adapters=num_adapters)
    return _of_folder(fetch_from_hub(ref), ref, home, None, num_adapters=num_adapters)


def _of_folder(folder: Path, ref: str, home: Home, base: str | None, *, num_adapters: int) -> StoredWeights:
    if is_adapter_folder(folder):
        base = base or adapter_base(folder)
        if base is None:
            raise ModelError(f"The adapter {ref!r} names no base. Publish it again with its base.")
        return _inspect(base, home, None, num_adapters=num_adapters + 1)
    facts = inspect_folder(folder, ref)
    with quiet_libraries():
        config = AutoConfig.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
    return StoredWeights(
        num_elements=sum(tensor.num_elements for tensor in facts.tensors),
        dtype=torch.float32 if num_adapters > 1 else _dtype_of_most(facts),
        hidden_size=int(config.get_text_config().hidden_size),
    )


def _dtype_of_most(facts: FolderInfo) -> torch.dtype:
    elements: Counter[str] = Counter()
    for tensor in facts.tensors:
        elements[tensor.dtype] += tensor.num_elements
    most = max(elements, key=lambda name: elements[name], default="F32")
    return _DTYPES.get(most, torch.float32)
