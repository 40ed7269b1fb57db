"""`nightschool checkpoints`: full training state on disk."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from nightschool import uploads
from nightschool.cli.formatting import figure, learning_rate, loss, moment, trend_arrow
from nightschool.cli.lookup import find_checkpoint, find_run_or_checkpoint
from nightschool.cli.output import answer, confirm, table
from nightschool.config.checkpoints import Keep
from nightschool.errors import Damaged, NotFound, UsageError
from nightschool.store import checkpoints
from nightschool.store.home import Home
from nightschool.store.manifest import read_manifest
from nightschool.store.runs import Run, RunStore
from nightschool.units import Every, format_bytes
from nightschool.views.checkpoints import checkpoint_figures, checkpoint_summary, list_checkpoints
from nightschool.views.runs import settings_that_differ
from nightschool.views.uploads import upload_states


def ls(run_id: str | None = None, /) -> None:
    """List the checkpoints of a run by their steps, oldest first, with loss, held-out loss, size and time.

    Args:
        run_id: The run; the newest without it.
    """
    home = Home.find()
    run = RunStore(home).find(run_id)
    rows = list_checkpoints(run, upload_states(home, run))
    answer(
        rows,
        lambda: f"Found {len(rows)} checkpoints of {run.id}:\n{_listed(rows)}" if rows else _none_of(run.id),
        quiet=lambda: "\n".join(row["name"] for row in rows),
    )


def _listed(rows: list[dict[str, Any]]) -> str:
    lines = []
    for index, row in enumerate(rows, 1):
        size = None if row["size_bytes"] is None else format_bytes(row["size_bytes"])
        marks = ", ".join([*(mark for mark in ("newest", "best") if row[mark]), *filter(None, [row["upload"]])])
        lines.append(
            (
                index,
                row["name"],
                row["epoch"],
                row["step"],
                loss(row["loss"]),
                loss(row["heldout_loss"]),
                size,
                moment(row["created_at"]),
                row["reason"],
                "DAMAGED" if row["damaged"] else marks,
            )
        )
    return table(("#", "CHECKPOINT", "EPOCH", "STEP", "LOSS", "HELD-OUT", "SIZE", "TIME", "SAVED FOR", ""), lines)


def _none_of(run_id: str) -> str:
    return f"The run {run_id} has no checkpoints."


def show(checkpoint: str, /) -> None:
    """Show one checkpoint: where training was, its losses and learning rate, the machine, its files.

    Args:
        checkpoint: Its folder, RUN/CHECKPOINT, or its name.
    """
    run, point = find_checkpoint(Home.find(), checkpoint)
    manifest = read_manifest(point.path)
    files = {name: file.size_bytes for name, file in manifest.files.items()}
    kept = checkpoint_figures(run, point)
    data = {
        **checkpoint_summary(run, point),
        "path": str(point.path),
        "facts": manifest.facts,
        "figures": kept,
        "files": files,
    }

    def text() -> str:
        sizes = table(("FILE", "SIZE"), [(name, format_bytes(size)) for name, size in files.items()])
        lines = [(key, value) for key, value in _shown(data, kept) if value is not None]
        return "\n".join([f"{point.name} of {run.id}", *(f"{key:<16} {value}" for key, value in lines), "", sizes])

    answer(data, text, quiet=point.name)


def _shown(data: dict[str, Any], kept: dict[str, Any]) -> list[tuple[str, str | None]]:
    """The lines of `show`: name and value; None is left out."""
    shown: list[tuple[str, str | None]] = [
        ("timestamp", moment(kept["timestamp"])),
        ("step", str(data["step"])),
        ("epoch", str(data["epoch"])),
        ("files processed", str(data["num_files"])),
        ("saved for", data["reason"]),
        ("size", format_bytes(data["size_bytes"])),
        ("CUDA", {True: "yes", False: "no"}.get(kept["cuda_available"])),
        ("GPUs", _text(kept["device_count"])),
        ("precision", _text(kept["mixed_precision"])),
        ("current loss", loss(kept["current_loss"])),
        ("best loss", loss(kept["best_loss"])),
        ("held-out loss", loss(kept["heldout_loss"])),
        ("best held-out", _best_heldout(kept)),
        ("loss history", f"{kept['num_losses']} values" if kept["num_losses"] else None),
        ("mean loss", loss(kept["mean_loss"])),
        ("deviation", loss(kept["loss_deviation"])),
        ("trend", trend_arrow(kept["loss_trend"])),
        ("learning rate", learning_rate(kept["learning_rate"])),
        ("rate history", f"{kept['num_learning_rates']} values" if kept["num_learning_rates"] else None),
    ]
    for name in ("validation_metrics", "training_progress"):
        shown += [(f"  {key}", figure(value, 6)) for key, value in kept[name].items()]
    shown += [(key, figure(value, 6)) for key, value in data["facts"].items() if key not in data]
    shown.append(("path", data["path"]))
    return shown


def _best_heldout(kept: dict[str, Any]) -> str | None:
    best, step = kept["best_heldout_loss"], kept["best_heldout_step"]
    return None if best is None else f"{loss(best)} at step {step:g}"


def _text(value: Any) -> str | None:
    return None if value is None else str(value)


def verify(target: str | None = None, /, *, resume: bool = False, steps: int = 4) -> int:
    """Compare every file with its manifest, byte by byte; with --resume, prove that resuming is exact.

    --resume trains some steps from a checkpoint twice, in copies that are thrown away: once without a break, once
    stopped, saved and resumed by another process. It compares every tensor, and changes nothing in the run.

    Exits 1 if a file is damaged, or a tensor differs.

    Args:
        target: A run, or one checkpoint; the newest run without it.
        resume: Prove the resume instead.
        steps: How many steps --resume trains.
    """
    home = Home.find()
    if resume:
        from nightschool.cli.checkpoints.resume_check import verify_resume

        return verify_resume(home, target, steps)
    run, only = find_run_or_checkpoint(home, target)
    rows = []
    for point in checkpoints.ls(run) if only is None else [only]:
        try:
            manifest = point.verify(digests=True)
            rows.append({"name": point.name, "whole": True, "detail": f"{len(manifest.files)} files match"})
        except (Damaged, NotFound) as error:
            rows.append({"name": point.name, "whole": False, "detail": str(error)})
    damaged = [row for row in rows if not row["whole"]]
    answer(
        {"run_id": run.id, "checkpoints": rows},
        lambda: (
            "\n".join(f"{'ok     ' if row['whole'] else 'DAMAGED'}  {row['name']}  {row['detail']}" for row in rows)
            or _none_of(run.id)
        ),
        quiet=lambda: "\n".join(str(row["name"]) for row in damaged),
    )
    return 1 if damaged else 0


def prune(
    run_id: str | None = None,
    /,
    *,
    keep_last: int = 1,
    keep_best: int = 1,
    keep_every: str | None = None,
    yes: bool = False,
) -> None:
    """Delete old checkpoints of a run; never the only whole one, and none that waits to be uploaded.

    Args:
        run_id: The run; the newest without it.
        keep_last: This many newest ones stay.
        keep_best: This many with the lowest held-out loss stay.
        keep_every: The first one of each "1000 steps" or "5 epochs" stays; without it, as the run's recipe says.
        yes: Do not ask.
    """
    home = Home.find()
    run = RunStore(home).find(run_id)
    keep = Keep(last=max(1, keep_last), best=max(0, keep_best), every=_milestones(run, keep_every))
    milestones = f", the first of each {keep.every}" if keep.every else ""
    confirm(
        f"Keep the newest {keep.last} and the best {keep.best}{milestones} of {len(checkpoints.ls(run))} checkpoints of "
        f"{run.id} and delete the others?",
        yes=yes,
    )
    removed = checkpoints.apply_retention(run, keep, is_pending=partial(uploads.is_pending, home))
    answer(
        {"run_id": run.id, "removed": [point.name for point in removed]},
        lambda: "\n".join([*(f"deleted  {point.name}" for point in removed), f"{len(removed)} deleted"]),
        quiet=lambda: "\n".join(point.name for point in removed),
    )


def _milestones(run: Run, wanted: str | None) -> Every | None:
    """Which checkpoints stay for ever.

    Raises:
        UsageError: If `wanted` is not a rhythm of steps or epochs.
    """
    if wanted is None:
        kept = ((run.recipe().get("checkpoints") or {}).get("keep") or {}).get("every")
        return None if kept is None else Every.parse(kept)
    try:
        every = Every.parse(wanted)
    except ValueError as error:
        raise UsageError(f"--keep-every: {error}.") from None
    if every.unit == "seconds":
        raise UsageError(f"--keep-every {wanted} is a time. Write steps or epochs, such as '1000 steps'.")
    return every


# What `compare` shows, in order: the key among the figures, and how it is written.
_COMPARED: dict[str, Callable[[Any], str | None]] = {
    "step": str,
    "epoch": str,
    "files_processed": str,
    "current_loss": loss,
    "best_loss": loss,
    "mean_loss": loss,
    "loss_deviation": loss,
    "loss_trend": trend_arrow,
    "heldout_loss": loss,
    "best_heldout_loss": loss,
    "learning_rate": learning_rate,
    "mixed_precision": str,
    "size_bytes": format_bytes,
    "timestamp": moment,
}
_DIFFERENCES = ("current_loss", "best_loss", "mean_loss", "heldout_loss", "best_heldout_loss")


def compare(first: str, second: str, /, *more: str) -> None:
    """Show the figures of checkpoints side by side, by their steps, with the losses' difference from the first.

    Args:
        first: A checkpoint: its folder, RUN/CHECKPOINT, or its name.
        second: Another one.
        more: More of them.
    """
    home = Home.find()
    pairs = sorted((find_checkpoint(home, one) for one in (first, second, *more)), key=lambda pair: pair[1].step)
    columns = [checkpoint_figures(*pair) for pair in pairs]
    several_runs = len({run.id for run, _ in pairs}) > 1
    names = [f"{run.id}/{point.name}" if several_runs else point.name for run, point in pairs]
    kept = {key: [column[key] for column in columns] for key in _COMPARED}
    settings = settings_that_differ([run.recipe() for run, _ in pairs]) if several_runs else {}

    def text() -> str:
        rows = [(key, *_with_differences(key, values)) for key, values in kept.items() if set(values) != {None}]
        return table(("", *names), [*rows, *((key, *values) for key, values in settings.items())])

    answer({"checkpoints": names, "figures": kept, "settings": settings}, text)


def _with_differences(key: str, values: list[Any]) -> list[str | None]:
    shown = [None if value is None else _COMPARED[key](value) for value in values]
    if key in _DIFFERENCES and values[0] is not None:
        for index, value in enumerate(values[1:], 1):
            if value is not None:
                shown[index] = f"{shown[index]} ({value - values[0]:+.6f})"
    return shown
