"""`python -m nightschool.training.planning.peak_bytes --home H --root R --recipe FILE --output FILE`.

Writes what a run will hold at its peak, and on which device, for whoever decides whether it may begin beside others.
Loads the base and the data; computes nothing with them. The last three options, given several times, are as many runs,
planned one after the other.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch

from nightschool.config.recipe import Recipe
from nightschool.errors import NightschoolError
from nightschool.models.cost import expected_peak_bytes
from nightschool.models.dtype import num_threads_here
from nightschool.store.atomic import read_json, write_json
from nightschool.store.home import Home
from nightschool.training.methods import METHODS
from nightschool.training.methods.prepared import Setup
from nightschool.training.planning.plan import SAMPLED_EXAMPLES
from nightschool.units import printable
from nightschool.work.processes import leave

_OF_EACH_RUN = {
    "--root": "where relative paths of the recipe begin",
    "--recipe": "the recipe as JSON",
    "--output": "where the figures are written",
}


def main(arguments: list[str] | None = None) -> int:
    """Plan the recipe in each file, and write its figures into another. One that cannot be planned keeps no other back."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--home", type=Path, required=True)
    for option, text in _OF_EACH_RUN.items():
        parser.add_argument(option, type=Path, required=True, action="append", help=text)
    given = parser.parse_args(arguments)
    exit_code = 0
    for root, recipe, output in zip(given.root, given.recipe, given.output, strict=True):
        try:
            write_json(output, peak_bytes(Recipe.model_validate(read_json(recipe)), Home(given.home), root))
        except NightschoolError as error:
            print(f"error: {printable(str(error))}", file=sys.stderr)  # noqa: T201
            exit_code = error.exit_code
    return exit_code


def peak_bytes(recipe: Recipe, home: Home, root: Path) -> dict[str, int | str | None]:
    """The bytes of tensors at a run's peak, its device, what a GPU has in all (None for a CPU), processes, and CPU threads of all.

    `base_bytes` of them are weights that do not learn.

    Raises:
        NightschoolError: As preparing the run would.
    """
    prepared = METHODS[recipe.method].prepare(Setup(recipe, home, root, sample=SAMPLED_EXAMPLES))
    task = prepared.task
    method = prepared.plan_rows(recipe.train.num_processes or task.world.size)
    cost = expected_peak_bytes(
        task.model,
        method.largest_batch_tokens,
        gradient_checkpointing=recipe.train.gradient_checkpointing,
        compute=task.compute_dtype,
    )
    total = torch.cuda.mem_get_info(task.device)[1] if task.device.type == "cuda" else None
    on_one_device = 1 if total is not None else method.processes
    frozen = sum(p.numel() * p.element_size() for p in task.model.parameters() if not p.requires_grad)
    threads = recipe.train.num_threads
    return {
        "device": task.device.type,
        "expected_peak_bytes": cost.total * on_one_device,
        "base_bytes": frozen,
        "device_total_bytes": total,
        "processes": method.processes,
        "cpu_threads": num_threads_here() if threads is None else threads * method.processes,
    }


if __name__ == "__main__":
    leave(main())
