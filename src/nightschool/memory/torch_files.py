"""The documents' files: `knowledge_cache.pt`, `keys.pt` and `meta.json`, read as they were written, and written.

`knowledge_cache.pt` holds the token ids of entries, int64 [knowledge_num, knowledge_length]; int32 is read as well. `keys.pt` holds
codebooks, [2, √knowledge_num, knowledge_dim / 2], or a key for each entry, [knowledge_num, knowledge_dim]. The one module of this
room that imports torch, and only when a file is read or written: `torch.load` takes plain tensors alone (`weights_only`) and
maps them, so that the size is known before a byte is read.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from math import isqrt
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import psutil

from nightschool.errors import Damaged, DataError, NotFound
from nightschool.memory.encoders.heads import normalised
from nightschool.store.atomic import read_json, replacing, write_json

CACHE, KEYS, META = "knowledge_cache.pt", "keys.pt", "meta.json"
Floats = npt.NDArray[np.float32]
Tokens = npt.NDArray[np.int32]

# A bank of hidden states is refused when it takes more than this share of what is free.
_SHARE_OF_FREE = 0.5


@dataclass(frozen=True)
class BankMeta:
    """`meta.json`: `{"knowledge_num": int, "embedding_dim": int, "keys_path": str}`."""

    knowledge_num: int
    knowledge_dim: int
    keys_path: str


def check_sizes(knowledge_num: int, knowledge_dim: int) -> None:
    """Raises DataError unless `knowledge_num` is a perfect square and `knowledge_dim` even, naming what would do."""
    root = isqrt(max(knowledge_num, 0))
    if knowledge_num < 1 or root * root != knowledge_num:
        raise DataError(
            f"knowledge_num is {knowledge_num}, and product keys take a perfect square. The next one is {(root + 1) ** 2}."
        )
    if knowledge_dim < 2 or knowledge_dim % 2:
        raise DataError(
            f"knowledge_dim is {knowledge_dim}, and a key has two halves. Write {max(2, knowledge_dim + knowledge_dim % 2)}."
        )


def read_cache(path: Path, *, vocab_size: int) -> Tokens:
    """The token ids of a `knowledge_cache.pt`, [knowledge_num, knowledge_length].

    Args:
        path: The file.
        vocab_size: Of the tokenizer that reads the entries: an id beyond it means that another one wrote them.

    Raises:
        NotFound: If there is no such file.
        Damaged: If it is no file of plain tensors.
        DataError: If it is something else than a bank of tokens of this tokenizer; a bank of hidden states is refused with its size.
    """
    tensor = _tensor(path)
    shape = tuple(tensor.shape)
    if tensor.is_floating_point():
        size, free = tensor.numel() * tensor.element_size(), psutil.virtual_memory().available
        too_large = f", more than half of the {_gib(free)} that are free" if size > _SHARE_OF_FREE * free else ""
        raise DataError(
            f"{path} holds hidden states {list(shape)} ({tensor.dtype}, {_gib(size)}{too_large}), and a bank holds token ids "
            f"[knowledge_num, knowledge_length]. Build it again from its texts: nightschool memory build."
        )
    if tensor.ndim != 2 or str(tensor.dtype) not in ("torch.int32", "torch.int64") or 0 in shape:
        raise DataError(
            f"{path} holds {tensor.dtype} {list(shape)}; token ids [knowledge_num, knowledge_length] in int32 or int64 belong there."
        )
    check_sizes(shape[0], 2)
    lowest, highest = int(tensor.min()), int(tensor.max())
    if lowest < 0 or highest >= vocab_size:
        wrong = lowest if lowest < 0 else highest
        raise DataError(
            f"{path} has the token {wrong}, and this tokenizer has {vocab_size}: another one wrote it. Build it again from its texts."
        )
    tokens: Tokens = tensor.numpy().astype(np.int32)
    return tokens


def read_keys(path: Path, *, knowledge_dim: int, knowledge_num: int | None = None) -> Floats:
    """The codebooks of a `keys.pt`, [2, √knowledge_num, knowledge_dim / 2], as unit vectors.

    A file with a key for each entry gives, for each half, evenly chosen ones of its keys.

    Args:
        path: The file.
        knowledge_dim: Numbers of an address.
        knowledge_num: Cells; without it, as many as the file has keys for.

    Raises:
        NotFound, Damaged: As `read_cache`.
        DataError: If the shape fits neither, with both; or a key is no direction.
    """
    tensor = _tensor(path)
    shape = tuple(tensor.shape)
    if knowledge_num is None:
        knowledge_num = shape[1] ** 2 if len(shape) == 3 else shape[0] if len(shape) == 2 else 1
    check_sizes(knowledge_num, knowledge_dim)
    root, half = isqrt(knowledge_num), knowledge_dim // 2
    if not tensor.is_floating_point() or shape not in ((2, root, half), (knowledge_num, knowledge_dim)):
        raise DataError(
            f"{path} holds {tensor.dtype} {list(shape)}; codebooks {[2, root, half]} or keys {[knowledge_num, knowledge_dim]} belong "
            f"there, with knowledge_num {knowledge_num} and knowledge_dim {knowledge_dim}."
        )
    if shape != (2, root, half):
        chosen = tensor[:: knowledge_num // root][:root]
        tensor = chosen.reshape(root, 2, half).permute(1, 0, 2)
    codebooks: Floats = tensor.float().numpy()
    if not np.isfinite(codebooks).all():
        raise DataError(f"{path} holds numbers that are not finite. Make the keys again: nightschool memory keys.")
    if not np.linalg.norm(codebooks, axis=2).all():
        raise DataError(
            f"{path} holds keys that are 0 throughout, which point nowhere. Make the keys again: nightschool memory keys."
        )
    return normalised(codebooks)


def write_cache(path: Path, tokens: npt.NDArray[np.integer]) -> None:
    """Write token ids as `knowledge_cache.pt`, in int64 and padded with empty entries up to the next perfect square."""
    root = isqrt(max(len(tokens) - 1, 0)) + 1
    whole = tokens.astype(np.int64, copy=False)
    if len(tokens) < root * root:
        whole = np.concatenate([whole, np.zeros((root * root - len(tokens), tokens.shape[1]), np.int64)])
    _save(path, whole)


def write_keys(folder: Path, codebooks: Floats) -> None:
    """Write `keys.pt`, [2, √knowledge_num, knowledge_dim / 2], and the `meta.json` beside it that says so."""
    _, root, half = codebooks.shape
    _save(folder / KEYS, np.ascontiguousarray(codebooks, np.float32))
    write_json(folder / META, {"knowledge_num": root * root, "embedding_dim": 2 * half, "keys_path": KEYS})


def read_meta(path: Path) -> BankMeta:
    """A `meta.json`.

    Raises:
        NotFound, Damaged: If it is not there, or no JSON object.
        DataError: If it lacks something, or its sizes cannot be.
    """
    content = read_json(path)
    try:
        meta = BankMeta(int(content["knowledge_num"]), int(content["embedding_dim"]), str(content["keys_path"]))
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(f"{path} lacks {error}; knowledge_num, embedding_dim and keys_path belong there.") from error
    check_sizes(meta.knowledge_num, meta.knowledge_dim)
    return meta


def _tensor(path: Path) -> Any:
    import torch

    if not path.is_file():
        raise NotFound(
            f"{path} is not there. Check the name, or make it: nightschool memory build, nightschool memory keys."
        )
    try:
        loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # a foreign file can break the reader in any way
        # Without what PyTorch says, which is how to run such a file all the same.
        raise Damaged(
            f"{path} is no file of plain tensors: it holds other objects, or is damaged. Nothing of it was run; make it again."
        ) from error
    if isinstance(loaded, dict) and loaded:
        raise DataError(
            f"{path} holds a dict ({', '.join(map(str, list(loaded)[:3]))} …), and one tensor belongs there. Weights of a gate or fusion "
            "have no entries in them."
        )
    if not isinstance(loaded, torch.Tensor):
        raise DataError(f"{path} holds a {type(loaded).__name__}, and one tensor belongs there.")
    stored, needed = loaded.untyped_storage().nbytes(), loaded.numel() * loaded.element_size()
    if stored < needed:  # a few bytes that are repeated over a shape, which would take hours to look at
        raise DataError(
            f"{path} holds {_gib(stored)} of numbers for {list(loaded.shape)}, which takes {_gib(needed)}. Save the tensor as it is, .contiguous()."
        )
    return loaded


def _save(path: Path, array: npt.NDArray[Any]) -> None:
    import torch

    with replacing(path) as handle, os.fdopen(os.dup(handle), "wb") as file:
        torch.save(torch.from_numpy(array), file)


def _gib(size: float) -> str:
    return f"{size / 2**30:.1f} GiB"
