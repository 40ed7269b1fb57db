"""One task of a mixture on each tier, for the benchmarks of experts; and a process of its own that measures the peak of one.

`python benchmarks/expert_setups.py TIER NUM_EXPERTS TOKENS STEPS WIDTH EXPERT_SIZE LAYERS [LIMIT_BYTES]` prints the peak of the resident
set over so many steps in bytes, counted anew after the model was made. Nothing here maps a file that it reads experts from, so
the page cache is not in it. With a limit, that is of the process's own memory (RLIMIT_DATA).
"""

from __future__ import annotations

import resource
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

VOCAB_SIZE, TOKENS_PER_DOCUMENT = 1024, 128
RESIDENT = 4


def new_task(
    tier: str,
    num_experts: int,
    tokens: int,
    *,
    micro_batches: int = 1,
    width: int = 256,
    expert_size: int = 512,
    layers: int = 4,
    **train: Any,
) -> Any:
    """A task whose window has so many tokens, in so many micro-batches."""
    from nightschool.config.recipe import Recipe, Train
    from nightschool.data.batches import Batches
    from nightschool.data.chat.render import Rendered
    from nightschool.models.build import build_config, build_model
    from nightschool.models.streamed import ExpertPlace, build_streamed
    from nightschool.training.environment import keep_freed_memory
    from nightschool.training.methods.finetune import FinetuneTask

    shape = {"hidden_size": width, "num_hidden_layers": layers, "num_experts": num_experts, "expert_size": expert_size}
    if tier == "device":
        model = build_model("new:moe-tiny", VOCAB_SIZE, 0, shape=shape)
    else:
        config = build_config("new:moe-tiny", VOCAB_SIZE, shape=shape)
        model = build_streamed(config, 0, ExpertPlace(tier, Path(tempfile.gettempdir()), RESIDENT), "cpu")
    chance = torch.Generator().manual_seed(0)
    ids = torch.randint(0, VOCAB_SIZE, (tokens // TOKENS_PER_DOCUMENT, TOKENS_PER_DOCUMENT), generator=chance)
    documents = [Rendered(row, [1.0] * len(row), ["text"] * len(row)) for row in ids.tolist()]
    settings = Train(**({"accumulation_steps": micro_batches} | train))
    task = FinetuneTask(model, Batches(documents, batch_size=len(documents) // micro_batches, seed=0), settings)
    model.train()
    # As in a run, which keeps what it frees; without that, resident gradients would be new pages in each step.
    keep_freed_memory(Recipe.model_validate({"base": "new:moe-tiny", "data": [{"path": "none"}]}))
    return task


def step(task: Any, rate: float = 1e-3, clip: float = 1.0) -> tuple[float, float]:
    """One step over all micro-batches; returns the loss and the norm of the gradients."""
    window = [task.batch(0, place) for place in range(task.epoch_length(0))]
    loss = task.accumulate(window, sum(batch.loss_units for batch in window))
    return loss.item(), task.update(rate, clip, None, task.world).item()


def peak_bytes() -> int:
    """The largest resident set since `forget_peak`."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024


def forget_peak() -> None:
    """Count anew."""
    Path("/proc/self/clear_refs").write_text("5")


def main() -> None:
    tier, num_experts, tokens, steps, width, expert_size, layers, *limit = sys.argv[1:]
    torch.set_num_threads(1)
    if limit:
        resource.setrlimit(resource.RLIMIT_DATA, (int(limit[0]), int(limit[0])))
    shape = {"width": int(width), "expert_size": int(expert_size), "layers": int(layers)}
    task = new_task(tier, int(num_experts), int(tokens), **shape)
    forget_peak()
    for _ in range(int(steps)):
        step(task)
    print(peak_bytes())


if __name__ == "__main__":
    main()
