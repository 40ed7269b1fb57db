"""How fast this very task computes, found by computing micro-batches of it: for the plan, and to choose the dtype."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch

from nightschool.models.cost import flops_per_token
from nightschool.models.dtype import DtypeChoice, bf16_speedup
from nightschool.models.peak import peak_flops
from nightschool.training.checkpoint import rng
from nightschool.training.metrics import peak_bytes
from nightschool.training.task import Task
from nightschool.work.peak_memory import forget_peak

# bf16 rounds to 8 bits, so it has to be worth it; and a product alone says at least that it is not emulated.
WORTH_IT = 1.15
PRODUCT_WORTH_IT = 1.3
ROUNDS = 3
MAX_SECONDS = 6.0
PROBE_SECONDS = 3.0
PROBE_BATCHES = 3
LONGEST_BATCH_SECONDS = 10.0


@dataclass(frozen=True)
class Probe:
    """How fast forward and backward passes were; `batches` micro-batches were measured after one to warm up.

    Where that would take too long, none was: then the speed is that of the best product, which no step reaches. Of their
    seconds, `moving_share` went by with reading and writing experts. `peak_bytes` is the most that was held during
    them, of the GPU or resident in this process; None where nothing was measured, or the system does not say.
    """

    batches: int
    tokens_per_second: float
    moving_share: float = 0.0
    peak_bytes: int | None = None

    @property
    def how(self) -> str:
        """Where the figure comes from, for people."""
        if self.batches:
            return f"from {self.batches} measured micro-batches"
        return (
            "at the least: nothing was measured, because a micro-batch takes long, and no step is as fast as a product"
        )


def measure(task: Task, micro_batches: int = 1) -> Probe:
    """Compute a few micro-batches forward and backward, without an update, and leave everything as it was.

    `micro_batches` are those of a step: from the second one on, gradients are found beside those that are there.
    """
    if reckoned_seconds(task, task.compute_dtype) > LONGEST_BATCH_SECONDS:
        flops = flops_per_token(task.model)
        return Probe(0, peak_flops(task.device, task.compute_dtype)[0] / flops)
    sizes = _sizes(task)
    tokens, seconds, batches = 0, 0.0, 0
    anew = task.device.type == "cuda" or forget_peak()
    with measuring(task):
        largest = max(sizes)[1]
        compute(task, *[largest] * min(micro_batches, 2))
        # Sizes that differ leave holes in the heap, as in the run.
        sizes = [sorted(sizes)[place * (len(sizes) - 1) // (PROBE_BATCHES - 1)] for place in range(PROBE_BATCHES)]
        moved = task.moving_seconds
        while batches == 0 or (batches < PROBE_BATCHES and seconds < PROBE_SECONDS):
            size, index = sizes[batches % len(sizes)]
            started = time.perf_counter()
            compute(task, index)
            seconds += time.perf_counter() - started
            tokens += size
            batches += 1
    moving = task.moving_seconds - moved
    # Each micro-batch loaded the experts for itself here; in a step they may be loaded for several at once.
    moving_of_step = moving * task.expert_loads(micro_batches) / micro_batches
    seconds = max(seconds - moving + moving_of_step, 1e-9)
    return Probe(batches, tokens / seconds, moving_of_step / seconds, peak_bytes(task.device) if anew else None)


def choose_by_measuring(task: Task, choice: DtypeChoice, hidden_size: int) -> DtypeChoice:
    """Replace what `auto` chose on a CPU by what the task itself shows; the task then computes in it.

    A product alone misleads: on small models casts and norms take more time than products (measured: on a model of a
    million parameters bf16 products are 2.5 times faster, and its steps 1.6 times slower). The best of a few
    alternating attempts counts, so that a busy machine does not decide. Several processes take what the first one found.
    """
    chosen = task.world.from_first(_measured(task, choice, hidden_size) if task.world.is_first else choice)
    task.compute_dtype = chosen.compute
    return chosen


def _measured(task: Task, choice: DtypeChoice, hidden_size: int) -> DtypeChoice:
    if reckoned_seconds(task, torch.float32) > MAX_SECONDS:
        return choice  # a step takes longer than the measurement may, and what dominates it then is products
    product = bf16_speedup(min(hidden_size, 1024))
    if product < PRODUCT_WORTH_IT:
        why = f"fp32, because a product in bf16 is {product:.2g} times as fast as in fp32 on this CPU"
        return replace(choice, compute=torch.float32, why=why)
    seconds = dict.fromkeys((torch.float32, torch.bfloat16), float("inf"))
    index = max(_sizes(task))[1]
    started = time.perf_counter()
    with measuring(task):
        for attempt in range(ROUNDS + 1):
            for dtype in seconds:
                task.compute_dtype = dtype
                spent = _seconds(lambda: compute(task, index))
                if attempt > 0 or spent > MAX_SECONDS / 4:  # the first attempt also allocates
                    seconds[dtype] = min(seconds[dtype], spent)
            if time.perf_counter() - started > MAX_SECONDS and max(seconds.values()) < float("inf"):
                break
    speedup = seconds[torch.float32] / seconds[torch.bfloat16]
    faster = torch.bfloat16 if speedup >= WORTH_IT else torch.float32
    name = "bf16" if faster == torch.bfloat16 else "fp32"
    why = f"{name}, because bf16 computes a micro-batch of this run {speedup:.2g} times as fast as fp32 on this CPU"
    return replace(choice, compute=faster, why=why)


def reckoned_seconds(task: Task, dtype: torch.dtype) -> float:
    """Seconds that the largest micro-batch takes at the least: if all of it ran as fast as the best product."""
    return max(_sizes(task))[0] * flops_per_token(task.model) / peak_flops(task.device, dtype)[0]


def compute(task: Task, *batch_indices: int) -> None:
    """Micro-batches of epoch 0 as one step, forward and backward, waiting for the end; leaves no gradients."""
    window = [task.batch(0, index) for index in batch_indices]
    task.accumulate(window, max(1, sum(batch.tokens_trained for batch in window))).item()
    task.discard_gradients()


@contextmanager
def measuring(task: Task) -> Iterator[None]:
    """A block in which the task may be computed with; random state and training mode are put back after it."""
    training, random_state = task.model.training, rng.capture()
    task.model.train()
    try:
        yield
    finally:
        task.model.train(training)
        rng.restore(*random_state)


def _sizes(task: Task) -> list[tuple[int, int]]:
    """Tokens and places of the first micro-batches."""
    return [(task.batch(0, index).input_ids.shape[-1], index) for index in range(min(16, task.epoch_length(0)))]


def _seconds(work: Callable[[], None]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started
