"""Methods on top of `lora`: fine-tuning of an adapter on a base that stays as it is."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from transformers import PreTrainedModel

from nightschool.config.recipe import Recipe
from nightschool.errors import ModelError, UsageError
from nightschool.models.adapter_targets import find_targets, kind, reached_layers
from nightschool.models.adapters import adds_nothing, attach_lora, describe_adapter
from nightschool.models.cost import stored_bytes_by_kind
from nightschool.models.load import LoadedModel
from nightschool.models.quantize import num_elements, stored_bytes
from nightschool.models.stored import StoredWeights, stored_weights
from nightschool.models.streamed import expert_stream
from nightschool.store.names import split_quantization
from nightschool.training import null_space
from nightschool.training.checkpoint.full_state import frozen_fingerprint
from nightschool.training.methods.finetune import Finetune
from nightschool.training.methods.prepared import MethodPlan, Setup
from nightschool.training.metrics import say
from nightschool.training.planning.asking import Asking
from nightschool.training.planning.plan_row import PlanRow
from nightschool.units import format_bytes

if TYPE_CHECKING:
    from peft import PeftModel


@dataclass(frozen=True, kw_only=True)
class LoraFinetune(Finetune):
    """Fine-tuning of an adapter, a fresh one or the base's own, below which everything is frozen."""

    @classmethod
    def stored_in_16_bits(cls, setup: Setup) -> StoredWeights | None:
        """The base if its files hold 16-bit numbers, which need not be widened: nothing is added to them."""
        if setup.recipe.base.startswith("new:"):
            return None
        stored = stored_weights(setup.recipe.base, setup.home, setup.root)
        return None if stored.dtype == torch.float32 else stored

    @classmethod
    def load(cls, recipe: Recipe, load: Callable[..., LoadedModel]) -> LoadedModel:
        if recipe.base.startswith("new:"):
            raise UsageError(
                f"method: {recipe.method} needs a base that knows something, and base: {recipe.base} is made of random weights. "
                "Write method: full, or another base."
            )
        loaded = load(merge=False)
        if loaded.adapter:
            _refuse_other_lora(cast("PeftModel", loaded.model), recipe, loaded.ref)
            if recipe.lora.init == "null_space":
                null_space.freeze(loaded.model)
            return loaded
        frozen = cast(PreTrainedModel, loaded.model)
        wrapped = attach_lora(frozen, recipe.lora, recipe.train.seed, base_path=loaded.base_location)
        _refuse_unserved_routers(wrapped, recipe)
        if recipe.lora.init == "null_space" and not null_space.freeze(wrapped):
            raise ModelError(
                f"lora.init is null_space, which is for linear layers, and lora.target_modules ({recipe.lora.target_modules}) reaches none. "
                "Name some, or take lora.init out."
            )
        return replace(loaded, model=wrapped, adapter=True)

    @property
    def looks_at_all_answers(self) -> bool:
        """Where directions are drawn: of few answers too many would seem idle."""
        return self.recipe.lora.init == "null_space" and adds_nothing(self.task.model)

    def begin(self, folder: Path) -> None:
        """Say what the adapter reaches: what learns nothing should not look like success."""
        super().begin(folder)
        if self.recipe.lora.init == "null_space":
            self._take_directions(folder)
        if self.task.world.rank == 0:
            info = describe_adapter(cast("PeftModel", self.task.model))
            say(f"Adapter of rank {self.recipe.lora.r} on {info.text}. {info.note}".strip())

    def _take_directions(self, folder: Path) -> None:
        """Have a fresh adapter learn where the answers that are rehearsed leave room; one that goes on has its directions already."""
        model, task, path = self.task.model, self.task, folder / null_space.FILE
        if not adds_nothing(model):
            say(f"{self.loaded.ref} goes on learning in the directions that it has")
            return
        if task.rehearsal is None:
            say(
                f"{self.loaded.ref} says nothing that could be kept out of the adapter's way, so its directions stay as they were drawn"
            )
            return
        with task.world.first_goes_first():
            drawn = null_space.read(path)
            if drawn is None:
                say("Looking for directions that general answers hardly use")
                documents = task.rehearsal.documents
                null_space.write(path, null_space.draw(model, task.path, documents, self.recipe.train.seed))
                drawn = null_space.read(path)
            assert drawn is not None
            null_space.place(model, drawn)

    def asking(self) -> Asking | None:
        """With the directions that a fresh adapter will learn in."""
        asking, rehearsal = super().asking(), self.task.rehearsal
        if self.recipe.lora.init != "null_space" or rehearsal is None or not rehearsal.stands_in:
            return asking
        documents = rehearsal.documents
        seconds = null_space.seconds_to_draw(self.task.model, self.task.path, documents[0], len(documents))
        return replace(asking or Asking(), before=(*(asking.before if asking else ()), ("directions", seconds)))

    def plan_rows(self, num_processes: int) -> MethodPlan:
        """With what the adapter reaches, and how the base below it is kept."""
        plan = super().plan_rows(num_processes)
        info = describe_adapter(cast("PeftModel", self.task.model))
        facts = {"adapter_layers": info.reached, "adapter_missed": list(info.missed)}
        rows = [PlanRow("adapter", f"rank {self.recipe.lora.r} on {info.text}", facts)]
        _, quantization = split_quantization(self.loaded.base_ref)
        if quantization is not None:
            taken = stored_bytes(self.task.model)
            plain = sum(4 * num_elements(parameter) for parameter in self.task.model.parameters())
            kinds = stored_bytes_by_kind(self.task.model)
            of_kinds = ", ".join(f"{kind.replace('_', ' ')} {format_bytes(of_kind)}" for kind, of_kind in kinds.items())
            text = f"{quantization}: {format_bytes(taken)} with what is not quantised ({of_kinds}), in fp32 {format_bytes(plain)}"
            taken_facts = {"quantization": quantization, "parameter_bytes": taken, "parameter_bytes_by_kind": kinds}
            rows.append(PlanRow("quantised", text, taken_facts))
        before = 0
        if self.recipe.lora.init == "null_space" and adds_nothing(self.task.model):
            before = null_space.bytes_to_draw(self.task.model)
        notes = [*(plan.notes or []), *([info.note] if info.note else [])]
        return replace(plan, rows=[*rows, *plan.rows], notes=notes, bytes_before=before)

    def numerics(self) -> dict[str, Any]:
        lora = self.recipe.lora.model_dump(mode="json").items()
        return super().numerics() | {f"lora.{key}": value for key, value in lora if (key, value) != ("init", "default")}

    def base_fingerprint(self) -> str | None:
        return frozen_fingerprint(self.task.model)


def _refuse_unserved_routers(model: PeftModel, recipe: Recipe) -> None:
    """An adapter of expert routers is merged to be served, and experts that are streamed are nowhere to be merged into."""
    routers = sorted(name for name in reached_layers(model) if name.rsplit(".", 1)[-1] == "gate")
    if routers and expert_stream(model) is not None and recipe.serve.promote != "never":
        raise ModelError(
            f"lora.target_modules reaches expert routers ({routers[0]}), and an adapter of these is served merged, which it cannot be "
            f"where experts.tier is {recipe.experts.tier}. Name attention and experts alone, write experts.tier: device, or "
            "serve.promote: never to train for use elsewhere."
        )


def _refuse_other_lora(model: PeftModel, recipe: Recipe, ref: str) -> None:
    """An adapter goes on with the rank and the places that it has; dropout may change from run to run."""
    config: Any = model.peft_config["default"]
    lora = recipe.lora
    wanted = lora.target_modules
    if not isinstance(wanted, str):
        meant, has = find_targets(model, wanted).layers, reached_layers(model)
        if meant != has:
            raise ModelError(
                f"The recipe has lora.target_modules={', '.join(wanted)}, but the adapter {ref} has {_kinds(has)}. "
                "Write the adapter's, or start again from its base."
            )
    if (config.r, float(config.lora_alpha)) != (lora.r, float(lora.alpha)):
        raise ModelError(
            f"The recipe has lora.r={lora.r} and lora.alpha={lora.alpha:g}, but the adapter {ref} has r={config.r} and "
            f"alpha={config.lora_alpha:g}. Write the adapter's, or start again from its base."
        )
    for module in model.modules():
        dropouts = getattr(module, "lora_dropout", None)
        if isinstance(dropouts, torch.nn.ModuleDict):
            for name in dropouts:
                dropouts[name] = torch.nn.Dropout(lora.dropout) if lora.dropout > 0 else torch.nn.Identity()


def _kinds(layers: Iterable[str]) -> str:
    return ", ".join(sorted({kind(name) for name in layers}))
