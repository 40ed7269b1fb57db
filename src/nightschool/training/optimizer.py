"""AdamW with decay for matrices only, fp32 masters for bf16 parameters, and a learning rate that is a pure function."""

from __future__ import annotations

import math
from collections.abc import Mapping, Set
from dataclasses import asdict, dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from nightschool.config.recipe import Train
from nightschool.models.update_cost import UpdateCost
from nightschool.training.checkpoint.checkpoint_reader import StoredTensors, check_tensors
from nightschool.training.checkpoint.contents import TensorSource
from nightschool.training.distributed.sharding import like, put

LrSchedule = Literal["cosine", "linear", "constant"]

# What precedes a name in the optimizer state.
MOMENTS = ("first_moment", "second_moment")


@dataclass(frozen=True)
class Schedule:
    """The learning rate of every step of a run, from the number of steps already done.

    `warmup_steps` rise linearly to `peak`; the rest falls to `peak * min_ratio` at `steps_total`.
    """

    peak: float
    steps_total: int
    kind: LrSchedule = "cosine"
    warmup_steps: int = 0
    min_ratio: float = 0.0

    def rate(self, step: int) -> float:
        """Return the learning rate of the update that follows `step` finished ones (0 for the first)."""
        if step < self.warmup_steps:
            return self.peak * (step + 1) / self.warmup_steps
        if self.kind == "constant":
            return self.peak
        falling_steps = max(1, self.steps_total - self.warmup_steps)
        progress = min(1.0, (step - self.warmup_steps) / falling_steps)
        share = 1.0 - progress if self.kind == "linear" else 0.5 * (1.0 + math.cos(math.pi * progress))
        return self.peak * (self.min_ratio + (1.0 - self.min_ratio) * share)

    @classmethod
    def from_recipe(cls, train: Train, steps_total: int) -> Schedule:
        return cls(train.learning_rate, steps_total, train.lr_schedule, train.warmup_steps, train.min_lr_ratio)


@dataclass(frozen=True)
class AdamWSettings:
    """What AdamW needs besides the learning rate, which comes with each step."""

    beta1: float = 0.9
    beta2: float = 0.999
    epsilon: float = 1e-8
    weight_decay: float = 0.01
    algorithm: Literal["adamw", "adamw_8bit"] = "adamw"

    @classmethod
    def from_recipe(cls, train: Train) -> AdamWSettings:
        algorithm: Any = train.optimizer.removeprefix("paged_")
        return cls(train.beta1, train.beta2, train.epsilon, train.weight_decay, algorithm)


def decays(parameter: Tensor, *, is_embedding: bool) -> bool:
    """Say whether weight decay applies: to matrices (stacked experts too), not to norms, biases and embeddings."""
    return parameter.ndim >= 2 and not is_embedding


def embedding_names(model: nn.Module) -> set[str]:
    """Return the names of parameters that are embedding tables, also where a head is tied to one."""
    tables = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    return {name for name, parameter in model.named_parameters() if id(parameter) in tables}


def new_optimizer(
    parameters: Mapping[str, nn.Parameter],
    train: Train,
    no_decay: set[str],
    rate_factors: Mapping[str, float] | None = None,
    stacked: Set[str] = frozenset(),
) -> AdamW:
    """The optimizer that a recipe asks for.

    Args:
        parameters: What learns, by name.
        train: Its settings.
        no_decay: Names of matrices without weight decay.
        rate_factors: What the learning rate is multiplied by for some names, where it is not 1.
        stacked: Names of matrices [N,…] of N experts, of whose gradients norms are taken one by one.

    Raises:
        ModelError: If it is one of bitsandbytes, which is not installed.
    """
    return optimizer_class(train)(parameters, AdamWSettings.from_recipe(train), no_decay, rate_factors, stacked)


def optimizer_class(train: Train) -> type[AdamW]:
    """What the recipe's optimizer is, before there is one."""
    if train.optimizer == "adamw":
        return AdamW
    from nightschool.training.optimizer_8bit import AdamW8bit, PagedAdamW8bit  # which build on the class below

    return PagedAdamW8bit if train.optimizer.startswith("paged_") else AdamW8bit


def total_norm(gradients: Mapping[str, Tensor], stacked: Set[str], norms_elsewhere: Tensor) -> Tensor:
    """The norm of all gradients: from those of all tensors, then of each expert's part of `stacked` ones, then those elsewhere.

    Experts that are streamed know the norms of their parts only. The order is the same wherever they are, and so is the sum, bit by
    bit.
    """
    single = [gradient for name, gradient in gradients.items() if name not in stacked]
    if any(isinstance(gradient, DTensor) for gradient in gradients.values()):
        norm = torch.nn.utils.get_total_norm([*gradients.values()], foreach=True)
        return norm.full_tensor() if isinstance(norm, DTensor) else norm
    parts = [part for name, gradient in gradients.items() if name in stacked for part in gradient.unbind()]
    norms = torch.stack(torch._foreach_norm([*single, *parts]))
    total: Tensor = torch.linalg.vector_norm(torch.cat([norms, norms_elsewhere.to(norms.device)]))
    return total


class Elsewhere:
    """What a task trains beside the parameters of its model, and where it lies; this one is nothing, nowhere."""

    # --- the step ---------------------------------------------------------------------------------------------------

    def begin_window(self, scaler: torch.amp.GradScaler | None = None) -> None:
        """Forget gradients that no update has used; the next ones will be scaled by `scaler`."""

    def norms(self) -> Tensor:
        """The norms of the gradients of this window, not scaled any more, in the order in which they are added up."""
        return torch.zeros(0)

    def refuse_non_finite(self, norm: Tensor) -> None:
        """Raise `NonFiniteLoss` rather than be updated by gradients of such a norm."""

    def put_off(self, rate: float, clip_factor: Tensor | None, unscale: float | None) -> None:
        """Update it by its gradients, times `unscale`, times `clip_factor`."""

    def update_cost(self) -> UpdateCost:
        """What an update of it takes, found without one."""
        return UpdateCost()

    # --- the state --------------------------------------------------------------------------------------------------

    def flush(self) -> None:
        """Do what was put off, so that what is read is the state after the last step."""

    def weights(self) -> list[TensorSource]:
        """The weights, under the names and in the shapes of the stock model."""
        return []

    def optimizer_state(self) -> list[TensorSource]:
        """Moments and counters, as `AdamW.state` has them; empty before the first update."""
        return []

    def without_state(self) -> set[str]:
        """The names that have no optimizer state yet."""
        return set()

    def decayed(self) -> set[str]:
        """The names whose weights decay."""
        return set()

    def expected(self) -> dict[str, Tensor]:
        """Shapes and dtypes of the weights, without their numbers."""
        return {}

    def expected_optimizer(self, without_state: set[str]) -> dict[str, Tensor]:
        """The same of the optimizer state, if these names have none."""
        tensors = {name: tensor for name, tensor in self.expected().items() if name not in without_state}
        moments = {f"{kind}.{name}": tensor for kind in MOMENTS for name, tensor in tensors.items()}
        return moments | {f"updates.{name}": torch.empty((), device="meta") for name in tensors}

    def load_weights(self, weights: StoredTensors) -> None:
        """Take over weights that were checked; moments stay as they are."""

    def load_optimizer(self, optimizer: StoredTensors, without_state: set[str]) -> None:
        """Take over moments that were checked."""


NOWHERE = Elsewhere()


class AdamW:
    """`torch.optim.AdamW` over named parameters, with its state as plain named tensors.

    A parameter below fp32 gets an fp32 master: its gradient is widened, the master is updated, and the parameter
    becomes the rounded master. Without it, updates smaller than 1/256 of a weight would be lost in bf16.

    The state has four kinds of names: `first_moment.<parameter>`, `second_moment.<parameter>` and
    `updates.<parameter>` (how many updates it took), and `master.<parameter>` where there is one.
    """

    _KINDS: ClassVar[tuple[tuple[str, str], ...]] = (
        ("first_moment", "exp_avg"),
        ("second_moment", "exp_avg_sq"),
        ("updates", "step"),
    )
    # Of an element of a parameter, both moments together.
    moment_bytes: ClassVar[int] = 8

    def __init__(
        self,
        parameters: Mapping[str, nn.Parameter],
        settings: AdamWSettings,
        no_decay: set[str],
        rate_factors: Mapping[str, float] | None = None,
        stacked: Set[str] = frozenset(),
    ) -> None:
        assert parameters, "there is nothing to optimize"
        self.settings, self._stacked = settings, stacked
        self._parameters = dict(parameters)
        self._masters = {
            name: nn.Parameter(parameter.detach().float().clone())
            for name, parameter in parameters.items()
            if parameter.dtype != torch.float32
        }
        self._updated = {name: self._masters.get(name, parameter) for name, parameter in parameters.items()}
        members: dict[tuple[float, bool], list[Tensor]] = {}
        for name, parameter in self._updated.items():
            kind = ((rate_factors or {}).get(name, 1.0), decays(parameter, is_embedding=name in no_decay))
            members.setdefault(kind, []).append(parameter)
        # Those at the plain rate first, and of them those that decay.
        kinds = sorted(members, key=lambda kind: (kind[0] != 1.0, kind[0], not kind[1]))
        self._rate_factors = [factor for factor, _ in kinds]
        groups = [
            {"params": members[kind], "weight_decay": settings.weight_decay if kind[1] else 0.0} for kind in kinds
        ]
        self.inner = self._new_inner(groups)

    def _new_inner(self, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
        # One fused kernel per group; measured 0.9 % of a step on a CPU, where the loop over tensors takes 6 %.
        # The rate comes with each step; 0.0 here makes a forgotten rate visible.
        settings = self.settings
        return torch.optim.AdamW(
            groups, lr=0.0, betas=(settings.beta1, settings.beta2), eps=settings.epsilon, fused=True
        )

    def gradients_ready(self) -> list[Tensor]:
        """Widen the gradients of low-precision parameters, and return all gradients that `step` will use.

        Call it once after the backward passes of a window.
        """
        for name, master in self._masters.items():
            gradient = self._parameters[name].grad
            master.grad = None if gradient is None else gradient.float()
        return list(self._gradients().values())

    @torch.no_grad()
    def step(
        self,
        gradients: list[Tensor],
        rate: float,
        clip: float,
        scaler: torch.amp.GradScaler | None,
        elsewhere: Elsewhere = NOWHERE,
    ) -> Tensor:
        """Clip the gradients that `gradients_ready` returned to the norm `clip` (0: not at all), update, and drop them.

        So is what lies `elsewhere`, whose gradients count in the norm.

        Returns:
            The norm before clipping, over all gradients and over all parts of them; equal in all processes.
        """
        norms_elsewhere, scale = elsewhere.norms(), None
        if scaler is not None:
            if len(norms_elsewhere):
                scale = scaler.get_scale()
                if not bool(torch.isfinite(norms_elsewhere).all()):
                    gradients[0].fill_(math.inf)  # the scaler looks for an overflow in these alone
            scaler.unscale_(self.inner)
        norm = total_norm(self._gradients(), self._stacked, norms_elsewhere)
        if scaler is None:
            elsewhere.refuse_non_finite(norm)
        factor = None
        if clip > 0:
            # The factor is clamped on the device: asking the host whether to clip would wait for the whole backward pass.
            parts = [g.to_local() if isinstance(g, DTensor) else g for g in gradients]
            factor = torch.clamp(clip / (norm + 1e-6), max=1.0)
            torch._foreach_mul_(parts, factor)
        for group, times in zip(self.inner.param_groups, self._rate_factors, strict=True):
            group["lr"] = rate * times
        if scaler is None:
            self.inner.step()
        else:
            scaler.step(self.inner)
            scaler.update()
        if scaler is None or scale is None or scaler.get_scale() >= scale:  # else the step was skipped
            elsewhere.put_off(rate, factor, None if scale is None else 1 / scale)
        if self._masters:
            # What the model computes with is the rounded master.
            torch._foreach_copy_([self._parameters[name] for name in self._masters], list(self._masters.values()))
        self.zero_grad()
        return norm

    def _gradients(self) -> dict[str, Tensor]:
        return {name: p.grad for name, p in self._updated.items() if p.grad is not None}

    @torch.no_grad()
    def take_masters(self, weights: Mapping[str, Tensor]) -> None:
        """Begin from weights that have more digits than the parameters, by the names of these."""
        for name, master in self._masters.items():
            master.copy_(weights[name])

    def zero_grad(self) -> None:
        """Drop all gradients."""
        self.inner.zero_grad(set_to_none=True)
        for name in self._masters:
            self._parameters[name].grad = None

    def release(self) -> None:
        """Give the memory of gradients and moments back; after the last step, when the weights are published."""
        self.zero_grad()
        self.inner.state.clear()

    def state(self) -> dict[str, Tensor]:
        """Return the whole state as named tensors; empty moments mean that the parameter had no gradient yet."""
        tensors: dict[str, Tensor] = {}
        for name, parameter in self._updated.items():
            held = self.inner.state.get(parameter, {})
            for kind, key in self._KINDS:
                if key in held:
                    tensors[f"{kind}.{name}"] = torch.as_tensor(
                        held[key], dtype=None if key != "step" else torch.float32
                    )
        tensors |= {f"master.{name}": master.detach() for name, master in self._masters.items()}
        return tensors

    @property
    def has_one_rate(self) -> bool:
        """Whether all parameters learn at the same rate."""
        return all(factor == 1.0 for factor in self._rate_factors)

    def hyper_parameters(self) -> dict[str, Any]:
        """Return what must be equal in the run that resumes from this state."""
        return asdict(self.settings) | {
            "decayed": sorted(name for name, p in self._updated.items() if self._decay_of(p) > 0),
        }

    def without_state(self) -> set[str]:
        """The parameters that have had no gradient yet."""
        return {name for name, parameter in self._updated.items() if "step" not in self.inner.state.get(parameter, {})}

    def _decay_of(self, parameter: Tensor) -> float:
        return next(
            float(group["weight_decay"])
            for group in self.inner.param_groups
            if any(parameter is member for member in group["params"])
        )

    @torch.no_grad()
    def load_state(self, tensors: Mapping[str, Tensor], parameters_without_state: set[str]) -> None:
        """Take over a state that `state` returned.

        Args:
            tensors: The named tensors.
            parameters_without_state: Parameters that had no gradient before the state was taken.

        Raises:
            StateMismatch: If a tensor is missing, unexpected, or of another shape or dtype; nothing was changed then.
        """
        fresh = {
            name: self._new_state(parameter)
            for name, parameter in self._updated.items()
            if name not in parameters_without_state
        }
        expected = {
            f"{kind}.{name}": torch.zeros(()) if kind == "updates" else state[key]
            for name, state in fresh.items()
            for kind, key in self._KINDS
            if key in state
        }
        expected |= {f"master.{name}": master for name, master in self._masters.items()}
        check_tensors(tensors, expected, what="optimizer state")
        for name, parameter in self._updated.items():
            if name in fresh:
                self._take_state(name, parameter, fresh[name], tensors)
            else:
                self.inner.state.pop(parameter, None)
        for name, master in self._masters.items():
            put(master, tensors[f"master.{name}"])

    def _new_state(self, parameter: nn.Parameter) -> dict[str, Any]:
        """What the state of a parameter is like: tensors of the right shape and dtype under the names of the optimizer."""
        return {"step": torch.zeros(()), "exp_avg": parameter, "exp_avg_sq": parameter}

    def _take_state(
        self, name: str, parameter: nn.Parameter, fresh: dict[str, Any], tensors: Mapping[str, Tensor]
    ) -> None:
        # The fused kernel wants its counter where the parameter is; a copy keeps mapped file memory out.
        self.inner.state[parameter] = {
            "step": tensors[f"updates.{name}"].to(parameter.device, copy=True),
            "exp_avg": like(fresh["exp_avg"], tensors[f"first_moment.{name}"]),
            "exp_avg_sq": like(fresh["exp_avg_sq"], tensors[f"second_moment.{name}"]),
        }
