"""What does a step of a mixture take here, against transformers' own step with its experts computed in one way or another?

One layer of width 256 with experts of width 512, two of them for a token; forward and backward, seconds of the processor on one
thread, so that a busy machine counts less. Ours has the losses of the expert router, transformers' step has none. Its
`batched_mm` is left out: it copies the weights of an expert for each token, which is 4 GB here.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from harness import Benchmark, interleave, median_ratio

VOCAB_SIZE, TOKENS_PER_DOCUMENT = 1024, 256


def measured(step: Callable[[], Any]) -> Callable[[], float]:
    def once() -> float:
        started = time.process_time()
        step()
        return time.process_time() - started

    return once


def contestants(num_experts: int, tokens: int) -> dict[str, Callable[[], float]]:
    """One step each: a closure that takes it and says how long it took."""
    from nightschool.config.recipe import Train
    from nightschool.data.batches import Batches
    from nightschool.data.chat.render import Rendered
    from nightschool.models.build import build_model
    from nightschool.training.methods.finetune import FinetuneTask

    shape = {
        "hidden_size": 256,
        "num_hidden_layers": 1,
        "num_experts": num_experts,
        "expert_size": 512,
    }
    model: Any = build_model("new:moe-tiny", VOCAB_SIZE, 0, shape=shape)
    chance = torch.Generator().manual_seed(0)
    ids = torch.randint(0, VOCAB_SIZE, (tokens // TOKENS_PER_DOCUMENT, TOKENS_PER_DOCUMENT), generator=chance)
    documents = [Rendered(row, [1.0] * len(row), ["text"] * len(row)) for row in ids.tolist()]
    task = FinetuneTask(model, Batches(documents, batch_size=len(documents), seed=0), Train())
    batch = task.batch(0, 0)
    model.train()

    def ours() -> None:
        model.set_experts_implementation("grouped_mm")
        task.accumulate([batch], batch.loss_units)
        task.discard_gradients()

    def theirs(implementation: str) -> Callable[[], None]:
        def step() -> None:
            model.set_experts_implementation(implementation)
            model.set_attn_implementation("sdpa")
            model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
            task.discard_gradients()
            model.set_attn_implementation(attention)

        return step

    attention = model.config._attn_implementation
    steps = {"ours": ours, "grouped_mm": theirs("grouped_mm"), "eager": theirs("eager")}
    return {name: measured(step) for name, step in steps.items()}


def main() -> None:
    sizes = (8, 32, 128)
    benchmark = Benchmark(
        "expert_kernel",
        "is a step with experts as fast as with transformers' grouped_mm, and far ahead of its loop?",
        {f"to_grouped_mm_{size}": {"max": 1.10} for size in sizes},
    )
    torch.set_num_threads(1)
    figures: dict[str, float] = {}
    for size in sizes[:2] if benchmark.quick else sizes:
        steps = contestants(size, 512 if benchmark.quick else 2048)
        for step in (steps["ours"], steps["grouped_mm"]):
            step()  # allocates
        results = interleave(steps, 3 if benchmark.quick or size == 128 else 7)
        figures[f"to_grouped_mm_{size}"] = median_ratio(results["ours"], results["grouped_mm"])
        figures[f"eager_{size}"] = median_ratio(results["eager"], results["ours"])
        rows = [
            (f"{size} experts, {name}", f"{1000 * statistics.median(times):.0f} ms") for name, times in results.items()
        ]
        benchmark.table([*rows, (f"{size} experts, eager ÷ ours", f"{figures[f'eager_{size}']:.2f}")])
    benchmark.finish(figures)


if __name__ == "__main__":
    main()
