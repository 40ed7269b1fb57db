"""Does a mixture learn the same whose experts are streamed, bit by bit: every weight, every moment, every loss?

Against the ordinary run with all experts resident: transformers' `grouped_mm`, torch's AdamW. Fifty steps with clipping, two
micro-batches a step, weight decay, a falling learning rate, experts at a rate of their own; some get no token in a step. Experts in a file
learn layer by layer, unless the micro-batches are told to pass one after the other.
"""

from __future__ import annotations

import hashlib
from typing import Any

import torch
from expert_setups import new_task, step
from harness import Benchmark

TOKENS = 256


def digests(task: Any) -> dict[str, str]:
    """SHA-256 of every weight, moment and counter."""
    sources = [*task.weights(), *task.optimizer_state()]
    return {s.name: hashlib.sha256(s.tensor().contiguous().numpy().tobytes()).hexdigest() for s in sources}


def trained(tier: str, num_experts: int, steps: int, **train: Any) -> tuple[list[tuple[float, float]], dict[str, str]]:
    """Losses and norms of all steps, and the digests after them."""
    task = new_task(
        tier, num_experts, TOKENS, micro_batches=2, width=64, expert_size=128, layers=2, weight_decay=0.1, **train
    )
    seen = [step(task, rate=1e-2 * (1 - number / steps), clip=0.5) for number in range(steps)]
    return seen, digests(task)


def main() -> None:
    settings = {
        "plain": {},
        "own rate of experts": {"expert_learning_rate": 5e-3, "learning_rate": 1e-2},
        "recomputed": {"gradient_checkpointing": True},
        "one after the other": {"accumulation_steps": 1},
    }
    benchmark = Benchmark(
        "expert_parity",
        "does a mixture learn the same, bit by bit, wherever its experts live?",
        {"differing": {"max": 0}, "compared": {"min": 1}},
    )
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    steps = 8 if benchmark.quick else 50
    figures = {"differing": 0.0, "compared": 0.0, "steps": float(steps)}
    for num_experts in (8,) if benchmark.quick else (8, 32, 128):
        for name, train in settings.items():
            losses, wanted = trained("device", num_experts, steps, **train)
            for tier in ("host", "disk"):
                theirs, found = trained(tier, num_experts, steps, **train)
                assert found.keys() == wanted.keys()
                differing = sum(found[key] != wanted[key] for key in wanted)
                differing += sum(a != b for a, b in zip(losses, theirs, strict=True))
                figures["differing"] += differing
                figures["compared"] += len(wanted) + len(losses)
                benchmark.table([(f"{num_experts} experts, {tier}, {name}", f"{differing} of {len(wanted)} differ")])
    benchmark.finish(figures)


if __name__ == "__main__":
    main()
