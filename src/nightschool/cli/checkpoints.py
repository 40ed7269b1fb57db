"""`nightschool checkpoints`: full training state on disk."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from nightschool.cli.chart import chart
from nightschool.cli.session import answer, bold, confirm, note, table
from nightschool.cli.terms import figure, find_checkpoint, find_run, folder_bytes, moment
from nightschool.errors import Damaged, NotFound, UsageError
from nightschool.evaluation.scores import figure_to_json
from nightschool.events import read_events
from nightschool.jobs.outcome import CycleFacts
from nightschool.store import checkpoints
from nightschool.store.atomic import read_json
from nightschool.store.checkpoints import Checkpoint
from nightschool.store.home import Home
from nightschool.store.manifest import read_manifest
from nightschool.store.runs import Run, RunStore
from nightschool.units import format_bytes


def ls(run_id: str | None = None, /) -> None:
    """List the checkpoints of a run, oldest first.

    Args:
        run_id: The run; the newest without it.
    """
    run = find_run(Home.find(), run_id)
    rows = [_facts(run, point) for point in checkpoints.ls(run)]
    answer(
        rows,
        lambda: (
            table(
                ("CHECKPOINT", "EPOCH", "STEP", "HELD-OUT", "SIZE", "CREATED"),
                [
                    (
                        row["name"],
                        row["epoch"],
                        row["step"],
                        figure(row["heldout_loss"]),
                        format_bytes(row["size_bytes"]),
                        moment(row["created_at"]),
                    )
                    for row in rows
                ],
            )
            if rows
            else f"The run {run.id} has no checkpoints."
        ),
        quiet=lambda: "\n".join(row["name"] for row in rows),
    )


def show(checkpoint: str, /) -> None:
    """Show one checkpoint: where training was, its files, its figures.

    Args:
        checkpoint: Its folder, RUN/CHECKPOINT, or its name.
    """
    run, point = find_checkpoint(Home.find(), checkpoint)
    manifest = read_manifest(point.path)
    files = {name: file.size_bytes for name, file in manifest.files.items()}
    data = {**_facts(run, point), "path": str(point.path), "facts": manifest.facts, "files": files}

    def text() -> str:
        lines = [f"{key:<14} {figure(value, 6)}" for key, value in data.items() if key not in ("files", "facts")]
        lines += [f"{key:<14} {figure(value, 6)}" for key, value in manifest.facts.items() if key not in data]
        return "\n".join([*lines, "", table(("FILE", "SIZE"), [(n, format_bytes(s)) for n, s in files.items()])])

    answer(data, text, quiet=point.name)


def verify(target: str | None = None, /) -> int:
    """Compare every file with its manifest, byte by byte. Exits 1 if one is damaged.

    Args:
        target: A run, or one checkpoint; the newest run without it.
    """
    home = Home.find()
    if target is None or target in [run.id for run in RunStore(home).ls()]:
        run = find_run(home, target)
        points = checkpoints.ls(run)
    else:
        run, point = find_checkpoint(home, target)
        points = [point]
    rows = []
    for point in points:
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
            or f"The run {run.id} has no checkpoints."
        ),
        quiet=lambda: "\n".join(str(row["name"]) for row in damaged),
    )
    return 1 if damaged else 0


def prune(run_id: str | None = None, /, *, keep_last: int = 1, keep_best: int = 1, yes: bool = False) -> None:
    """Delete old checkpoints of a run; never the only whole one.

    Args:
        run_id: The run; the newest without it.
        keep_last: This many newest ones stay.
        keep_best: This many with the lowest held-out loss stay.
        yes: Do not ask.
    """
    run = find_run(Home.find(), run_id)
    confirm(
        f"Keep the newest {max(1, keep_last)} and the best {keep_best} of {len(checkpoints.ls(run))} checkpoints of "
        f"{run.id} and delete the others?",
        yes=yes,
    )
    removed = checkpoints.apply_retention(run, max(1, keep_last), keep_best)
    answer(
        {"run_id": run.id, "removed": [point.name for point in removed]},
        lambda: "\n".join([*(f"deleted  {point.name}" for point in removed), f"{len(removed)} deleted"]),
        quiet=lambda: "\n".join(point.name for point in removed),
    )


def compare(first: str, second: str, /) -> None:
    """Show the figures of two checkpoints side by side.

    Args:
        first: A checkpoint: its folder, RUN/CHECKPOINT, or its name.
        second: Another one.
    """
    home = Home.find()
    pairs = [find_checkpoint(home, one) for one in (first, second)]
    facts = [{**_facts(run, point), **read_manifest(point.path).facts} for run, point in pairs]
    keys = list(facts[0] | facts[1])
    answer(
        {key: [facts[0].get(key), facts[1].get(key)] for key in keys},
        lambda: table(
            ("", pairs[0][1].name, pairs[1][1].name),
            [(key, figure(facts[0].get(key), 6), figure(facts[1].get(key), 6)) for key in keys],
        ),
    )


def plot(target: str | None = None, /, *, save: Path | None = None) -> None:
    """Draw the curves of a run, or those up to a checkpoint: loss, held-out loss, learning rate.

    Args:
        target: A run, or one checkpoint; the newest run without it.
        save: Also write them as a picture, such as curves.png. Needs the extra `plot`.
    """
    home = Home.find()
    if target is None or target in [run.id for run in RunStore(home).ls()]:
        run = find_run(home, target)
        title, curves = run.id, _curves_of_run(run)
    else:
        run, point = find_checkpoint(home, target)
        title, curves = f"{run.id} {point.name}", _curves_of_checkpoint(point)
    if not any(curves.values()):
        raise NotFound(f"{title} has no figures yet. See nightschool runs watch {run.id}.")
    if save is not None:
        _save_picture(title, curves, save)
        note(f"Wrote {save}.")
    size = shutil.get_terminal_size((100, 24))

    def text() -> str:
        drawn = [
            chart(name, points, width=min(size.columns, 120), height=8) for name, points in curves.items() if points
        ]
        return "\n\n".join([bold(title), *drawn])

    data = {
        name: [{"step": step, "value": figure_to_json(value)} for step, value in points]
        for name, points in curves.items()
    }
    answer({"title": title, "curves": data}, text)


def export(checkpoint: str, folder: Path, /) -> None:
    """Write the weights of a checkpoint as a folder of your own, which transformers (or PEFT) loads.

    The folder is loaded again and compared with the checkpoint, bit by bit, before it appears.

    Args:
        checkpoint: Its folder, RUN/CHECKPOINT, or its name.
        folder: A folder that does not exist yet.
    """
    from nightschool.training.checkpoint_export import export_checkpoint

    home = Home.find()
    run, point = find_checkpoint(home, checkpoint)
    target = folder.absolute()
    try:
        root = Path(CycleFacts.read(run).root)
    except NotFound:  # begun without a cycle: its paths begin here
        root = Path.cwd()
    difference = export_checkpoint(home, run, point, target, root=root)
    size = folder_bytes(target)
    answer(
        {
            "run_id": run.id,
            "name": point.name,
            "path": str(target),
            "size_bytes": size,
            "logits_difference": difference,
        },
        f"Exported {point.name} of {run.id} to {folder} ({format_bytes(size)}); loaded again, it is the same model.",
        quiet=str(folder),
    )


def _curves_of_run(run: Run) -> dict[str, list[tuple[float, float]]]:
    rows = list(read_events(run.metrics_path))
    keys = {"loss": "loss", "held-out loss": "heldout_loss", "learning rate": "learning_rate"}
    return {name: [(row["step"], row[key]) for row in rows if row.get(key) is not None] for name, key in keys.items()}


def _curves_of_checkpoint(point: Checkpoint) -> dict[str, list[tuple[float, float]]]:
    kept = read_json(point.path / "training_metrics.json")

    def curve(steps: str, values: str) -> list[tuple[float, float]]:
        pairs = zip(kept.get(steps, []), kept.get(values, []), strict=False)
        return [(step, value) for step, value in pairs if value is not None]

    return {
        "loss": curve("loss_steps", "loss_history"),
        "held-out loss": curve("heldout_steps", "heldout_history"),
        "learning rate": curve("loss_steps", "learning_rates"),
    }


def _save_picture(title: str, curves: dict[str, list[tuple[float, float]]], path: Path) -> None:
    """Write the curves below each other.

    Raises:
        UsageError: If matplotlib is missing, or knows no such kind of picture.
    """
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError:
        raise UsageError(
            f"--save {path} needs matplotlib, which is not installed. Install it with pip install 'nightschool[plot]', "
            "or leave --save out."
        ) from None
    figure_ = Figure(figsize=(8, 9), layout="constrained")
    figure_.suptitle(title)
    for axes, (name, points) in zip(figure_.subplots(len(curves), sharex=True), curves.items(), strict=True):
        axes.plot([step for step, _ in points], [value for _, value in points], marker="." if len(points) < 50 else "")
        axes.set_ylabel(name)
    axes.set_xlabel("step")
    try:
        figure_.savefig(path)
    except ValueError as error:
        raise UsageError(f"--save {path}: {error}. Write for example curves.png.") from None


def _facts(run: Run, point: Checkpoint) -> dict[str, Any]:
    manifest = read_manifest(point.path)
    return {
        "run_id": run.id,
        "name": point.name,
        "epoch": point.epoch,
        "step": point.step,
        "num_files": point.num_files,
        "heldout_loss": point.heldout_loss(),
        "size_bytes": manifest.size_bytes,
        "created_at": manifest.created_at.isoformat(),
    }
