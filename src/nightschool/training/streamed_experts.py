"""Experts that are streamed, as a task sees them: their part of a step, and of the state."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from nightschool.config.train import Train
from nightschool.errors import ModelError, NonFiniteLoss
from nightschool.layers.expert_streaming.pending import Update
from nightschool.layers.expert_streaming.record import FIRST_MOMENT, SECOND_MOMENT, WEIGHTS
from nightschool.layers.expert_streaming.stream import ExpertStream
from nightschool.models.update_cost import UpdateCost
from nightschool.training.checkpoint.checkpoint_reader import StoredTensors
from nightschool.training.checkpoint.contents import TensorSource
from nightschool.training.optimizer import MOMENTS, AdamWSettings, Elsewhere

_SECTIONS = dict(zip(MOMENTS, (FIRST_MOMENT, SECOND_MOMENT), strict=True))


class StreamedExperts(Elsewhere):
    """The experts that a task streams and trains."""

    def __init__(self, stream: ExpertStream, train: Train, rate_factor: float) -> None:
        """Look whether they can learn by these settings.

        Raises:
            ModelError: If not.
        """
        self._stream = stream
        self._settings = AdamWSettings.from_recipe(train)
        self._rate_factor = rate_factor
        if train.optimizer != "adamw":
            raise ModelError(
                f"train.optimizer is {train.optimizer}, and experts that are streamed learn by adamw alone. Write adamw, or "
                "experts.tier: device."
            )
        if train.num_processes > 1 or train.zero_stage:
            raise ModelError(
                "Experts are streamed in one process. Write train.num_processes: 1 and train.zero_stage: 0, or experts.tier: device."
            )

    @property
    def names(self) -> set[str]:
        """The names that their stacked tensors have in the stock model."""
        return set(self._stream.shape.stacked())

    # --- the step ---------------------------------------------------------------------------------------------------

    def begin_window(self, scaler: torch.amp.GradScaler | None = None) -> None:
        self._stream.begin_window(None if scaler is None else 1 / scaler.get_scale())

    def norms(self) -> Tensor:
        """The norms of the gradients of this window, not scaled any more: of each matrix of each expert, layer by layer."""
        return self._stream.norms_l2n.reshape(-1)

    def refuse_non_finite(self, norm: Tensor) -> None:
        """Refuse the step if the norm of all gradients is NaN or infinite, before anything is changed.

        Raises:
            NonFiniteLoss: With the expert that it came from, if it was one.
        """
        if bool(torch.isfinite(norm)):
            return
        shape = self._stream.shape
        if (name := self._stream.not_finite()) is not None:
            where = f"the weights of {name} hold NaN or infinity"
        else:
            bad_ln = ~torch.isfinite(self._stream.norms_l2n).all(dim=1)
            few = 0 < int(bad_ln.sum()) <= bad_ln.numel() // 2
            first = int(bad_ln.reshape(-1).nonzero()[0]) if few else 0
            where = f"that of {shape.name_of(first)} is" if few else "those of most weights are"
        raise NonFiniteLoss(
            f"The norm of all gradients became {norm.item()}: {where}. The step was refused, and nothing was changed by it. Go on from "
            "the last checkpoint with --resume latest; lower train.learning_rate, or look at the data there."
        )

    def put_off(self, rate: float, clip_factor: Tensor | None, unscale: float | None) -> None:
        """Update them, each when it is next loaded."""
        self._stream.put_off(partial(self._update, rate, clip_factor, unscale))

    def update_cost(self) -> UpdateCost:
        seconds, moving_seconds = self._stream.tried_update(partial(self._update, 0.0, torch.ones(()), None))
        # What stands for the gradient of an expert that got no token, and a place for one that is scaled.
        scratch = 2 * self._stream.shape.numbers * self._stream.store.layout.dtype.itemsize
        return UpdateCost(seconds, moving_seconds, scratch)

    def _update(self, rate: float, clip_factor: Tensor | None, unscale: float | None, window: int) -> Update:
        settings = self._settings
        return Update(
            window=window,
            learning_rate=rate * self._rate_factor,
            beta1=settings.beta1,
            beta2=settings.beta2,
            epsilon=settings.epsilon,
            weight_decay=settings.weight_decay,
            unscale=unscale,
            clip_factor=None if clip_factor is None else clip_factor.detach().cpu(),
        )

    # --- the state --------------------------------------------------------------------------------------------------

    def flush(self) -> None:
        self._stream.flush()

    def weights(self) -> list[TensorSource]:
        return self._sources("", WEIGHTS)

    def optimizer_state(self) -> list[TensorSource]:
        if self._stream.num_updates == 0:
            return []
        updates = torch.tensor(float(self._stream.num_updates))
        counters = [TensorSource(f"updates.{name}", (), torch.float32, lambda: updates) for name in self.names]
        return [*(s for kind, section in _SECTIONS.items() for s in self._sources(f"{kind}.", section)), *counters]

    def without_state(self) -> set[str]:
        return set() if self._stream.num_updates else self.names

    def decayed(self) -> set[str]:
        return self.names if self._settings.weight_decay > 0 else set()

    def expected(self) -> dict[str, Tensor]:
        return {source.name: torch.empty(source.shape, dtype=source.dtype, device="meta") for source in self.weights()}

    def load_weights(self, weights: StoredTensors) -> None:
        self._fill("", WEIGHTS, weights)

    def load_optimizer(self, optimizer: StoredTensors, without_state: set[str]) -> None:
        counts = {int(optimizer[f"updates.{name}"]) for name in self.names - without_state}
        assert len(counts) < 2, "experts are updated all together"
        for kind, section in _SECTIONS.items() if counts else ():
            self._fill(f"{kind}.", section, optimizer)
        self._stream.begin(counts.pop() if counts else 0)

    def _sources(self, prefix: str, section: str) -> list[TensorSource]:
        stream = self._stream
        return [
            TensorSource(
                prefix + name,
                stream.shape.stacked_shape(which),
                stream.store.layout.dtype,
                pieces=partial(stream.rows, section, layer, which),
            )
            for name, (layer, which) in stream.shape.stacked().items()
        ]

    def _fill(self, prefix: str, section: str, stored: StoredTensors) -> None:
        for name, (layer, which) in self._stream.shape.stacked().items():
            self._stream.fill(section, layer, which, stored.rows(prefix + name))
