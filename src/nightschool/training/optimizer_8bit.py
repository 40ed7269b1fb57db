"""AdamW whose moments take 8 bits each, in blocks with a scale of their own, by bitsandbytes: a quarter of the bytes.

Parameters of fewer than 4,096 elements keep moments of 32 bits. On a GPU the state may be paged: where memory is short the
driver moves it to the host. Source: Dettmers et al. 2022, arXiv 2110.02861.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from nightschool.errors import ModelError
from nightschool.training.optimizer import AdamW

NO_PAGES = (
    "train.optimizer is paged_adamw_8bit, and pages need a GPU: here it is adamw_8bit, whose state stays in memory."
)


class AdamW8bit(AdamW):
    """As `AdamW`; its state holds codes of 8 bits (`first_moment.…`) and their scales (`first_scale.…`)."""

    _KINDS: ClassVar[tuple[tuple[str, str], ...]] = (
        ("first_moment", "state1"),
        ("second_moment", "state2"),
        ("first_scale", "absmax1"),
        ("second_scale", "absmax2"),
        ("updates", "step"),
    )
    moment_bytes: ClassVar[int] = 2
    is_paged: ClassVar[bool] = False

    def _new_inner(self, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
        try:
            optim: Any = import_module("bitsandbytes.optim")
        except ImportError:
            raise ModelError(
                "train.optimizer is one of 8 bits, which bitsandbytes makes. Run: pip install 'nightschool[qlora]', or write adamw."
            ) from None
        settings = self.settings
        inner: torch.optim.Optimizer = optim.AdamW8bit(
            groups,
            lr=0.0,
            betas=(settings.beta1, settings.beta2),
            eps=settings.epsilon,
            is_paged=self._has_pages(groups),
        )
        return inner

    def _has_pages(self, groups: list[dict[str, Any]]) -> bool:
        return self.is_paged and all(parameter.is_cuda for group in groups for parameter in group["params"])

    def _new_state(self, parameter: nn.Parameter) -> dict[str, Any]:
        inner: Any = self.inner
        before = inner.state.pop(parameter, None)
        for number, group in enumerate(inner.param_groups):
            for place, member in enumerate(group["params"]):
                if member is parameter:
                    inner.init_state(group, parameter, number, place)
        fresh: dict[str, Any] = inner.state.pop(parameter)
        if before is not None:
            inner.state[parameter] = before
        return fresh

    def _take_state(
        self, name: str, parameter: nn.Parameter, fresh: dict[str, Any], tensors: Mapping[str, Tensor]
    ) -> None:
        for kind, key in self._KINDS:
            if kind == "updates":
                fresh[key] = int(tensors[f"updates.{name}"])
            elif key in fresh:
                fresh[key].copy_(tensors[f"{kind}.{name}"])
        self.inner.state[parameter] = fresh


class PagedAdamW8bit(AdamW8bit):
    """The same numbers; on a GPU, in pages that may leave it."""

    is_paged: ClassVar[bool] = True
