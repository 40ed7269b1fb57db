"""The whole state of a run on disk: written at once or not at all, and read back exactly or refused by name.

A checkpoint is a folder of safetensors and JSON; nothing in it is a pickle:

    model.safetensors         every parameter that learns and every persistent buffer
    optimizer.safetensors     moments, update counters, fp32 masters;  optimizer.json: hyper-parameters, schedule
    rng.safetensors           torch on every device;                   rng.json: Python, NumPy
                              (of process 0; those of the others are `rng-rank1` and so on)
    state.json                step, position in the data, loss history, gradient scaler, base
    recipe.yaml               the resolved recipe;                     training_config.json: the same as JSON
    metadata.json             for people and for `checkpoints show`;   training_metrics.json: the curves
    manifest.json             SHA-256 and size of every file above, written last

Above 1 GiB of tensors, `model-00001-of-00003.safetensors` … and `model.safetensors.index.json` take the place of one
file, and so for the optimizer. Where processes share the tensors among them, `model-rank0.safetensors`,
`model-rank1.safetensors` … do (see `checkpoint_reader`). What the first format called `weights.safetensors` is still read.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from nightschool.errors import MadeByNewer, StateMismatch
from nightschool.layers.adapted_experts import EXPERT_WEIGHTS
from nightschool.layers.expert_streaming.experts import StreamedExperts
from nightschool.layers.packed_weights import Packing
from nightschool.models.quantize import scales
from nightschool.store.atomic import read_json
from nightschool.store.checkpoints import HELDOUT_LOSS, MERIT, REASON, Reason
from nightschool.store.manifest import verify
from nightschool.training.checkpoint import rng
from nightschool.training.checkpoint.checkpoint_reader import group_files, load_group, open_group, rank_group
from nightschool.training.checkpoint.contents import CheckpointContents, TensorSource, sources_of
from nightschool.training.checkpoint.metadata import metadata, training_config, training_metrics
from nightschool.training.distributed.world import ALONE, World
from nightschool.training.optimizer import Schedule
from nightschool.training.state import TrainState
from nightschool.training.task import Task

FORMAT = 2
REQUIRED = (
    "model.safetensors",
    "optimizer.safetensors",
    "optimizer.json",
    "rng.safetensors",
    "rng.json",
    "state.json",
    "recipe.yaml",
)


@dataclass(frozen=True)
class CheckpointContext:
    """What a checkpoint records besides the task and its state.

    `base_fingerprint` is the digest of the frozen weights below an adapter, None where all weights are saved.
    `files_processed` counts the data files that the examples came from. `numerics` holds the settings of the recipe
    that change the course of training; a run that resumes must have equal ones.
    """

    recipe_yaml: str
    base: str
    base_fingerprint: str | None
    dtype: str
    num_threads: int
    epochs_total: int
    files_processed: int
    model_config: dict[str, Any]
    numerics: dict[str, Any]


def frozen_fingerprint(model: nn.Module) -> str:
    """Return the SHA-256 over names, shapes, dtypes and bytes of all parameters that do not learn, and of their scales."""
    digest = hashlib.sha256()
    frozen: list[tuple[str, torch.Size, torch.dtype, Iterable[Tensor]]] = [
        (name, parameter.shape, parameter.dtype, [parameter])
        for name, parameter in model.named_parameters()
        if not parameter.requires_grad
    ]
    frozen += _streamed_weights(model)
    frozen.sort(key=lambda weight: weight[0])
    of_modules = {name: scales(layer) for name, layer in model.named_modules()} | _streamed_scales(model)
    frozen += [
        (f"{name}.scale", scale.shape, scale.dtype, [scale])
        for name in sorted(of_modules)
        for scale in of_modules[name]
    ]
    for name, shape, dtype, parts in frozen:
        digest.update(f"{name} {list(shape)} {dtype}\n".encode())
        for part in parts:
            raw = part.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
            digest.update(raw.numpy().data)
    return digest.hexdigest()


def _streamed_weights(model: nn.Module) -> list[tuple[str, torch.Size, torch.dtype, Iterable[Tensor]]]:
    """The weights of frozen experts that are streamed, as if they were there, so that the digest is the same on any tier."""
    return [
        (
            f"{name}.{weight}",
            torch.Size((experts.num_experts, *experts.stream.content.stored_shape(which))),
            experts.stream.content.stored_dtype,
            (kept for kept, _ in experts.stream.stored(experts.layer, which)),
        )
        for name, experts in _frozen_streamed(model)
        for which, weight in enumerate(EXPERT_WEIGHTS)
    ]


def _streamed_scales(model: nn.Module) -> dict[str, list[Tensor]]:
    """The scales and tables of codes of such weights, by the names of the modules that would hold them."""
    found: dict[str, list[Tensor]] = {}
    for name, experts in _frozen_streamed(model):
        if experts.stream.content.stored_dtype.is_floating_point:
            continue
        for which, weight in enumerate(EXPERT_WEIGHTS):
            of_experts = [
                {part: scale.clone() for part, scale in parts.items()}
                for _, parts in experts.stream.stored(experts.layer, which)
            ]
            found[f"{name}.packed_{weight}"] = [
                scale if Packing.is_table(part) else torch.stack([parts[part] for parts in of_experts])
                for part, scale in of_experts[0].items()
            ]
    return found


def _frozen_streamed(model: nn.Module) -> list[tuple[str, StreamedExperts]]:
    return [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, StreamedExperts) and not module.stream.learns
    ]


def state_to_save(
    task: Task,
    state: TrainState,
    context: CheckpointContext,
    schedule: Schedule,
    scaler: torch.amp.GradScaler | None = None,
    rngs: Sequence[tuple[dict[str, Any], dict[str, Tensor]]] | None = None,
    rank: int = 0,
    *,
    reason: Reason = "interval",
    merit: Sequence[float] = (),
) -> CheckpointContents:
    """Everything that a checkpoint of this moment holds. The tensors are the run's own: save them before the next step.

    `merit` is that of a spot check that passed at this step. `rngs` are the random states of all processes, in the order of ranks; without them, that of this one. A process of a
    `rank` above 0 adds its part of the tensors, and nothing else.
    """
    if rank > 0:
        return CheckpointContents(tensors=_groups(task, rank), texts={}, facts={"step": state.step})
    rngs = rngs or [rng.capture()]
    recipe = training_config(context.recipe_yaml)
    optimizer = task.optimizer_facts() | {"schedule": asdict(schedule)}
    facts = metadata(
        state,
        steps_total=schedule.steps_total,
        epochs_total=context.epochs_total,
        files_processed=context.files_processed,
        dtype=context.dtype,
        base=context.base,
        model_config=context.model_config,
        recipe=recipe,
    )
    plain = {
        "optimizer.json": optimizer,
        **{f"{rng.group_of(rank)}.json": rng_plain for rank, (rng_plain, _) in enumerate(rngs)},
        "state.json": _plain_state(state, context, scaler),
        "training_config.json": recipe,
        "metadata.json": facts,
        "training_metrics.json": training_metrics(state, schedule.steps_total, context.epochs_total),
    }
    return CheckpointContents(
        tensors={
            **_groups(task),
            **{rng.group_of(rank): sources_of(tensors) for rank, (_, tensors) in enumerate(rngs)},
        },
        texts={name: _to_json(value) for name, value in plain.items()} | {"recipe.yaml": context.recipe_yaml},
        facts={
            "kind": "checkpoint",
            "format": FORMAT,
            REASON: reason,
            "step": state.step,
            "epoch": state.epoch,
            "loss": state.current_loss,
            HELDOUT_LOSS: state.heldout_loss,
            MERIT: list(merit),
            "data_fingerprint": state.fingerprint,
        },
    )


def _plain_state(state: TrainState, context: CheckpointContext, scaler: torch.amp.GradScaler | None) -> dict[str, Any]:
    return {
        "format": FORMAT,
        "train": state.to_json(),
        "scaler": None if scaler is None else scaler.state_dict(),
        "base": context.base,
        "base_fingerprint": context.base_fingerprint,
        "dtype": context.dtype,
        "num_threads": context.num_threads,
        "numerics": context.numerics,
    }


def _groups(task: Task, rank: int = 0) -> dict[str, list[TensorSource]]:
    """The groups of tensors that a process saves: all there is, or its part of it, under a name of its own."""
    groups = {"model": task.weights(), "optimizer": task.optimizer_state()}
    return {rank_group(stem, rank): sources for stem, sources in groups.items()} if task.is_sharded else groups


def load(
    folder: Path,
    task: Task,
    context: CheckpointContext,
    schedule: Schedule,
    scaler: torch.amp.GradScaler | None = None,
    world: World = ALONE,
) -> TrainState:
    """Put a checkpoint back into the task, its optimizer, the random generators and the scaler; return its state.

    A process that the checkpoint knows nothing of, because fewer wrote it, keeps the random state that it was seeded with,
    moved on by the step.

    Raises:
        Damaged: If a file is missing, truncated or altered.
        MadeByNewer: If a newer version of nightschool wrote it.
        StateMismatch: If anything in it does not fit this run; the message names it.
    """
    verify(folder, digests=True)
    plain = read_json(folder / "state.json") if (folder / "state.json").is_file() else {}
    _refuse_newer(folder, plain.get("format", FORMAT))
    absent = [name for name in REQUIRED if not _is_there(folder, name)]
    if absent:
        raise StateMismatch(
            f"The checkpoint {folder.name} has no {', '.join(absent)}, and without it the run would go on differently. "
            "Resume from another checkpoint."
        )
    optimizer = read_json(folder / "optimizer.json")
    _check_plain(folder, plain, optimizer, task, context, schedule, scaler)
    state = TrainState.from_json(plain["train"])
    task.load_state(open_group(folder, "model"), open_group(folder, "optimizer"), optimizer, folder.name)
    if scaler is not None:
        scaler.load_state_dict(plain["scaler"])
    group = rng.group_of(world.rank)
    if (folder / f"{group}.json").is_file():
        rng.restore(read_json(folder / f"{group}.json"), load_group(folder, group))
    else:
        rng.seed_everything(torch.initial_seed() + 1_000_003 * state.step)
    return state


def load_weights(folder: Path, task: Task) -> None:
    """Put only the weights of a verified checkpoint back, for publishing an earlier step than the last.

    Raises:
        Damaged: If a file is missing, truncated or altered.
        StateMismatch: If a tensor is missing, unexpected, or of another shape or dtype.
    """
    verify(folder, digests=True)
    task.load_weights(open_group(folder, "model"), folder.name)


def _is_there(folder: Path, name: str) -> bool:
    stem = name.removesuffix(".safetensors")
    return bool(group_files(folder, stem)) if stem != name else (folder / name).is_file()


def _refuse_newer(folder: Path, written: object) -> None:
    if isinstance(written, int) and written > FORMAT:
        raise MadeByNewer(
            f"The checkpoint {folder.name} has the format {written}, and this version of nightschool reads up to "
            f"{FORMAT}. Resume with the version that saved it."
        )


def _check_plain(
    folder: Path,
    plain: dict[str, Any],
    optimizer: dict[str, Any],
    task: Task,
    context: CheckpointContext,
    schedule: Schedule,
    scaler: torch.amp.GradScaler | None,
) -> None:
    """Compare everything that is not a tensor, and report all differences together."""
    mine = _must_be_equal(
        _plain_state(TrainState(task.fingerprint), context, scaler),
        task.optimizer_facts() | {"schedule": asdict(schedule)},
    )
    theirs = _must_be_equal(plain, optimizer)
    if _lengths(training_config(context.recipe_yaml)) != _lengths(
        training_config((folder / "recipe.yaml").read_text(encoding="utf-8"))
    ):
        mine["schedule steps_total"] = theirs["schedule steps_total"]  # the run was made to be longer, or shorter
    different = [
        f"{key} (checkpoint: {_short(theirs.get(key))}, run: {_short(mine.get(key))})"
        for key in sorted(mine.keys() | theirs.keys())
        if mine.get(key) != theirs.get(key)
    ]
    if different:
        raise StateMismatch(
            f"The checkpoint {folder.name} does not fit this run: {'; '.join(different)}. "
            "Resume with the recipe and the data that it was saved with, or start a new run from it."
        )


def _lengths(recipe: dict[str, Any]) -> tuple[Any, Any]:
    train = recipe.get("train", {})
    return train.get("epochs"), train.get("max_steps")


def _must_be_equal(plain: dict[str, Any], optimizer: dict[str, Any]) -> dict[str, Any]:
    """Of state.json and optimizer.json what two runs have alike of which one goes on as the other."""
    return {
        "base fingerprint": plain["base_fingerprint"],
        "dtype": plain["dtype"],
        "gradient scaler": plain["scaler"] is not None,
        "data fingerprint": plain["train"]["fingerprint"],
        **plain["numerics"],
        **{f"optimizer {name}": value for name, value in optimizer["hyper_parameters"].items()},
        **{f"schedule {name}": value for name, value in optimizer["schedule"].items()},
    }


def _short(value: object) -> str:
    text = str(value)
    return text if len(text) <= 60 else text[:57] + "…"


def _to_json(value: object) -> str:
    return json.dumps(value, ensure_ascii=False, indent=1, allow_nan=False)
