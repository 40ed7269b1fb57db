"""Full weights that stay in memory while several models of this process stand on them."""

from __future__ import annotations

import copy
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from nightschool.models.load import LoadedModel, load_base, read_folder
from nightschool.store.home import Home

_Key = tuple[Path, str, torch.dtype, str, str | None]


class ResidentBases:
    """Bases by what was read of them. Whoever loads one gets a shell of its own over the same numbers.

    Nobody may change the numbers: an adapter that is kept apart does not.
    """

    def __init__(self) -> None:
        self._held: dict[_Key, tuple[PreTrainedModel, PreTrainedTokenizerBase]] = {}

    def load_base(self, ref: str, home: Home, **settings: Any) -> LoadedModel:
        """As `models.load.load_base`; with `merge=False`, full weights are read once."""
        return load_base(ref, home, **settings, read=None if settings.get("merge", True) else partial(self._read))

    def _read(
        self, folder: Path, ref: str, dtype: torch.dtype, device: torch.device | str, quantization: str | None
    ) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
        key = (folder.resolve(), ref, dtype, str(device), quantization)
        if key not in self._held:
            self._held[key] = read_folder(folder, ref, dtype, device, quantization)
        model, tokenizer = self._held[key]
        return shell_of(model), copy.copy(tokenizer)


def shell_of(model: PreTrainedModel) -> PreTrainedModel:
    """A model of modules and settings of its own, whose parameters and buffers are the very ones of `model`."""
    shared: list[torch.Tensor] = [*model.parameters(), *model.buffers()]
    shell: nn.Module = copy.deepcopy(model, {id(tensor): tensor for tensor in shared})
    assert isinstance(shell, PreTrainedModel)
    return shell
