"""Files of weights that are no model: what PyTorch saved of a part of one, such as ExplicitLM's `memory_gate.pth` and `fusion_weights.pth`."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NoReturn

import torch

from nightschool.errors import Damaged, ModelError, NotFound

ENDINGS = (".pth", ".pt")
_SHOWN = 3


def refuse_weights_file(path: Path, ref: str) -> NoReturn:
    """Say what a file holds that was named as a base, and why nothing can begin with it.

    Raises:
        NotFound: If there is no such file.
        Damaged: If it holds anything but plain tensors; nothing of it is run.
        ModelError: If it holds tensors, with their sizes beside those of a memory gate.
    """
    if not path.is_file():
        raise NotFound(f"{ref} is not there. Check the path.")
    try:
        loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # a foreign file can break the reader in any way
        # Without what PyTorch says, which is how to run such a file all the same.
        raise Damaged(
            f"{ref} is no file of plain tensors: it holds other objects, or is damaged. Nothing of it was run."
        ) from error
    tensors = _tensors(loaded)
    shown = [f"{name} {list(tensor.shape)}" for name, tensor in list(tensors.items())[:_SHOWN]]
    more = ", …" if len(tensors) > _SHOWN else ""
    raise ModelError(
        f"{ref} holds {len(tensors)} tensors ({', '.join(shown)}{more}), and a base is a folder, a GGUF file, a version or a hub id. If they "
        "are of ExplicitLM's gate or fusion, they fit no layer here, whatever their sizes: a memory gate has two heads of attention [H], "
        "projection.a [rank, H] and projection.b [knowledge_dim / 2, rank], which pool token embeddings of width H. Teach one to the base: "
        "nightschool train recipes/memory-router.yaml."
    )


def _tensors(loaded: Any) -> dict[str, torch.Tensor]:
    """The tensors of a state dictionary, bare or as `{"head": …, "memory_gate_cfg": …}`, or of a file with one."""
    if isinstance(loaded, torch.Tensor):
        return {"one": loaded}
    whole = loaded if isinstance(loaded, dict) else {}
    inner = {
        f"{name}.{key}": value for name, part in whole.items() if isinstance(part, dict) for key, value in part.items()
    }
    return {str(name): value for name, value in (whole | inner).items() if isinstance(value, torch.Tensor)}
