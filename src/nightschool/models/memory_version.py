"""A version that is a base with an explicit memory: its memory modules in safetensors, and the names of both.

The folder holds what reads (`memory_model.safetensors`), what finds (`memory_gate.safetensors`, which encoders without torch read,
too), `memory_config.json` and the tokenizer; the base lies elsewhere and is never copied.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn
from transformers import PreTrainedTokenizerBase

from nightschool.errors import Damaged, ModelError
from nightschool.models.folder import read_json
from nightschool.models.memory_modules import MemoryModules, MemoryShape
from nightschool.store.atomic import room_needed
from nightschool.store.versions import MEMORY_CONFIG

WEIGHTS, GATE = "memory_model.safetensors", "memory_gate.safetensors"

FORMAT = 2
"""Of the modules in a folder. 1, which has no number, told subject and relation of an entry with one answer, from words alone."""


@dataclass(frozen=True)
class MemoryVersion:
    """What the modules stand on: the reference of the base, and the memory that they read, at the revision of that moment.

    `memory` is None where any memory can be read; `revision` is None where it did not exist yet.
    """

    base: str
    memory: str | None = None
    revision: int | None = None


def save_memory_folder(
    modules: MemoryModules, version: MemoryVersion, tokenizer: PreTrainedTokenizerBase, folder: Path
) -> None:
    """Write the modules into `folder`, which is created if needed.

    Raises:
        DiskFull: If there is no room.
    """
    with room_needed(folder):
        folder.mkdir(parents=True, exist_ok=True)
        save_file(_plain(modules.reader), folder / WEIGHTS, {"format": "pt"})
        facts = {"format": "pt", "encoder": "base", "knowledge_dim": str(modules.shape.knowledge_dim)}
        save_file(gate_heads(modules), folder / GATE, facts)
        config = {
            "format": FORMAT,
            "base": version.base,
            "memory": version.memory,
            "revision": version.revision,
            "shape": modules.shape.to_json(),
        }
        (folder / MEMORY_CONFIG).write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")
        tokenizer.save_pretrained(str(folder))


def memory_version(folder: Path) -> MemoryVersion:
    """What the modules of a folder stand on, without reading them. Raises Damaged if its configuration is broken."""
    config = read_json(folder / MEMORY_CONFIG, str(folder))
    try:
        return MemoryVersion(str(config["base"]), config.get("memory"), config.get("revision"))
    except (KeyError, TypeError) as error:
        raise Damaged(f"{folder / MEMORY_CONFIG} names no base ({error}). Publish the version again.") from None


def read_memory_folder(folder: Path) -> tuple[MemoryModules, MemoryVersion]:
    """The modules on the CPU, and what they stand on.

    Raises:
        Damaged: If a file is broken, or a tensor is missing, unexpected, or of another shape.
        ModelError: If the modules are of another format than this version reads.
    """
    config = read_json(folder / MEMORY_CONFIG, str(folder))
    stored_format = config.get("format", 1)
    if stored_format != FORMAT:
        raise ModelError(
            f"The memory modules in {folder} are of format {stored_format}, and this nightschool reads format {FORMAT}: what tells "
            "whether an entry fits its question differs. Train them again (method: memory) on the same base and data."
        )
    try:
        shape = MemoryShape(**(config["shape"] | {"fusion_layers": tuple(config["shape"]["fusion_layers"])}))
        version = MemoryVersion(str(config["base"]), config.get("memory"), config.get("revision"))
        modules = MemoryModules(shape)
    except (KeyError, TypeError, ValueError, RuntimeError, ModelError) as error:
        raise Damaged(
            f"{folder / MEMORY_CONFIG} describes no memory modules ({error}). Publish the version again."
        ) from None
    for part, name in ((modules.reader, WEIGHTS), (modules.gate, GATE)):
        stored, here = _tensors(folder / name), part.state_dict()
        wrong = sorted(set(stored) ^ set(here))
        wrong += [key for key, tensor in stored.items() if key in here and tensor.shape != here[key].shape]
        if wrong:
            raise Damaged(
                f"{folder / name} does not fit its configuration: {len(wrong)} tensors differ, such as {wrong[0]}. "
                "Publish the version again."
            )
        part.load_state_dict(stored)
    return modules, version


def prove_memory_folder(modules: MemoryModules, version: MemoryVersion, folder: Path) -> float:
    """Read the folder again and compare it bit by bit with what was trained; returns 0.0, the largest difference.

    Raises:
        ModelError: If anything differs.
    """
    again, stands_on = read_memory_folder(folder)
    there = again.state_dict()
    differing = [
        name for name, tensor in modules.state_dict().items() if not torch.equal(tensor.detach().cpu(), there[name])
    ]
    if differing or stands_on != version or again.shape != modules.shape:
        raise ModelError(
            f"The folder {folder} is not what was trained: {differing[0] if differing else MEMORY_CONFIG} differs. "
            "It is not published; what it was made from is still whole."
        )
    return 0.0


def gate_heads(modules: MemoryModules) -> dict[str, torch.Tensor]:
    """The tensors of the gate under the names that encoders without torch know: `subject.attention` and so on."""
    return _plain(modules.gate)


def _plain(module: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().cpu().contiguous() for name, tensor in module.state_dict().items()}


def _tensors(path: Path) -> dict[str, torch.Tensor]:
    if not path.is_file():
        raise Damaged(f"There is no {path}. Publish the version again.")
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping
    except (SafetensorError, OSError) as error:
        raise Damaged(f"{path} cannot be read ({error}). Publish the version again.") from None
