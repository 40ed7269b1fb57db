"""`nightschool checkpoints plot`: loss, held-out loss and learning rate, in the terminal and as a picture."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from nightschool.cli.chart import chart
from nightschool.cli.lookup import find_run_or_checkpoint
from nightschool.cli.output import answer, bold, note
from nightschool.errors import NotFound, UsageError
from nightschool.evaluation.scores import figure_to_json
from nightschool.store.home import Home
from nightschool.views.checkpoints import checkpoint_curves
from nightschool.views.runs import Points, run_curves

Curves = dict[str, Points]
# In a picture, the losses of noisy steps are smoothed over this share of them.
_SMOOTHED_SHARE = 0.05
_FEW_POINTS = 50


def plot(target: str | None = None, /, *, save: Path | None = None) -> None:
    """Draw the curves of a run, or those up to a checkpoint: loss, held-out loss, learning rate.

    Args:
        target: A run, or one checkpoint; the newest run without it.
        save: Also write them as a picture, such as curves.png. Needs the extra `plot`.
    """
    home = Home.find()
    run, point = find_run_or_checkpoint(home, target)
    title = run.id if point is None else f"{run.id} {point.name}"
    curves = run_curves(run) if point is None else checkpoint_curves(point)
    if not any(curves.values()):
        raise NotFound(f"{title} has no figures yet. See nightschool runs watch {run.id}.")
    if save is not None:
        save_picture(title, curves, save)
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


def save_picture(title: str, curves: Curves, path: Path) -> None:
    """Write the losses together, with the best held-out one marked, and the learning rate below them.

    Raises:
        UsageError: If matplotlib is missing, or knows no such kind of picture.
    """
    try:
        from matplotlib.figure import Figure
        from matplotlib.ticker import MaxNLocator
    except ModuleNotFoundError:
        raise UsageError(
            f"--save {path} needs matplotlib, which is not installed. Install it with pip install 'nightschool[plot]', "
            "or leave --save out."
        ) from None
    picture = Figure(figsize=(9, 6.5), dpi=120, layout="constrained")
    picture.suptitle(title, fontsize=11)
    upper, lower = picture.subplots(2, sharex=True, height_ratios=[2.2, 1])
    _draw_losses(upper, curves["loss"], curves["held-out loss"])
    steps, rates = _unzipped(curves["learning rate"])
    lower.plot(steps, rates, color="tab:green", marker=_marker(rates))
    lower.set_ylim(bottom=0)
    lower.set_ylabel("learning rate")
    lower.ticklabel_format(axis="y", style="sci", scilimits=(-2, 3))
    lower.set_xlabel("step")
    lower.xaxis.set_major_locator(MaxNLocator(integer=True))
    for axes in (upper, lower):
        axes.grid(visible=True, alpha=0.3)
    try:
        picture.savefig(path)
    except ValueError as error:
        raise UsageError(f"--save {path}: {error}. Write for example curves.png.") from None


def _draw_losses(axes: Any, losses: Points, heldout: Points) -> None:
    steps, values = _unzipped(losses)
    if len(values) > _FEW_POINTS:
        axes.plot(steps, values, color="tab:blue", alpha=0.25, linewidth=0.8)
        axes.plot(steps, smoothed(values, _SMOOTHED_SHARE), color="tab:blue", label="loss, smoothed")
    elif values:
        axes.plot(steps, values, color="tab:blue", marker=".", label="loss")
    steps, values = _unzipped(heldout)
    if values:
        axes.plot(steps, values, color="tab:orange", marker=_marker(values), label="held-out loss")
        best = min(range(len(values)), key=values.__getitem__)
        axes.plot(
            [steps[best]],
            [values[best]],
            color="tab:red",
            marker="*",
            markersize=12,
            linestyle="",
            label=f"best {values[best]:.4f} at step {steps[best]:g}",
        )
    axes.set_ylabel("nats per token")
    axes.legend(loc="upper right", fontsize=9)


def smoothed(values: Sequence[float], share: float) -> list[float]:
    """The running mean over a window of this share of the values, centred, so shorter at both ends."""
    half = max(1, round(len(values) * share / 2))
    totals = [0.0]
    for value in values:
        totals.append(totals[-1] + value)
    result = []
    for index in range(len(values)):
        reach = min(half, index, len(values) - 1 - index)
        first, last = index - reach, index + reach + 1
        result.append((totals[last] - totals[first]) / (last - first))
    return result


def _unzipped(points: Points) -> tuple[list[float], list[float]]:
    return [step for step, _ in points], [value for _, value in points]


def _marker(values: Sequence[float]) -> str:
    return "." if len(values) < _FEW_POINTS else ""
