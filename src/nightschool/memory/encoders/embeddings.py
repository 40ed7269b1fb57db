"""The token embeddings of a base, mapped from its folder: no torch, and nothing read but the rows that are asked for."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from nightschool.checkpoint_writer.tensorfile_places import TensorPlace, tensor_places
from nightschool.errors import ModelError, NotFound

Floats = npt.NDArray[np.float32]

_INDEX, _SINGLE = "model.safetensors.index.json", "model.safetensors"
# How architectures call the table of their tokens.
_NAMES = ("embed_tokens.weight", "wte.weight", "embed_in.weight", "word_embeddings.weight", "tok_embeddings.weight")
_TYPES: dict[str, np.dtype[Any]] = {"F32": np.dtype("<f4"), "F16": np.dtype("<f2"), "BF16": np.dtype("<u2")}


class TokenEmbeddings:
    """Rows of the table [V, H] as float32."""

    def __init__(self, table: npt.NDArray[Any], *, is_bfloat16: bool = False) -> None:
        self._table, self._is_bfloat16 = table, is_bfloat16

    @classmethod
    def of_folder(cls, folder: Path) -> TokenEmbeddings:
        """Those of a model's folder, in safetensors.

        Raises:
            NotFound: If there are no safetensors in it.
            ModelError: If they hold no table of tokens, or one of other numbers than F32, F16 and BF16.
        """
        path, name = _file_of(folder)
        place = _places(path).get(name)
        if place is None:
            raise ModelError(f"The header of {path} does not describe {name!r}. Copy the model's folder again.")
        dtype, shape = _TYPES.get(place.dtype), place.shape
        if dtype is None or len(shape) != 2:
            raise ModelError(f"{name!r} in {path} is {place.dtype} {[*shape]}; a table of F32, F16 or BF16 is needed.")
        table = np.memmap(path, dtype, "r", place.begin, (shape[0], shape[1]))
        return cls(table.view(np.ndarray), is_bfloat16=place.dtype == "BF16")

    @property
    def vocab_size(self) -> int:
        return int(self._table.shape[0])

    @property
    def hidden_size(self) -> int:
        return int(self._table.shape[1])

    def rows(self, tokens: npt.ArrayLike) -> Floats:
        """The embeddings of token ids [...] → [..., H]."""
        found = self._table[np.asarray(tokens)]
        wide: Floats = (
            (found.astype(np.uint32) << 16).view(np.float32) if self._is_bfloat16 else found.astype(np.float32)
        )
        return wide


def _places(path: Path) -> dict[str, TensorPlace]:
    try:
        return tensor_places(path)
    except (OSError, ValueError) as error:
        raise ModelError(f"{path} is no safetensors file: {error}. Copy the model's folder again.") from error


def _file_of(folder: Path) -> tuple[Path, str]:
    """The file with the table of tokens, and the table's name in it."""
    if (folder / _INDEX).is_file():
        try:
            places: dict[str, str] = json.loads((folder / _INDEX).read_text())["weight_map"]
        except (ValueError, KeyError) as error:
            raise ModelError(f"{folder / _INDEX} lists no weights ({error}). Copy the model's folder again.") from error
    elif (folder / _SINGLE).is_file():
        places = dict.fromkeys(_places(folder / _SINGLE), _SINGLE)
    else:
        raise NotFound(f"{folder} has no {_SINGLE}, so the token embeddings of the base cannot be read.")
    for name in _NAMES:
        for full in places:
            if full == name or full.endswith(f".{name}"):
                file_name = places[full]
                if Path(file_name).name != file_name:
                    raise ModelError(f"{folder / _INDEX} points outside of its folder: {file_name!r}.")
                return folder / file_name, full
    raise ModelError(f"{folder} has no table of tokens among its weights (looked for {', '.join(_NAMES)}).")
