"""Method `qlora`: an adapter on a base whose linear layers are quantised (Dettmers et al. 2023, arXiv 2305.14314)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from nightschool.config.recipe import Recipe
from nightschool.errors import ModelError
from nightschool.models.load import LoadedModel
from nightschool.models.quantize import compute_in
from nightschool.models.stored import StoredWeights, stored_weights
from nightschool.store.names import split_quantization
from nightschool.training.methods.finetune import FinetuneData, FinetuneTask
from nightschool.training.methods.lora import LoraFinetune
from nightschool.training.methods.prepared import Setup

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True, kw_only=True)
class QloraFinetune(LoraFinetune):
    """Fine-tuning of an adapter on a quantised base."""

    @classmethod
    def base_of(cls, recipe: Recipe) -> str:
        _, given = split_quantization(recipe.base)
        return recipe.base if given is not None else f"{recipe.base}[{recipe.quantization.label}]"

    @classmethod
    def stored_in_16_bits(cls, setup: Setup) -> StoredWeights | None:
        """What is not quantised of the base may stay in 16 bits; nothing is measured, the products being bitsandbytes'."""
        if setup.recipe.base.startswith("new:"):
            return None
        return stored_weights(setup.recipe.base, setup.home, setup.root)

    @classmethod
    def load(cls, recipe: Recipe, load: Callable[..., LoadedModel]) -> LoadedModel:
        loaded = super().load(recipe, load)
        _, has = split_quantization(loaded.base_ref)
        if has != recipe.quantization.label:
            raise ModelError(
                f"The recipe asks for {recipe.quantization.label}, but {loaded.ref} stands on {loaded.base_ref}. Write its "
                "quantization, or start again from its base."
            )
        return loaded

    @classmethod
    def make_task(
        cls, setup: Setup, data: FinetuneData, loaded: LoadedModel, compute_dtype: torch.dtype
    ) -> tuple[FinetuneData, FinetuneTask]:
        compute_in(loaded.model, _DTYPES.get(setup.recipe.quantization.compute_dtype, compute_dtype))
        return super().make_task(setup, data, loaded, compute_dtype)

    def numerics(self) -> dict[str, Any]:
        quantization = self.recipe.quantization.model_dump(mode="json").items()
        return super().numerics() | {f"quantization.{key}": value for key, value in quantization}
