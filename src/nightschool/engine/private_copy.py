"""A model under settings of its own, with the weights of another."""

from __future__ import annotations

import copy
from itertools import chain
from typing import Any, cast

from torch import nn


def private_copy(model: nn.Module) -> nn.Module:
    """The same modules and the same tensors under a new configuration."""
    shared = {id(tensor): tensor for tensor in chain(model.parameters(), model.buffers())}
    # deepcopy keeps what its memo knows, so that only the Python objects around the tensors are copied.
    private = copy.deepcopy(model, cast(dict[int, Any], shared))
    return private.eval()
