"""`python -m nightschool.training.planning.peak_bytes --home H --root R --recipe FILE --output FILE`.

Writes what a run will hold at its peak, and on which device, for whoever decides whether it may begin beside others.
Loads the base and the data; computes nothing with them. The last three options, given several times, are as many runs,
planned one after the other.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

import torch

from nightschool.config.recipe import Recipe
from nightschool.errors import NightschoolError
from nightschool.models.cost import expected_peak_bytes
from nightschool.models.dtype import num_threads_here
from nightschool.models.load import LoadedModel, load_base
from nightschool.models.resident import ResidentBases
from nightschool.store.atomic import read_json, write_json
from nightschool.store.home import Home
from nightschool.training.methods import METHODS
from nightschool.training.methods.prepared import Setup
from nightschool.training.optimizer import optimizer_class
from nightschool.training.planning.plan import SAMPLED_EXAMPLES
from nightschool.training.together.joint import pass_tokens
from nightschool.units import printable
from nightschool.work.processes import live

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
    exit_code, load = 0, load_base if len(given.recipe) == 1 else ResidentBases().load_base
    for root, recipe, output in zip(given.root, given.recipe, given.output, strict=True):
        try:
            plain = read_json(recipe)
            write_json(output, peak_bytes(Recipe.model_validate(plain), Home(given.home), root, load_base=load))
        except NightschoolError as error:
            print(f"error: {printable(str(error))}", file=sys.stderr)  # noqa: T201
            exit_code = error.exit_code
    return exit_code


def peak_bytes(
    recipe: Recipe, home: Home, root: Path, *, load_base: Callable[..., LoadedModel] = load_base
) -> dict[str, int | str | None]:
    """The bytes of tensors at a run's peak, its device, what a GPU has in all (None for a CPU), processes, and CPU threads of all.

    `base_bytes` of them are weights that do not learn, and `pass_bytes` are there during a pass alone; a pass that it has
    together with other runs takes `joint_pass_bytes`. `load_base` finds the base, where it is loaded already.

    Raises:
        NightschoolError: As preparing the run would.
    """
    setup = Setup(recipe, home, root, sample=SAMPLED_EXAMPLES, load_base=load_base)
    prepared = METHODS[recipe.method].prepare(setup)
    task = prepared.task
    method = prepared.plan_rows(recipe.train.num_processes or task.world.size)
    cost, joint = (
        expected_peak_bytes(
            task.model,
            tokens,
            gradient_checkpointing=recipe.train.gradient_checkpointing,
            layer_by_layer_bytes=recipe.train.accumulation_steps * task.kept_bytes(tokens),
            compute=task.compute_dtype,
            moment_bytes=optimizer_class(recipe.train).moment_bytes,
        )
        for tokens in (method.largest_batch_tokens, max(pass_tokens(task.model), method.largest_batch_tokens))
    )
    total = torch.cuda.mem_get_info(task.device)[1] if task.device.type == "cuda" else None
    on_one_device = 1 if total is not None else method.processes
    frozen = sum(p.numel() * p.element_size() for p in task.model.parameters() if not p.requires_grad)
    threads = recipe.train.num_threads
    return {
        "device": task.device.type,
        "expected_peak_bytes": max(cost.total, cost.parameters + method.bytes_before) * on_one_device,
        "base_bytes": frozen,
        "pass_bytes": cost.activations + cost.logits,
        "joint_pass_bytes": joint.activations + joint.logits,
        "device_total_bytes": total,
        "processes": method.processes,
        "cpu_threads": num_threads_here() if threads is None else threads * method.processes,
    }


if __name__ == "__main__":
    live(main)
