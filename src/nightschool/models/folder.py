"""What lies in a model folder, seen without loading it: is it a causal language model in safetensors, how large is it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from nightschool.errors import Damaged, ModelError, NotFound
from nightschool.store.atomic import json_fault
from nightschool.store.versions import MEMORY_CONFIG

_PICKLES = ("pytorch_model.bin", "pytorch_model.bin.index.json", "model.pt", "model.pth")


@dataclass(frozen=True)
class TensorFact:
    """One tensor as a file declares it. `dtype` is the file's own word, such as `BF16`."""

    name: str
    shape: tuple[int, ...]
    file: str
    dtype: str

    @property
    def num_elements(self) -> int:
        count = 1
        for size in self.shape:
            count *= size
        return count


@dataclass(frozen=True)
class FolderInfo:
    """A folder that holds a causal language model."""

    path: Path
    model_type: str
    architecture: str | None
    tensors: tuple[TensorFact, ...]
    quantized: bool


def is_adapter_folder(folder: Path) -> bool:
    return (folder / "adapter_config.json").is_file()


def is_memory_folder(folder: Path) -> bool:
    """Whether it holds memory modules, whose base lies elsewhere."""
    return (folder / MEMORY_CONFIG).is_file()


def inspect_folder(folder: Path, ref: str) -> FolderInfo:
    """Look at `folder`, which the user calls `ref`.

    Raises:
        NotFound: If there is no folder.
        ModelError: If it holds no causal language model in safetensors.
        Damaged: If a file is truncated or missing.
    """
    if not folder.is_dir():
        raise NotFound(f"The base {ref!r} is not there: {folder} is not a folder. Name a folder with a config.json.")
    config = read_json(folder / "config.json", ref)
    model_type, architecture = _causal_architecture(config, ref)
    tensors = tuple(_tensors(folder, ref))
    return FolderInfo(folder, model_type, architecture, tensors, quantized="quantization_config" in config)


def read_json(path: Path, ref: str) -> dict[str, Any]:
    """A JSON object of a model folder.

    Raises:
        ModelError: If it is missing.
        Damaged: If it is no JSON object.
    """
    if not path.is_file():
        raise ModelError(
            f"The base {ref!r} has no {path.name} in {path.parent}. A model folder is written by save_pretrained."
        )
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise Damaged(
            f"{path} of the base {ref!r} is not JSON ({json_fault(error)}). Fetch or copy the folder again."
        ) from None
    if not isinstance(content, dict):
        raise Damaged(f"{path} of the base {ref!r} holds no JSON object. Fetch or copy the folder again.")
    return content


def _causal_architecture(config: dict[str, Any], ref: str) -> tuple[str, str | None]:
    model_type = str(config.get("model_type", ""))
    if not model_type:
        raise ModelError(f"config.json of the base {ref!r} names no model_type. It was not written by transformers.")
    mapped = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(model_type)
    known = {mapped} if isinstance(mapped, str) else set(mapped or ())
    architectures = config.get("architectures") or []
    named = architectures[0] if architectures else None
    if "auto_map" in config and not known:
        raise ModelError(
            f"The base {ref!r} ({model_type}) needs code of its own, which is never run. Take a base that transformers knows."
        )
    if not known or (named is not None and named not in known):
        what = named or model_type
        wanted = f" ({', '.join(sorted(known))} would be one)" if known else ""
        raise ModelError(
            f"The base {ref!r} is a {what}, which is not a causal language model{wanted}. Take a base that generates text."
        )
    return model_type, named


def _tensors(folder: Path, ref: str) -> Iterator[TensorFact]:
    for name in _weight_files(folder, ref):
        path = folder / name
        if not path.is_file():
            raise Damaged(
                f"The base {ref!r} is incomplete: {name} is missing in {folder}. Fetch or copy the folder again."
            )
        try:
            with safe_open(path, framework="pt") as file:
                for key in file.keys():  # noqa: SIM118 - no mapping
                    stored = file.get_slice(key)
                    yield TensorFact(key, tuple(stored.get_shape()), name, str(stored.get_dtype()))
        except (SafetensorError, OSError) as error:
            raise Damaged(
                f"{path} of the base {ref!r} cannot be read ({error}). Fetch or copy the folder again."
            ) from None


def _weight_files(folder: Path, ref: str) -> list[str]:
    if (folder / "model.safetensors").is_file():
        return ["model.safetensors"]
    if (folder / "model.safetensors.index.json").is_file():
        weight_map = read_json(folder / "model.safetensors.index.json", ref).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise Damaged(
                f"model.safetensors.index.json of the base {ref!r} names no files. Fetch or copy the folder again."
            )
        names = sorted({str(name) for name in weight_map.values()})
        if any("/" in name or "\\" in name or name.startswith(".") for name in names):
            raise Damaged(
                f"model.safetensors.index.json of the base {ref!r} names files outside its folder. Do not use it."
            )
        return names
    if any((folder / name).exists() for name in _PICKLES):
        raise ModelError(
            f"The base {ref!r} has its weights as pickles, which can run code when they are read. "
            "Convert it to safetensors, or take another revision."
        )
    raise ModelError(
        f"The base {ref!r} has no model.safetensors in {folder}. A model folder is written by save_pretrained."
    )
