"""Whether something is PEFT's, asked without importing PEFT: that takes seconds, and where nobody has, nothing is.

What makes or loads an adapter imports PEFT in the function that does it, so runs of full weights and servers without
adapters start without it.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from peft import PeftModel
    from peft.tuners.lora import ParamWrapper
    from peft.tuners.tuners_utils import BaseTunerLayer
    from typing_extensions import TypeIs


def is_adapted(model: object) -> TypeIs[PeftModel]:
    """Whether this is a model that PEFT wraps."""
    return _is_one(model, "peft", "PeftModel")


def is_adapted_layer(module: object) -> TypeIs[BaseTunerLayer]:
    """Whether this is a layer, or a tensor's wrapper, that PEFT adapts."""
    return _is_one(module, "peft.tuners.tuners_utils", "BaseTunerLayer")


def is_adapted_parameter(module: object) -> TypeIs[ParamWrapper]:
    """Whether this is a module of which PEFT adapts a bare tensor."""
    return _is_one(module, "peft.tuners.lora", "ParamWrapper")


def _is_one(thing: object, module: str, name: str) -> bool:
    # While another thread imports it, the module is there and its class may not be.
    found = getattr(sys.modules.get(module), name, None)
    return found is not None and isinstance(thing, found)
