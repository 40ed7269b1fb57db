"""The end of a run: which of its weights become a candidate, and their way into the registry."""

from __future__ import annotations

import hashlib
import json

from nightschool.models.cost import count_parameters
from nightschool.store import checkpoints
from nightschool.store.home import Home
from nightschool.store.registry import Registry
from nightschool.store.runs import Run
from nightschool.store.versions import VersionMetadata
from nightschool.training.checkpoint import full_state
from nightschool.training.progress import say
from nightschool.training.publish import publish_candidate
from nightschool.training.setup import PreparedRun
from nightschool.training.state import TrainState


def publish(home: Home, run: Run, prepared: PreparedRun, state: TrainState) -> None:
    """Publish the weights with the lowest held-out loss of this run: the last ones, or those of a checkpoint."""
    recipe, loaded, task = prepared.recipe, prepared.loaded, prepared.task
    step, heldout = _take_best(run, prepared, state)
    task.optimizer.release()
    task.model.eval()
    count = count_parameters(task.model)
    facts = VersionMetadata(
        kind="adapter" if loaded.adapter else "model",
        method=recipe.method,
        base=loaded.base_ref if loaded.adapter else recipe.base,
        parent=loaded.ref if _is_version(home, recipe.base) else None,
        run_id=run.id,
        recipe_digest=hashlib.sha256(json.dumps(recipe.as_plain(), sort_keys=True).encode()).hexdigest(),
        data_fingerprint=task.fingerprint,
        num_parameters=count.total,
        dtype=str(next(iter(task.trainable().values())).dtype).removeprefix("torch."),
        context_tokens=loaded.context_tokens,
        heldout_loss=heldout,
    )
    say(f"Publishing step {step} as a candidate of {recipe.name}")
    version, difference = publish_candidate(Registry(home), recipe.name, loaded, prepared.examples, facts)
    run.events.write("published", candidate=version.ref, step=step, logits_difference=difference)
    run.update_status(state="completed", candidate=version.ref, step=state.step, exit_code=0)
    say(f"Published {version.ref}: loaded again, its logits differ by {difference:.1e} from the trained model's")


def _take_best(run: Run, prepared: PreparedRun, state: TrainState) -> tuple[int, float | None]:
    """Leave the best weights of the run in the model; return their step and held-out loss."""
    last = state.heldout_loss
    if last is None:
        return state.step, None
    saved = [(loss, point) for point in checkpoints.ls(run) if (loss := point.heldout_loss()) is not None]
    best = min(saved, key=lambda pair: (pair[0], -pair[1].step), default=None)
    if best is None or best[0] >= last:
        return state.step, last
    loss, point = best
    say(f"The held-out loss was lowest at step {point.step}: {loss:.4f}, against {last:.4f} at the end")
    full_state.load_weights(point.path, prepared.task)
    return point.step, loss


def _is_version(home: Home, base: str) -> bool:
    """Whether the base is one of the registry."""
    return "@" in base or base in Registry(home).names()
