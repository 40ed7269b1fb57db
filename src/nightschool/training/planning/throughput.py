"""What both plans measure and reckon: the speed of a few micro-batches, the room on disk."""

from __future__ import annotations

import shutil
import time
from dataclasses import dataclass
from pathlib import Path

from nightschool.models.cost import flops_per_token
from nightschool.models.peak import peak_flops
from nightschool.training.methods.causal import FinetuneTask, PretrainTask
from nightschool.training.planning.precision import compute, measuring, reckoned_seconds
from nightschool.training.setup import PreparedRun

PROBE_SECONDS = 3.0
PROBE_BATCHES = 3
LONGEST_BATCH_SECONDS = 10.0
TRAINED_DTYPE_BYTES = 4


@dataclass(frozen=True)
class Probe:
    """How fast forward and backward passes were; `batches` micro-batches were measured after one to warm up.

    Where that would take too long, none was: then the speed is that of the best product, which no step reaches.
    """

    batches: int
    tokens_per_second: float

    @property
    def how(self) -> str:
        """Where the figure comes from, for people."""
        if self.batches:
            return f"from {self.batches} measured micro-batches"
        return (
            "at the least: nothing was measured, because a micro-batch takes long, and no step is as fast as a product"
        )


def measure(task: FinetuneTask | PretrainTask) -> Probe:
    """Compute a few micro-batches forward and backward, without an update, and leave everything as it was."""
    if reckoned_seconds(task, task.compute_dtype) > LONGEST_BATCH_SECONDS:
        flops = flops_per_token(task.model)
        return Probe(0, peak_flops(task.device, task.compute_dtype)[0] / flops)
    sizes = [(task.batch(0, index).input_ids.shape[-1], index) for index in range(min(16, task.epoch_length(0)))]
    tokens, seconds, batches = 0, 0.0, 0
    with measuring(task):
        compute(task, min(sizes)[1])
        while batches == 0 or (batches < PROBE_BATCHES and seconds < PROBE_SECONDS):
            size, index = sizes[batches % len(sizes)]
            started = time.perf_counter()
            compute(task, index)
            seconds += time.perf_counter() - started
            tokens += size
            batches += 1
    return Probe(batches, tokens / max(seconds, 1e-9))


def disk_needed(prepared: PreparedRun, total: int, trainable: int) -> int:
    """Checkpoints (weights and two moments, in fp32) at their most, one of them half-written, and the version."""
    keep = prepared.recipe.checkpoints.keep
    checkpoint = 3 * TRAINED_DTYPE_BYTES * trainable
    version = TRAINED_DTYPE_BYTES * (trainable if prepared.loaded.adapter else total)
    return (keep.last + keep.best + 1) * checkpoint + version


def disk_free(path: Path) -> int:
    """Free bytes where the home is, or will be."""
    while not path.exists():
        path = path.parent
    return shutil.disk_usage(path).free
