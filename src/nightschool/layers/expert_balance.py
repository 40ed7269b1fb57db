"""What keeps the expert routers of a mixture in balance: two losses, or a bias (expert_bias.py), and figures of where tokens went.

Shapes: T tokens, L layers with experts, N experts of a layer, K of them active.

The load-balancing loss of a layer is N · Σ load · probability, over its experts (Fedus et al. 2021, arXiv 2101.03961): 1 where all
get alike, N where one gets everything. `load` is an expert's share of the tokens and has no gradient; here it is that of the
whole step before, of all its micro-batches and processes, so that the loss is a sum over tokens: how a step is cut into
micro-batches changes no gradient. The z-loss is the mean of log² Σ exp(logit) (Zoph et al. 2022,
arXiv 2202.08906). Both are means over tokens and sums over layers.

Their gradients are added on the way back, where that of the scores passes, so the loss that is reported is that of the tokens
alone, nothing is kept that would not be kept anyway, and layers that are computed twice or gathered from other processes
count once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from nightschool.config.train import Experts
from nightschool.errors import ModelError
from nightschool.layers.expert_bias import BIAS, BiasCorrection, corrected_routers

# Expert routers that return their logits [T,N], and scores and numbers of the chosen experts [T,K], and choose by softmax.
_ROUTERS = ("Qwen3MoeTopKRouter", "Qwen3NextTopKRouter", "MixtralTopKRouter", "OlmoeTopKRouter")
# The settings that say how they learn, and how those with a bias do.
_OF_LOSSES, _OF_BIAS = ("load_balancing_loss_coef", "z_loss_coef"), ("bias_update_rate",)


class ExpertBalance:
    """The expert routers of a model that learn; there may be none, and then nothing happens."""

    def __init__(self, model: nn.Module, settings: Experts) -> None:
        """Find the routers.

        Raises:
            ModelError: If there are none of a kind, and its settings are other than the defaults.
        """
        self._routers: list[Any] = [
            module
            for module in model.modules()
            if type(module).__name__ in _ROUTERS and all(p.requires_grad for p in module.parameters())
        ]
        corrected = corrected_routers(model)
        self._bias = BiasCorrection(corrected, settings.bias_update_rate)
        self.note = _note(model, {*self._routers, *corrected})
        _refuse_unused(settings, self.note, has_losses=bool(self._routers), has_bias=bool(corrected))
        self._settings = settings
        self._scale = 0.0
        shape = (len(self._routers), self._routers[0].num_experts) if self._routers else (0, 0)
        # Tokens of the last step that was taken, by expert; nobody has been sent anywhere before the first one.
        self._loads_ln = torch.zeros(shape, dtype=torch.int64)
        self._counts_ln = self._probabilities_ln = self._shares_ln = torch.zeros(shape)
        self._entropies_l = torch.zeros(shape[0])

    @contextmanager
    def watching(self, token_scale: Callable[[], float]) -> Iterator[None]:
        """A block with the passes of a window, forward and backward; what was counted in the window before is forgotten.

        `token_scale` says what a token's gradient is multiplied by for a mean over the window; asked where there are routers.
        """
        with self._bias.counting(), self._watching_losses(token_scale):
            yield

    @contextmanager
    def _watching_losses(self, token_scale: Callable[[], float]) -> Iterator[None]:
        if not self._routers:
            yield
            return
        self._scale = token_scale()
        device = self._routers[0].weight.device
        self._counts_ln = torch.zeros(self._loads_ln.shape, dtype=torch.float64, device=device)
        self._probabilities_ln = torch.zeros_like(self._counts_ln)
        self._entropies_l = torch.zeros_like(self._counts_ln[:, 0])
        loads_ln = self._loads_ln.to(device, torch.float32)
        # Without a step before, all loads are alike, and the gradient is none.
        self._shares_ln = (loads_ln + (loads_ln.sum(-1, keepdim=True) == 0)) / loads_ln.sum(-1, keepdim=True).clamp(
            min=1
        )
        handles = [
            router.register_forward_hook(self._hook(layer_index)) for layer_index, router in enumerate(self._routers)
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _hook(self, layer_index: int) -> Any:
        @torch.compiler.disable  # type: ignore[untyped-decorator]
        def balanced(module: nn.Module, inputs: Any, outputs: tuple[Tensor, Tensor, Tensor]) -> Any:  # noqa: ARG001
            logits_tn, scores_tk, chosen_tk = outputs
            if not (torch.is_grad_enabled() and logits_tn.requires_grad):
                return outputs
            scores_tk = _Balanced.apply(scores_tk, logits_tn, chosen_tk, self, layer_index)  # type: ignore[no-untyped-call]
            return logits_tn, scores_tk, chosen_tk

        return balanced

    def _gradient(self, layer_index: int, logits_tn: Tensor, chosen_tk: Tensor) -> Tensor:
        """Count where the tokens went, and return the gradient of both losses by the logits."""
        logits = logits_tn.float()
        log_sum_t1 = torch.logsumexp(logits, dim=-1, keepdim=True)
        probabilities_tn = torch.exp(logits - log_sum_t1)
        ones = torch.ones(chosen_tk.numel(), dtype=torch.float64, device=logits.device)
        self._counts_ln[layer_index].index_add_(0, chosen_tk.reshape(-1), ones)
        self._probabilities_ln[layer_index] += probabilities_tn.sum(dim=0, dtype=torch.float64)
        # Σ −p · log p
        self._entropies_l[layer_index] += torch.special.entr(probabilities_tn).sum(dtype=torch.float64)
        num_experts = logits.shape[-1]
        share_n = self._shares_ln[layer_index]
        expected_t1 = (probabilities_tn @ share_n)[:, None]
        balance = self._settings.load_balancing_loss_coef * num_experts * (share_n - expected_t1)
        gradient_tn = probabilities_tn * (balance + 2 * self._settings.z_loss_coef * log_sum_t1)
        return (gradient_tn * self._scale).to(logits_tn.dtype)

    def counters(self) -> list[Tensor]:
        """What was counted in the window, to be added up over all processes in place, before `take`."""
        mine = [self._counts_ln, self._probabilities_ln, self._entropies_l] if self._routers else []
        return [*mine, *self._bias.counters()]

    def take(self) -> dict[str, Tensor]:
        """Let the loads of the window be those that the next one is balanced by, as it becomes a step; return its figures.

        These are means over layers and tokens: `load_balancing_loss` is 1 where all experts of a layer get alike,
        `expert_router_entropy` is in nats, and `dead_experts` counts those of all layers that no token was sent to. Routers with a
        bias have those of `BiasCorrection.figures`.
        """
        if not self._routers:
            return self._bias.figures()
        counts_ln = self._counts_ln
        self._loads_ln = counts_ln.to("cpu", torch.int64)
        tokens = (counts_ln[0].sum() / self._routers[0].top_k).clamp(min=1)
        num_layers, num_experts = counts_ln.shape
        shares_ln = counts_ln / counts_ln.sum(-1, keepdim=True).clamp(min=1)
        return {
            "load_balancing_loss": num_experts * (shares_ln * self._probabilities_ln).sum() / (tokens * num_layers),
            "expert_router_entropy": self._entropies_l.sum() / (tokens * num_layers),
            "dead_experts": (counts_ln == 0).sum().double(),
        }

    def correct(self) -> None:
        """Change the biases of routers that have one, after a step."""
        self._bias.correct()

    def hyper_parameters(self) -> dict[str, Any]:
        """What must be equal in a run that resumes."""
        names = (*(_OF_LOSSES if self._routers else ()), *(_OF_BIAS if self._bias.counters() else ()))
        return {f"experts.{name}": getattr(self._settings, name) for name in names}

    def state(self) -> dict[str, Any]:
        """What the next step needs besides the weights, as plain values."""
        return {"expert_loads": self._loads_ln.tolist()} if self._routers else {}

    def load_state(self, facts: Mapping[str, Any]) -> None:
        """Take over what `state` returned."""
        if self._routers:
            self._loads_ln = torch.tensor(facts["expert_loads"], dtype=torch.int64)


def _note(model: nn.Module, balanced: set[nn.Module]) -> str:
    """Which blocks have experts that learn behind routers that nothing here balances; empty if there are none."""
    blocks = {
        type(module).__name__
        for module in model.modules()
        if isinstance(getattr(module, "experts", None), nn.Module)
        and _learns_whole(module)
        and balanced.isdisjoint(module.modules())
    }
    if not blocks:
        return ""
    return (
        f"Nothing keeps the expert routers of {', '.join(sorted(blocks))} in balance: they choose otherwise than by a softmax of their own, "
        "and have no bias that corrects their choice. Experts may die."
    )


def _learns_whole(module: nn.Module) -> bool:
    """Whether all of it learns; a bias of its choice never has a gradient."""
    learning = {p.requires_grad for name, p in module.named_parameters() if not name.endswith(BIAS)}
    return learning == {True}


def _refuse_unused(settings: Experts, note: str, *, has_losses: bool, has_bias: bool) -> None:
    """Raise ModelError if settings of routers were written that are not there."""
    given = [name for name in (*_OF_LOSSES, *_OF_BIAS) if getattr(settings, name) != getattr(Experts(), name)]
    if not given or (has_losses and has_bias):
        return
    if not has_losses and not has_bias:
        raise ModelError(
            f"{note} Take experts.{given[0]} out."
            if note
            else "experts says how the expert routers of a mixture learn, and none learns here. Take the section out, or "
            "method: full or pretrain with a mixture, such as base: new:moe-tiny."
        )
    unused = [name for name in given if name in (_OF_BIAS if has_losses else _OF_LOSSES)]
    if unused:
        how = (
            "choose by a softmax and are balanced by losses: write experts.load_balancing_loss_coef"
            if has_losses
            else "have a bias that corrects their choice, and no loss: write experts.bias_update_rate"
        )
        raise ModelError(f"experts.{unused[0]} does nothing here. The expert routers of this mixture {how}.")


class _Balanced(torch.autograd.Function):
    """Scores as they are; on the way back, the gradient of the losses joins that of the logits."""

    @staticmethod
    def forward(
        ctx: Any, scores_tk: Tensor, logits_tn: Tensor, chosen_tk: Tensor, balance: ExpertBalance, layer_index: int
    ) -> Tensor:
        ctx.save_for_backward(logits_tn, chosen_tk)
        ctx.balance, ctx.layer_index = balance, layer_index
        return scores_tk.view_as(scores_tk)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_tk: Tensor) -> tuple[Tensor | None, ...]:
        logits_tn, chosen_tk = ctx.saved_tensors
        return grad_tk, ctx.balance._gradient(ctx.layer_index, logits_tn, chosen_tk), None, None, None
