"""Expert routers with a bias that corrects their choice, kept in balance by it and by no loss (Wang et al. 2024, arXiv 2408.15664).

Shapes: T tokens, L layers with such routers, N experts of a layer, K of them active.

The bias is added to the scores when experts are chosen, and to none of their weights: it has no gradient. After each step it
grows by a fixed rate for experts with less than the mean load of the step, and shrinks by it for those with more. As loads are
those of the whole step, how it is cut into micro-batches or processes changes nothing. DeepSeek-V3 and what follows it (GLM-4-MoE, Kimi and more)
choose so; the bias is a buffer of theirs, so it lies in checkpoints and in versions.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

BIAS = "e_score_correction_bias"


def corrected_routers(model: nn.Module) -> list[Any]:
    """The expert routers that learn, have such a bias, and return logits [T,N], scores and numbers of the chosen experts [T,K]."""
    return [
        module
        for module in model.modules()
        if isinstance(module._buffers.get(BIAS), Tensor)
        and hasattr(module, "top_k")
        and any(True for _ in module.parameters(recurse=False))
        and all(parameter.requires_grad for parameter in module.parameters())
    ]


class BiasCorrection:
    """Routers with a bias; there may be none, and then nothing happens."""

    def __init__(self, routers: list[Any], rate: float) -> None:
        """`rate` is how much a bias changes in a step; 0 for not at all."""
        self._routers, self._rate = routers, rate
        shape = (len(routers), len(routers[0].e_score_correction_bias)) if routers else (0, 0)
        self._counts_ln = torch.zeros(shape, dtype=torch.float64)

    @contextmanager
    def counting(self) -> Iterator[None]:
        """A block with the passes of a window, forward and backward; what was counted before is forgotten."""
        if not self._routers:
            yield
            return
        self._counts_ln = torch.zeros_like(self._counts_ln, device=self._routers[0].weight.device)
        handles = [router.register_forward_hook(self._hook(index)) for index, router in enumerate(self._routers)]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _hook(self, layer_index: int) -> Any:
        @torch.compiler.disable  # type: ignore[untyped-decorator]
        def counted(module: nn.Module, inputs: Any, outputs: tuple[Tensor, ...]) -> Any:  # noqa: ARG001
            logits_tn, scores_tk, chosen_tk, *more = outputs
            if not (torch.is_grad_enabled() and scores_tk.requires_grad):
                return outputs
            scores_tk = _Counted.apply(scores_tk, chosen_tk, self._counts_ln[layer_index])  # type: ignore[no-untyped-call]
            return (logits_tn, scores_tk, chosen_tk, *more)

        return counted

    def counters(self) -> list[Tensor]:
        """Tokens by expert in the window, to be added up over all processes in place."""
        return [self._counts_ln] if self._routers else []

    def figures(self) -> dict[str, Tensor]:
        """Of the window: `max_violation` is by how much of the mean the largest load of a layer exceeds it, the mean over layers."""
        if not self._routers:
            return {}
        mean_l = self._counts_ln.mean(dim=-1).clamp(min=1)
        return {
            "max_violation": (self._counts_ln.amax(dim=-1) / mean_l - 1).mean(),
            "dead_experts": (self._counts_ln == 0).sum().double(),
        }

    @torch.no_grad()
    def correct(self) -> None:
        """Change the biases by the loads of the window, which became a step."""
        for router, counts_n in zip(self._routers, self._counts_ln, strict=True):
            bias_n = router.e_score_correction_bias
            bias_n.add_(torch.sign(counts_n.mean() - counts_n).to(bias_n.dtype), alpha=self._rate)


class _Counted(torch.autograd.Function):
    """Scores as they are; on the way back, which a layer that is computed twice takes once, their experts are counted."""

    @staticmethod
    def forward(ctx: Any, scores_tk: Tensor, chosen_tk: Tensor, counts_n: Tensor) -> Tensor:
        ctx.save_for_backward(chosen_tk)
        ctx.counts_n = counts_n
        return scores_tk.view_as(scores_tk)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_tk: Tensor) -> tuple[Tensor | None, ...]:
        (chosen_tk,) = ctx.saved_tensors
        ones = torch.ones(chosen_tk.numel(), dtype=torch.float64, device=chosen_tk.device)
        ctx.counts_n.index_add_(0, chosen_tk.reshape(-1), ones)
        return grad_tk, None, None
