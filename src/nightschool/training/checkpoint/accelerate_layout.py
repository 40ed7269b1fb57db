"""Checkpoints in the layout of `accelerate.save_state`: written for others, and read from others.

    model.safetensors (or pytorch_model.bin)   weights
    optimizer.bin, scheduler.bin               what torch's AdamW and LambdaLR say of themselves
    scheduler_state.pt                         the scheduler once more
    random_states_0.pkl                        Python, NumPy and torch, one file a process
    scaler.pt                                  the gradient scaler of fp16
    training_config.json metadata.json training_metrics.json

What is written here loads with `weights_only=True`, and so must what is read: a pickle can run any code. The random state
that accelerate itself writes holds NumPy objects and does not; it is named as missing.
"""

from __future__ import annotations

import json
import math
import pickle
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from nightschool.checkpoint_writer.commit import write_folder
from nightschool.errors import Conflict, Damaged, NotFound, StateMismatch, UsageError
from nightschool.store import checkpoints
from nightschool.store.atomic import publish_directory, read_json
from nightschool.store.checkpoints import ATTEMPT, Checkpoint, checkpoint_path
from nightschool.store.home import Home
from nightschool.store.runs import Run
from nightschool.training.causal_task import CausalTask
from nightschool.training.checkpoint import full_state, rng
from nightschool.training.checkpoint.checkpoint_reader import check_tensors, load_group
from nightschool.training.checkpoint.full_state import state_to_save
from nightschool.training.methods.prepared import PreparedRun
from nightschool.training.optimizer import Schedule
from nightschool.training.run import prepare
from nightschool.training.state import TrainState
from nightschool.uploads.archive import unpack_archive

_COPIED = ("training_config.json", "metadata.json", "training_metrics.json")
# Tables that older versions of transformers kept in GPT-NeoX and others as buffers; they are computed now.
_COMPUTED = (".attention.bias", ".attention.masked_bias", ".rotary_emb.inv_freq", ".attn.bias", ".attn.masked_bias")
# What `weights_only=True` raises for a pickle that wants more than plain values.
_REFUSED = (pickle.UnpicklingError, RuntimeError, ValueError, EOFError, OSError, KeyError)


def export_accelerate(home: Home, run: Run, point: Checkpoint, folder: Path, *, root: Path) -> None:
    """Write a checkpoint as `accelerate.load_state` reads it, for a model, an AdamW with two groups, and a LambdaLR.

    The first group of the optimizer are the parameters that decay (matrices but embeddings), the second one the others,
    both in the order of the model. Weights are the fp32 masters where there are any.

    Args:
        home: Whose registry is asked for bases.
        run: Whose checkpoint it is.
        point: The checkpoint.
        folder: A folder that does not exist yet; it appears whole or not at all.
        root: Where relative paths of the recipe begin.

    Raises:
        Conflict: If the folder exists.
        Damaged: If a file of the checkpoint was altered.
        UsageError: If experts have a learning rate of their own, which this layout has no place for.
    """
    with publish_directory(folder) as partial:
        prepared = prepare(home, run, root=root, point=point, resident=True)
        context = prepared.checkpoint_context(run.recipe_path.read_text(encoding="utf-8"))
        task, schedule, scaler = _task_of(prepared), prepared.schedule, prepared.scaler
        if not task.optimizer.has_one_rate:
            raise UsageError(
                "train.expert_learning_rate gives the experts of this run a schedule of their own, and the layout of accelerate has "
                "one. Go on with --resume, or export the version instead: nightschool models export."
            )
        state = full_state.load(point.path, task, context, schedule, scaler)
        save_file(_all_weights(task), partial / "model.safetensors", metadata={"format": "pt"})
        torch.save(task.optimizer.inner.state_dict(), partial / "optimizer.bin")
        groups = len(task.optimizer.inner.param_groups)
        for name in ("scheduler.bin", "scheduler_state.pt"):
            torch.save(_scheduler_state(schedule, state.step, groups), partial / name)
        if scaler is not None:
            torch.save(scaler.state_dict(), partial / "scaler.pt")
        rank = 0
        while (point.path / f"{rng.group_of(rank)}.json").is_file():
            plain = read_json(point.path / f"{rng.group_of(rank)}.json")
            tensors = load_group(point.path, rng.group_of(rank))
            torch.save(_random_states(state.step, plain, tensors), partial / f"random_states_{rank}.pkl")
            rank += 1
        for name in _COPIED:
            if (point.path / name).is_file():
                (partial / name).write_bytes((point.path / name).read_bytes())


@dataclass
class Imported:
    """A checkpoint that was read from another layout. `missing` says what begins anew, and why, a line each."""

    checkpoint: Path
    step: int
    missing: list[str] = field(default_factory=list)


def import_accelerate(home: Home, run: Run, source: Path, *, root: Path) -> Imported:
    """Turn a folder of accelerate's layout, or a `.tar.gz` of one, into a checkpoint of a run that has none.

    Weights must fit the recipe's model by every name and shape. What else is there and fits is taken: moments, random
    state, loss history, step. The data go on where this run's own order is at that step.

    Args:
        home: Whose registry is asked for bases.
        run: A run that was created and not trained.
        source: The folder or the archive.
        root: Where relative paths of the recipe begin.

    Raises:
        NotFound: If there is no such folder, or it holds no weights.
        Damaged: If a file cannot be read, or an archive holds a path outside its folder, a link or a device.
        StateMismatch: If the weights are not those of the recipe's model.
        Conflict: If the run has checkpoints.
    """
    if checkpoints.ls(run):
        raise Conflict(f"The run {run.id} has checkpoints of its own. Import into a new run.")
    if source.is_dir():
        return _import_folder(home, run, source, source.name, root)
    if not source.is_file():
        raise NotFound(f"{source} does not exist. Name a folder, or an archive such as full_state.tar.gz.")
    with tempfile.TemporaryDirectory(dir=run.path, prefix="import-") as name:
        original = unpack_archive(source, Path(name))
        return _import_folder(home, run, Path(name), original, root)


def _import_folder(home: Home, run: Run, folder: Path, original: str, root: Path) -> Imported:
    weights = _read_weights(folder)
    prepared = prepare(home, run, root=root, point=None, resident=True)
    task = _task_of(prepared)
    _take_weights(task, weights, original)
    missing: list[str] = []
    facts = _read_json(folder / "metadata.json", missing) or _read_json(folder / "training_metrics.json", [])
    step = _step_of(folder, facts, original, missing)
    state = _state_at(prepared, step, facts)
    _take_optimizer(task, folder, missing)
    _take_random_state(folder, missing)
    if prepared.scaler is not None and (scale := _read_plain(folder, "scaler.pt", missing)) is not None:
        prepared.scaler.load_state_dict(scale)
    missing.append(f"the position in the data: they go on at step {step} of this run's own order")
    context = prepared.checkpoint_context(run.recipe_path.read_text(encoding="utf-8"))
    whole = state_to_save(task, state, context, prepared.schedule, prepared.scaler)
    target = checkpoint_path(run, state.epoch, step, context.files_processed)
    origin = {"imported_from": original, "began_anew": missing, ATTEMPT: checkpoints.next_attempt(run)}
    write_folder(target, whole.facts | origin, whole.stream)
    run.update_status(step=step, steps_total=prepared.budget.steps_total)
    run.events.write("imported", step=step, name=target.name, source=original, began_anew=missing)
    return Imported(target, step, missing)


def _task_of(prepared: PreparedRun[Any]) -> CausalTask[Any]:
    if not isinstance(prepared.task, CausalTask):
        raise UsageError(
            f"method: {prepared.recipe.method} has an optimizer of its own, which accelerate's layout has no place for. "
            "Export the weights instead: nightschool checkpoints export."
        )
    return prepared.task


# --- weights ------------------------------------------------------------------------------------------------------


def _all_weights(task: CausalTask[Any]) -> dict[str, Tensor]:
    """Every parameter once, and the buffers that are kept, under the model's own names."""
    held = task.optimizer.state()
    buffers = {name: tensor for name, tensor in task.saved_tensors().items() if name not in task.trainable()}
    weights = {name: parameter.detach() for name, parameter in task.model.named_parameters()} | buffers
    return {name: held.get(f"master.{name}", tensor).detach().cpu().contiguous() for name, tensor in weights.items()}


def _read_weights(folder: Path) -> dict[str, Tensor]:
    weights = load_group(folder, "model")
    if weights:
        return weights
    if not (folder / "pytorch_model.bin").is_file():
        raise NotFound(
            f"{folder.name} holds neither model.safetensors nor pytorch_model.bin, so there are no weights to go on from. "
            "Name the folder that accelerate wrote."
        )
    try:
        found = torch.load(folder / "pytorch_model.bin", map_location="cpu", weights_only=True)
    except _REFUSED as error:
        raise Damaged(f"pytorch_model.bin cannot be read as plain tensors: {error}. Take another copy.") from error
    if not isinstance(found, dict) or not all(isinstance(value, Tensor) for value in found.values()):
        raise Damaged("pytorch_model.bin holds more than tensors by name. Take the file that accelerate wrote.")
    return found


@torch.no_grad()
def _take_weights(task: CausalTask[Any], found: dict[str, Tensor], original: str) -> None:
    """Copy the weights, after every name and shape was compared; dtypes are the model's."""
    found = {name.removeprefix("module.").removeprefix("_orig_mod."): tensor for name, tensor in found.items()}
    wanted = task.saved_tensors()
    tied = set(task.model.state_dict()) - {name for name, _ in task.model.named_parameters()} - set(wanted)
    frozen = {name for name, parameter in task.model.named_parameters() if not parameter.requires_grad}
    extra = {name for name in found if name in tied | frozen or name.endswith(_COMPUTED)} - set(wanted)
    weights = {
        name: tensor.to(wanted[name].dtype) if name in wanted and tensor.is_floating_point() else tensor
        for name, tensor in found.items()
        if name not in extra
    }
    check_tensors(weights, wanted, what=f"weights of {original}")
    for name, tensor in wanted.items():
        tensor.copy_(weights[name])
    task.optimizer.take_masters({name: found[name] for name in task.trainable()})


# --- what may be missing ------------------------------------------------------------------------------------------


def _read_json(path: Path, missing: list[str]) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        missing.append(f"{path.name} ({_why(error)}): the loss history begins anew")
        return {}
    return content if isinstance(content, dict) else {}


def _read_plain(folder: Path, name: str, missing: list[str]) -> Any:
    try:
        return torch.load(folder / name, map_location="cpu", weights_only=True)
    except _REFUSED as error:
        missing.append(f"{name} ({_why(error)})")
        return None


def _why(error: Exception) -> str:
    if isinstance(error, FileNotFoundError):
        return "not there"
    if isinstance(error, pickle.UnpicklingError):
        return "it holds more than plain values and tensors, and a pickle of more can run any code"
    return str(error).splitlines()[0]


def _step_of(folder: Path, facts: dict[str, Any], original: str, missing: list[str]) -> int:
    """The finished steps: as the metadata say, else the folder's name, else the scheduler."""
    stated = facts.get("step", (facts.get("training_progress") or {}).get("completed_steps"))
    if isinstance(stated, int) and stated > 0:
        return stated
    named = checkpoints.parse_checkpoint(Path(original))
    if named is not None:
        return named.step
    scheduler = _read_plain(folder, "scheduler.bin", missing)
    if isinstance(scheduler, dict) and isinstance(scheduler.get("last_epoch"), int) and scheduler["last_epoch"] > 0:
        return int(scheduler["last_epoch"])
    raise StateMismatch(
        f"{original} does not say how many steps were done: no step in metadata.json, in its name or in scheduler.bin. "
        'Write {"step": N} to its metadata.json.'
    )


def _state_at(prepared: PreparedRun[Any], step: int, facts: dict[str, Any]) -> TrainState:
    """Where this run's own order is after so many steps, with the history of the one that is imported."""
    task, budget = prepared.task, prepared.budget
    if step >= budget.steps_total:
        raise StateMismatch(
            f"The checkpoint has done {step} steps, and the recipe ends after {budget.steps_total}. "
            "Raise train.max_steps or train.epochs."
        )
    stride = task.stride * budget.accumulation_steps
    epoch, left = 0, step
    while left >= (length := math.ceil(task.epoch_length(epoch) / stride)):
        epoch, left = epoch + 1, left - length
    state = TrainState(task.fingerprint, step=step, epoch=epoch, batch_index=left * stride, saved_step=step)
    losses = [value for value in facts.get("loss_history") or [] if isinstance(value, int | float)]
    rates = [value for value in facts.get("learning_rates") or [] if isinstance(value, int | float)]
    steps = facts.get("loss_steps")
    if losses and len(losses) == len(rates) and all(map(math.isfinite, losses)):
        if not isinstance(steps, list) or len(steps) != len(
            losses
        ):  # others log at equal distances, and do not say which
            steps = [max(1, round(step * (place + 1) / len(losses))) for place in range(len(losses))]
        state.loss_steps, state.loss_history, state.learning_rates = steps, losses, rates
    return state


def _take_optimizer(task: CausalTask[Any], folder: Path, missing: list[str]) -> None:
    found = _read_plain(folder, "optimizer.bin", missing)
    if found is None:
        missing[-1] += ": the moments begin at zero"
        return
    try:
        moments = _moments_by_name(task, found)
        task.optimizer.load_state(moments, set())
    except (StateMismatch, KeyError, TypeError, IndexError, AttributeError) as error:
        missing.append(f"optimizer.bin (it does not fit: {_why(error)}): the moments begin at zero")


def _moments_by_name(task: CausalTask[Any], found: dict[str, Any]) -> dict[str, Tensor]:
    """The moments under our names. Numbers stand for parameters; they are counted through the groups.

    Known are one group in the order of the model, and two of which the first one decays: by our rule, or by the widespread
    one that leaves biases and norms out.

    Raises:
        StateMismatch: If no known order gives every parameter moments of its shape.
    """
    states, groups = found["state"], found["param_groups"]
    sizes = [len(group["params"]) for group in groups]
    numbers = [number for group in groups for number in group["params"]]
    for names in _orders(task):
        if [len(group) for group in names] != sizes:
            continue
        flat = [name for group in names for name in group]
        pairs = dict(zip(flat, (states[number] for number in numbers), strict=True))
        if all(held["exp_avg"].shape == task.trainable()[name].shape for name, held in pairs.items()):
            masters = {n: t for n, t in task.optimizer.state().items() if n.startswith("master.")}
            tensors: dict[str, Tensor] = dict(masters)
            for name, held in pairs.items():
                tensors[f"first_moment.{name}"] = held["exp_avg"].float()
                tensors[f"second_moment.{name}"] = held["exp_avg_sq"].float()
                tensors[f"updates.{name}"] = torch.as_tensor(held["step"], dtype=torch.float32).reshape(())
            return tensors
    raise StateMismatch(f"its groups of {sizes} parameters are in no order that is known for this model")


def _orders(task: CausalTask[Any]) -> list[list[list[str]]]:
    trainable = task.trainable()
    ours = set(task.optimizer.hyper_parameters()["decayed"])
    norms = {
        name
        for prefix, module in task.model.named_modules()
        if "norm" in type(module).__name__.lower()
        for name in (f"{prefix}.{inner}" for inner, _ in module.named_parameters(recurse=False))
    }
    usual = {name for name in trainable if name not in norms and not name.endswith("bias")}
    orders = [[list(trainable)]]
    for decayed in (ours, usual):
        split = [[n for n in trainable if n in decayed], [n for n in trainable if n not in decayed]]
        orders.append([group for group in split if group])
    return orders


def _random_states(step: int, plain: dict[str, Any], tensors: dict[str, Tensor]) -> dict[str, Any]:
    """As accelerate names them, of plain values and tensors."""
    version, words, gauss = plain["python"]
    algorithm, keys, *rest = plain["numpy"]
    cuda = sorted((name for name in tensors if name.startswith("cuda.")), key=lambda name: int(name[5:]))
    states = {
        "step": step,
        "random_state": (version, tuple(words), gauss),
        "numpy_random_seed": (algorithm, list(keys), *rest),
        "torch_manual_seed": tensors["torch"],
    }
    return states | ({"torch_cuda_manual_seed": [tensors[name] for name in cuda]} if cuda else {})


def _take_random_state(folder: Path, missing: list[str]) -> None:
    found = _read_plain(folder, "random_states_0.pkl", missing)
    if found is None:
        missing[-1] += ": the random state is that of a new run"
        return
    try:
        version, words, gauss = found["random_state"]
        plain = {"python": [version, list(words), gauss], "numpy": list(found["numpy_random_seed"])}
        tensors = {"torch": found["torch_manual_seed"]}
        cuda = found.get("torch_cuda_manual_seed") or []
        rng.restore(plain, tensors | {f"cuda.{index}": state for index, state in enumerate(cuda)})
    except (StateMismatch, KeyError, TypeError, ValueError, RuntimeError) as error:
        missing.append(f"random_states_0.pkl ({_why(error)}): the random state is that of a new run")


def _scheduler_state(schedule: Schedule, step: int, num_groups: int) -> dict[str, Any]:
    """What a LambdaLR over as many groups says of itself after so many steps."""
    return {
        "base_lrs": [schedule.peak] * num_groups,
        "last_epoch": step,
        "_step_count": step + 1,
        "_is_initial": False,
        "_get_lr_called_within_step": False,
        "_last_lr": [schedule.rate(step)] * num_groups,
        "lr_lambdas": [None] * num_groups,
    }
