"""LoRA adapters by PEFT: attached with a seed, resumed from a folder, loaded only if every tensor fits.

What is reached is said by `lora.target_modules`, see `models.adapter_targets`; `describe_adapter` counts what really is.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, cast

import torch
from safetensors import SafetensorError, safe_open
from transformers import PreTrainedModel

from nightschool.errors import Damaged, ModelError
from nightschool.models.adapter_targets import (
    expert_weights,
    find_targets,
    kind,
    linear_layers,
    reached_layers,
    refuse_frozen,
)
from nightschool.models.expert_adapters import compute_beside, shown_whole
from nightschool.models.folder import read_json
from nightschool.models.peft_layers import is_adapted_layer
from nightschool.models.quiet import quiet_libraries

if TYPE_CHECKING:
    from peft import PeftModel


class LoraSettings(Protocol):
    """What is read of a recipe's `lora` section."""

    @property
    def r(self) -> int: ...
    @property
    def alpha(self) -> float: ...
    @property
    def dropout(self) -> float: ...
    @property
    def target_modules(self) -> str | list[str]: ...


@dataclass(frozen=True)
class AdapterInfo:
    """What an adapter trains, for the plan. `frozen_experts`: elements of expert tensors that it does not reach.

    `missed` are linear layers without an adapter, the output head not among them.
    """

    modules: tuple[str, ...]
    num_trainable: int
    num_frozen: int
    frozen_experts: int
    missed: tuple[str, ...] = ()

    @property
    def reached(self) -> dict[str, int]:
        """How many layers of each name have an adapter."""
        return dict(Counter(kind(name) for name in self.modules))

    @property
    def text(self) -> str:
        reached = ", ".join(f"{count} {name}" for name, count in self.reached.items())
        missed = sorted({kind(name) for name in self.missed})
        return f"{len(self.modules)} layers: {reached}" + (f"; not {', '.join(missed)}" if missed else "")

    @property
    def note(self) -> str:
        if not self.frozen_experts:
            return ""
        return f"{self.frozen_experts:,} parameters of experts stay frozen: no adapter reaches them."


def attach_lora(model: PreTrainedModel, lora: LoraSettings, seed: int, *, base_path: str | None = None) -> PeftModel:
    """Freeze `model` and add fresh adapters, the same ones for the same seed. The wrapped model is changed in place.

    `base_path` is written into the adapter's configuration as the base that it stands on.

    Raises:
        ModelError: If `target_modules` names nothing in this model, something that no adapter reaches, or the output head of a
            model whose head is tied.
    """
    from peft import LoraConfig, get_peft_model

    wanted = lora.target_modules
    targets = find_targets(model, wanted)
    config = LoraConfig(
        r=lora.r,
        lora_alpha=cast(int, lora.alpha),
        lora_dropout=lora.dropout,
        target_modules=targets.modules,
        target_parameters=targets.parameters or None,
        task_type="CAUSAL_LM",
        base_model_name_or_path=base_path,
    )
    with torch.random.fork_rng(), quiet_libraries(), shown_whole(model):
        torch.manual_seed(seed)
        try:
            wrapped = get_peft_model(model, config)
        except ValueError as error:
            if lora.dropout and "lora_dropout" in str(error):
                raise ModelError(
                    f"lora.dropout is {lora.dropout:g}, and adapters of experts cannot drop out. "
                    "Write lora.dropout: 0, or name linear layers in lora.target_modules."
                ) from None
            names = sorted({name.rsplit(".", 1)[-1] for name in linear_layers(model)})
            raise ModelError(
                f"lora.target_modules is {wanted!r}, which does not fit this model ({error}). "
                f"Write all-linear, or names among {', '.join(names)}."
            ) from None
    if model.config.get_text_config().tie_word_embeddings and is_adapted_layer(
        cast(Any, model).get_output_embeddings()
    ):
        raise ModelError(
            f"lora.target_modules is {wanted!r}, which names the output head, but the head of this model is its embedding: "
            "merging would change both. Leave the head out."
        )
    refuse_frozen(wrapped, targets, wanted)
    compute_beside(wrapped)
    # PEFT stores sets, whose order changes from process to process; a version should not.
    adapter = cast(LoraConfig, wrapped.peft_config["default"])
    for field in ("target_modules", "target_parameters"):
        names = getattr(adapter, field)
        setattr(adapter, field, sorted(names) if isinstance(names, set) else names)
    adapter.base_model_name_or_path = base_path
    return cast("PeftModel", wrapped)


def load_adapter(model: PreTrainedModel, folder: Path, *, trainable: bool) -> PeftModel:
    """Put the adapter of `folder` onto its base.

    Raises:
        Damaged: If a tensor is missing, unexpected, of another shape, or did not arrive as it lies in the file.
        ModelError: If the adapter does not fit this base.
    """
    from peft import PeftModel

    stored = _stored_shapes(folder)
    with quiet_libraries(), shown_whole(model):
        try:
            wrapped = PeftModel.from_pretrained(model, str(folder), is_trainable=trainable)
        except Exception as error:  # the files are foreign: peft raises whatever it stumbles over
            raise ModelError(
                f"The adapter {folder} does not fit its base: {error} Load it on the base that it was trained on."
            ) from None
    here = adapter_tensors(wrapped)
    wanted = {name: tuple(tensor.shape) for name, tensor in here.items()}
    if wanted != stored:
        wrong = sorted(set(wanted.items()) ^ set(stored.items()))[:4]
        raise Damaged(
            f"The adapter {folder} and its base disagree about {len(wrong)} tensors or more, such as {wrong[0]}. Publish it again."
        )
    with safe_open(folder / "adapter_model.safetensors", framework="pt") as file:
        for name, tensor in here.items():
            if not torch.equal(file.get_tensor(name).to(tensor.dtype), tensor.detach().cpu()):
                raise Damaged(
                    f"The tensor {name} of the adapter {folder} was not loaded as it is stored. Publish it again."
                )
    compute_beside(wrapped)
    wrapped.train(trainable)
    return wrapped


def merge_adapter(wrapped: PeftModel) -> PreTrainedModel:
    """The base with the adapter added into its weights; logits move by rounding only.

    Raises:
        ModelError: If the merged weights are not finite.
    """
    with quiet_libraries():
        merged = cast(PreTrainedModel, wrapped.merge_and_unload(safe_merge=False))
    for name, parameter in merged.named_parameters():
        parameter.requires_grad = True
        if not torch.isfinite(parameter).all():
            raise ModelError(
                f"Merging the adapter made {name} infinite or NaN. Train it again with a lower learning rate."
            )
    return merged


def adds_nothing(model: torch.nn.Module) -> bool:
    """Whether an adapter is as it was made, one of each two factors zero; so it is where there is no adapter."""
    zero_at_first = (".lora_B.", ".lora_embedding_A.")
    return not any(p.any() for name, p in model.named_parameters() if any(part in name for part in zero_at_first))


@contextmanager
def fresh_adapter_left_out(model: torch.nn.Module) -> Iterator[None]:
    """A block in which an adapter that adds nothing yet takes no time."""
    with adapter_left_out(model) if adds_nothing(model) else nullcontext():
        yield


@contextmanager
def adapter_left_out(model: torch.nn.Module) -> Iterator[None]:
    """A block in which a model is what stands below its adapter, if it has one; what learns stays what learned."""
    if not hasattr(model, "disable_adapter"):
        yield
        return
    learns = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        with cast(Any, model).disable_adapter():
            yield
    finally:  # PEFT lets all of an adapter learn that is switched on again
        for parameter, did in learns:
            parameter.requires_grad = did


def adapter_tensors(wrapped: PeftModel) -> dict[str, torch.Tensor]:
    """The adapter's tensors under the names of its file."""
    from peft import get_peft_model_state_dict

    return cast(dict[str, torch.Tensor], get_peft_model_state_dict(wrapped, save_embedding_layers=False))


def describe_adapter(wrapped: PeftModel) -> AdapterInfo:
    reached = reached_layers(wrapped)
    trainable = sum(p.numel() for p in wrapped.parameters() if p.requires_grad)
    frozen = sum(p.numel() for p in wrapped.parameters() if not p.requires_grad)
    experts = {name: size for name, size in expert_weights(wrapped).items() if name not in reached}
    missed = [name for name in linear_layers(wrapped) if name not in reached]
    return AdapterInfo(tuple(sorted(reached)), trainable, frozen, sum(experts.values()), tuple(missed))


def adapter_base(folder: Path) -> str | None:
    """The base that an adapter folder names."""
    base = read_json(folder / "adapter_config.json", str(folder)).get("base_model_name_or_path")
    return str(base) if base else None


def _stored_shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    path = folder / "adapter_model.safetensors"
    if not path.is_file():
        raise ModelError(
            f"The adapter {folder} has no adapter_model.safetensors. Adapters are read from safetensors only."
        )
    try:
        with safe_open(path, framework="pt") as file:
            return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118 - no mapping
    except (SafetensorError, OSError) as error:
        raise Damaged(f"{path} cannot be read ({error}). Publish the adapter again.") from None
