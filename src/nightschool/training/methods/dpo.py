"""Method `dpo`: an adapter learns from preference pairs which of two answers is the better one.

Direct preference optimization (Rafailov et al. 2023, arXiv 2305.18290): of each pair, the policy's log-likelihood ratio of
the better to the worse answer is to exceed that of a reference. The reference is the frozen base with the adapter off, asked
once before step 1; what it said lies in the run's folder.

P  pairs of a micro-batch or of all data
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, cast

import torch
import torch.nn.functional as F  # noqa: N812
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from nightschool.config.recipe import Dpo, Recipe
from nightschool.data.batches import Batch
from nightschool.data.chat.render import Rendered
from nightschool.data.pairs import PairBatch, PairBatches
from nightschool.errors import Damaged
from nightschool.evaluation.preferences import pair_log_probs
from nightschool.layers.forward import document_log_probs
from nightschool.models.load import LoadedModel
from nightschool.store.atomic import write_bytes
from nightschool.training.methods.figures_task import FiguresTask
from nightschool.training.methods.lora import LoraFinetune
from nightschool.training.metrics import say

if TYPE_CHECKING:
    from peft import PeftModel

REFERENCE = "reference.safetensors"
FIGURES = ("reward_accuracy", "reward_margin", "chosen_reward", "rejected_reward")


def preference_losses(log_probs_p2: Tensor, reference_p2: Tensor, dpo: Dpo) -> tuple[Tensor, Tensor]:
    """The loss of each pair [P], and its figures [P, 4] in the order of `FIGURES`; all in nats but the first.

    With label smoothing ε the pair is taken to be the wrong way round with that probability (conservative DPO, Mitchell 2023).
    """
    rewards_p2 = dpo.beta * (log_probs_p2 - reference_p2)
    chosen, rejected = rewards_p2.unbind(dim=1)
    margin = chosen - rejected
    losses = -F.logsigmoid(margin) * (1 - dpo.label_smoothing) - F.logsigmoid(-margin) * dpo.label_smoothing
    figures_p4 = torch.stack([(margin > 0).to(margin), margin, chosen, rejected], dim=1)
    return losses, figures_p4.detach()


class DpoTask(FiguresTask):
    """Preference pairs, two neighbouring documents each. A loss is a mean over pairs."""

    names: ClassVar[tuple[str, ...]] = FIGURES

    def __init__(self, dpo: Dpo, *arguments: Any, **settings: Any) -> None:
        super().__init__(*arguments, **settings)
        self._dpo = dpo

    def _forward(self, batch: Batch) -> tuple[Tensor, int]:
        pairs = cast(PairBatch, batch)
        log_probs_p2 = document_log_probs(self.model, self.path, pairs).view(-1, 2)
        losses, figures_p4 = preference_losses(log_probs_p2, pairs.reference, self._dpo)
        if self._dpo.sft_weight:
            ends = pairs.cu_seqlens.to(log_probs_p2.device)
            carries = torch.cat([ends.new_zeros(1), (pairs.weights[0] > 0).cumsum(0)])
            tokens_p = (carries[ends[1:]] - carries[ends[:-1]]).view(-1, 2)[:, 0]
            losses = losses - self._dpo.sft_weight * log_probs_p2[:, 0] / tokens_p.clamp_min(1)
        if pairs.is_idle:
            return losses.sum() * 0.0, 0
        self._note(figures_p4.sum(dim=0))
        return losses.sum(), pairs.loss_units

    def reference_of(self, batches: PairBatches) -> Tensor:
        """The log-likelihoods [P, 2] of all pairs, on the CPU, of the base with the adapter off."""
        model = cast("PeftModel", self.model)
        with model.disable_adapter():
            return pair_log_probs(model, self.path, batches, device=self.device, compute_dtype=self.compute_dtype)


@dataclass(frozen=True, kw_only=True)
class DpoFinetune(LoraFinetune):
    """Preference optimization of an adapter that is ready to start."""

    task: DpoTask

    loss_unit: ClassVar[str] = "pairs"
    documents_per_example: ClassVar[int] = 2
    noun: ClassVar[str] = "pairs"

    @classmethod
    def pack(cls, rendered: Iterable[Rendered], **settings: Any) -> PairBatches:
        return PairBatches(rendered, **settings)

    @classmethod
    def new_task(cls, recipe: Recipe, loaded: LoadedModel, batches: Any, **settings: Any) -> DpoTask:
        return DpoTask(recipe.dpo, loaded.model, batches, recipe.train, **settings)

    def begin(self, folder: Path) -> None:
        """Ask the reference, or read what it said when the run began."""
        trained = cast(PairBatches, self.task.batches)
        held_out = cast("PairBatches | None", self.data.held_out)
        wanted = {"train": trained} | ({} if held_out is None else {"held_out": held_out})
        path = folder / REFERENCE
        with self.task.world.first_goes_first():
            if not path.is_file():
                said = {name: self.task.reference_of(batches) for name, batches in wanted.items()}
                write_bytes(path, save(said, {name: batches.fingerprint for name, batches in wanted.items()}))
                say(f"The base with the adapter off was asked for {sum(map(len, said.values()))} pairs: {REFERENCE}")
            for name, tensor in _read(path, {name: batches.fingerprint for name, batches in wanted.items()}).items():
                wanted[name].reference = tensor

    def numerics(self) -> dict[str, Any]:
        return super().numerics() | {f"dpo.{key}": value for key, value in self.recipe.dpo.model_dump().items()}


def _read(path: Path, fingerprints: Mapping[str, str]) -> dict[str, Tensor]:
    """What the reference said of the data with these fingerprints.

    Raises:
        Damaged: If the file is broken, or of other data.
    """
    try:
        with safe_open(path, framework="pt") as file:
            if file.metadata() == dict(fingerprints):
                return {name: file.get_tensor(name) for name in fingerprints}
    except (SafetensorError, OSError) as error:
        raise Damaged(f"{path} cannot be read ({error}). Remove it; the next resume asks the base again.") from None
    raise Damaged(f"{path} says what the base gave other pairs than this run learns from. Begin a new run.")
