"""From trained weights to a published candidate: proven equal to what was trained, with answers to check it by."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from nightschool.data.chat.render import render_prompt, stop_token_ids
from nightschool.data.example import Example
from nightschool.evaluation.spot_check import SpotCheck, best_of
from nightschool.models.cost import count_parameters
from nightschool.models.load import LoadedModel
from nightschool.models.version_folder import OnWritten, write_version
from nightschool.store import checkpoints
from nightschool.store.candidate_files import CandidateFiles
from nightschool.store.checkpoints import Checkpoint
from nightschool.store.home import Home
from nightschool.store.names import split_quantization
from nightschool.store.registry import Registry, Version, VersionMetadata
from nightschool.store.runs import Run
from nightschool.store.versions import Probe
from nightschool.training.checkpoint import full_state
from nightschool.training.continuation import greedy_continuation
from nightschool.training.interpolation import go_back
from nightschool.training.methods.prepared import PreparedRun
from nightschool.training.metrics import say
from nightschool.training.state import Budget, TrainState

NUM_PROBES = 3
PROBE_TOKENS = 12
# A probe ends before a token that another kernel might choose differently: bf16 logits of 10 are 0.04 apart, and where
# the weights are in 16 bits, all layers before them rounded as well.
MIN_MARGIN = 0.1
MIN_MARGIN_16_BIT = 0.5


def publish(home: Home, run: Run, prepared: PreparedRun[Any], state: TrainState) -> None:
    """Publish the best weights of this run: the last ones, or those of a checkpoint.

    The best are those of which a spot check that passes shows most; where none does, those with the lowest held-out loss.

    Before them come other checkpoints, as many as `checkpoints.publish` says, each under an alias of its own.
    """
    recipe, loaded, task = prepared.recipe, prepared.loaded, prepared.task
    registry = Registry(home)
    task.release()
    task.model.eval()
    facts = VersionMetadata(
        kind=prepared.version_kind,
        method=recipe.method,
        base=prepared.stands_on,
        parent=split_quantization(loaded.ref)[0] if _is_version(home, recipe.base) else None,
        run_id=run.id,
        recipe_digest=hashlib.sha256(json.dumps(recipe.as_plain(), sort_keys=True).encode()).hexdigest(),
        data_fingerprint=task.fingerprint,
        num_parameters=count_parameters(task.model).total,
        dtype=str(task.weights()[0].dtype).removeprefix("torch."),
        context_tokens=loaded.context_tokens,
    )
    best = _best_checkpoint(run, state, prepared.budget)
    _publish_others(registry, run, prepared, facts, state.step, state.step if best is None else best.step)
    step, heldout = state.step, state.heldout_loss
    if best is not None:
        step, heldout = best.step, best.heldout_loss()
        full_state.load_weights(best.path, task)
    if _go_back(run, prepared, state, step) and heldout is not None and prepared.evaluate is not None:
        heldout, _ = prepared.evaluate()
    facts = facts.model_copy(
        update={"heldout_loss": heldout, "version": registry.new_version_id(recipe.name)},
    )
    say(f"Publishing step {step} as a candidate of {recipe.name}")

    def announce(folder: Path) -> None:
        if loaded.adapter:  # weights in full are no sooner examined: the base is in memory already
            CandidateFiles(f"{recipe.name}@{facts.version}", facts.base, folder).announce(run)

    version, difference = publish_candidate(
        registry, recipe.name, loaded, prepared.examples, facts, announce, prepared.write_version
    )
    if recipe.checkpoints.publish:
        registry.set_alias(recipe.name, checkpoints.alias_of(step), version.id, by=f"run {run.id}")
    run.events.write("published", candidate=version.ref, step=step, logits_difference=difference)
    run.update_status(state="completed", candidate=version.ref, step=state.step, exit_code=0)
    say(f"Published {version.ref}: loaded again, its logits differ by {difference:.1e} from the trained model's")


def _best_checkpoint(run: Run, state: TrainState, budget: Budget) -> Checkpoint | None:
    """The checkpoint with the best weights; None where the last ones are the best, or the best were not kept."""
    checked = None if budget.enough is None else best_of(state.spot_checks, budget.good)
    if checked is not None:
        return _of_spot_check(run, state, checked)
    if budget.enough is not None and state.spot_checks:
        most = max(state.spot_checks, key=lambda check: (check.learned, -(check.drift or 0.0)))
        say(
            f"No spot check passed (needed: {budget.good.text}). Most was learned at step {most.step}: {most.text}. "
            f"See nightschool runs show {run.id}."
        )
    saved = [(loss, point) for point in checkpoints.ls(run) if (loss := point.heldout_loss()) is not None]
    best = min(saved, key=lambda pair: (pair[0], -pair[1].step), default=None)
    if state.heldout_loss is None or best is None or best[0] >= state.heldout_loss:
        return None
    say(
        f"The held-out loss was lowest at step {best[1].step}: {best[0]:.4f}, against {state.heldout_loss:.4f} at the end"
    )
    return best[1]


def _of_spot_check(run: Run, state: TrainState, best: SpotCheck) -> Checkpoint | None:
    """The checkpoint of the best spot check; None if that was taken of the last weights."""
    if best.step == state.step:
        return None
    found = next(
        (point for point in reversed(checkpoints.by_age(checkpoints.ls(run))) if point.step == best.step), None
    )
    last = f"{state.spot_checks[-1].text} at step {state.step}"
    if found is None:
        say(
            f"Step {best.step} was the best ({best.text}), and its checkpoint is gone: the last weights are published, with {last}"
        )
        return None
    say(f"Step {best.step} was the best: {best.text}, against {last}")
    return found


def _go_back(run: Run, prepared: PreparedRun[Any], state: TrainState, step: int) -> bool:
    """Take back what of the learned weights is not needed for what a spot check of this step found; whether there was anything."""
    learned = next((check for check in reversed(state.spot_checks) if check.step == step), None)
    if prepared.beginning is None or prepared.spot_check is None or learned is None:
        return False
    share, found = go_back(prepared.task.model, prepared.beginning, prepared.spot_check, learned)
    run.events.write("interpolated", share=share, **found.to_json())
    if share < 1.0:
        say(f"At {share:.0%} of the way from the beginning it knows as much: {found.text}, against {learned.text}")
    return share < 1.0


def _publish_others(
    registry: Registry, run: Run, prepared: PreparedRun[Any], facts: VersionMetadata, last_step: int, best_step: int
) -> None:
    """Publish the newest checkpoints but the best one, which is the candidate, and leave the last weights in the model.

    A run that was killed in between finds those that it has published already by their aliases.
    """
    name, most = prepared.recipe.name, prepared.recipe.checkpoints.publish
    points = checkpoints.ls(run)
    if not most or not points or points[-1].step != last_step:  # the last weights could not be brought back
        return
    for point in points[-most:]:
        alias = checkpoints.alias_of(point.step)
        if point.step != best_step and alias not in registry.aliases(name):
            full_state.load_weights(point.path, prepared.task)
            of_point = facts.model_copy(update={"heldout_loss": point.heldout_loss()})
            version, _ = publish_candidate(
                registry, name, prepared.loaded, prepared.examples, of_point, None, prepared.write_version
            )
            registry.set_alias(name, alias, version.id, by=f"run {run.id}")
            say(f"Published step {point.step} as {name}@{alias}")
    full_state.load_weights(points[-1].path, prepared.task)


def _is_version(home: Home, base: str) -> bool:
    """Whether the base is one of the registry."""
    base, _ = split_quantization(base)
    return "@" in base or base in Registry(home).names()


def publish_candidate(
    registry: Registry,
    name: str,
    loaded: LoadedModel,
    examples: Sequence[Example],
    facts: VersionMetadata,
    on_written: OnWritten | None = None,
    write: Callable[[Path, OnWritten | None], float] | None = None,
) -> tuple[Version, float]:
    """Publish the model; return the version, and how far logits of the folder lie from those of the trained model.

    Args:
        registry: Where to.
        name: Under which name.
        loaded: The trained model, with or without adapter, and its tokenizer.
        examples: Of which some become probes.
        facts: Where the version comes from; the probes are added here.
        on_written: Called with the folder when all files of the model are in it, before they are proved and sealed.
        write: Writes what was trained into a folder, in place of `write_version`.

    Raises:
        ModelError: If the folder, loaded again by plain transformers and peft, is not the trained model.
        DiskFull: If there is no room. In both cases nothing is published.
    """
    difference = 0.0

    def fill(folder: Path) -> None:
        nonlocal difference
        difference = write_version(loaded, folder, on_written) if write is None else write(folder, on_written)

    def probes() -> list[Probe]:
        return list(make_probes(loaded.model, loaded.tokenizer, examples, loaded.context_tokens))

    version = registry.publish(name, fill, facts, probes=probes)
    return version, difference


def make_probes(model: nn.Module, tokenizer: Any, examples: Sequence[Example], context_tokens: int) -> Iterator[Probe]:
    """Yield at most `NUM_PROBES` prompts with what the model itself answers greedily, right or wrong."""
    found = 0
    in_16_bits = any(parameter.element_size() < 4 for parameter in model.parameters())
    min_margin = MIN_MARGIN_16_BIT if in_16_bits else MIN_MARGIN
    for example in examples[: 4 * NUM_PROBES]:
        prompt_ids = _prompt_of(tokenizer, example)
        if not 0 < len(prompt_ids) <= context_tokens - PROBE_TOKENS:
            continue
        expected_ids = greedy_continuation(
            model, prompt_ids, PROBE_TOKENS, stop_ids=stop_token_ids(tokenizer), min_margin=min_margin
        )
        if expected_ids:
            yield Probe(prompt_ids=prompt_ids, expected_ids=expected_ids)
            found += 1
        if found == NUM_PROBES:
            return


def _prompt_of(tokenizer: Any, example: Example) -> list[int]:
    if example.messages:
        return render_prompt(tokenizer, example.messages[:-1])
    ids: list[int] = tokenizer(example.text, add_special_tokens=True)["input_ids"]
    return ids[: max(1, min(64, len(ids) // 2))]
