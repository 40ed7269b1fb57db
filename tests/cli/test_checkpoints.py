"""checkpoints: listed, shown, compared, drawn, verified and pruned."""

import json
import math
import statistics
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.colors import to_rgb
from matplotlib.image import imread
from sqlalchemy import update

from nightschool.cli.chart import chart
from nightschool.cli.checkpoints.plot import smoothed
from nightschool.cli.main import main
from nightschool.config.checkpoints import Upload
from nightschool.store import tables
from nightschool.store.database import Database
from nightschool.store.home import Home
from nightschool.uploads.journal import Journal
from nightschool.views.checkpoints import trend
from tests.support.cli_home import add_checkpoint, make_run, training_metrics

FALLING = [4.0, 3.5, 3.0, 2.5, 2.25, 2.0, 1.75, 1.5]


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("NIGHTSCHOOL_HOME", str(tmp_path / "home"))
    return Home(tmp_path / "home").ensure()


def _json(capsys, *words, code=0):
    assert main([*words, "--json"]) == code
    return json.loads(capsys.readouterr().out)


def test_checkpoints_are_listed_by_step(home, capsys):
    run = make_run(home)
    for step in (12, 4, 8):
        add_checkpoint(run, step, heldout_loss=1.0 / step)
    rows = _json(capsys, "checkpoints", "ls")
    assert [row["step"] for row in rows] == [4, 8, 12]
    assert rows[0]["heldout_loss"] == 0.25
    assert main(["checkpoints", "ls", run.id]) == 0
    assert "checkpoint-epoch3-step12-files1" in capsys.readouterr().out


@pytest.mark.parametrize("spelling", ["{name}", "{run}/{name}", "{path}"])
def test_a_checkpoint_is_found_by_name_by_run_and_by_folder(spelling, home, capsys):
    run = make_run(home)
    path = add_checkpoint(run, 4, heldout_loss=0.5)
    wanted = spelling.format(name=path.name, run=run.id, path=path)
    data = _json(capsys, "checkpoints", "show", wanted)
    assert (data["step"], data["facts"], data["files"]) == (4, {"heldout_loss": 0.5}, {"model.safetensors": 1000})


def test_a_name_that_two_runs_have_must_be_written_in_full(home, capsys):
    for minutes in (0, 1):
        add_checkpoint(make_run(home, minutes=minutes), 4)
    assert main(["checkpoints", "show", "checkpoint-epoch1-step4-files1"]) == 2
    assert "2 runs have a checkpoint" in capsys.readouterr().err
    assert main(["checkpoints", "show", "checkpoint-epoch1-step5-files1"]) == 4


def test_verify_names_what_is_damaged_and_exits_1(home, capsys):
    run = make_run(home)
    add_checkpoint(run, 4)
    assert main(["checkpoints", "verify"]) == 0
    damaged = add_checkpoint(run, 8)
    (damaged / "model.safetensors").write_bytes(b"w" * 999 + b"x")
    capsys.readouterr()
    assert main(["checkpoints", "verify", run.id, "-q"]) == 1
    assert capsys.readouterr().out.strip() == damaged.name
    data = _json(capsys, "checkpoints", "verify", str(damaged), code=1)
    assert "SHA-256" in data["checkpoints"][0]["detail"]


def test_prune_keeps_the_newest_and_the_best(home, capsys):
    run = make_run(home)
    for step, loss in ((4, 0.1), (8, 0.5), (12, 0.7)):
        add_checkpoint(run, step, heldout_loss=loss)
    assert main(["checkpoints", "prune"]) == 2
    assert _json(capsys, "checkpoints", "prune", "--yes", code=0)["removed"] == ["checkpoint-epoch2-step8-files1"]


def test_prune_never_removes_the_only_whole_one(home, capsys):
    run = make_run(home)
    add_checkpoint(run, 4)
    damaged = add_checkpoint(run, 8)
    (damaged / "model.safetensors").write_bytes(b"")
    assert main(["checkpoints", "prune", "--yes", "--keep-last", "0", "--keep-best", "0"]) == 0
    capsys.readouterr()
    assert "checkpoint-epoch1-step4-files1" in [row["name"] for row in _json(capsys, "checkpoints", "ls")]


def test_the_curves_of_a_run_and_of_a_checkpoint_are_drawn(home, capsys, monkeypatch):
    run = make_run(home)
    monkeypatch.setenv("COLUMNS", "60")
    assert main(["checkpoints", "plot"]) == 0
    drawn = capsys.readouterr().out
    assert all(len(line) <= 60 for line in drawn.splitlines())
    for name in ("loss", "held-out loss", "learning rate"):
        assert f"\n{name}\n" in drawn
    top = next(line for line in drawn.splitlines() if line.strip().startswith("3 ┤"))
    assert chr(0x2800) < top.partition("┤")[2] < chr(0x2900)  # the curve begins at the top left
    data = _json(capsys, "checkpoints", "plot", run.id)
    assert data["curves"]["held-out loss"] == [{"step": s, "value": pytest.approx(3.2 - 0.1 * s)} for s in (4, 8, 12)]
    path = add_checkpoint(run, 8)
    kept = {"loss_steps": [4, 8], "loss_history": [2.0, 1.0], "learning_rates": [1e-3, 5e-4]}
    (path / "training_metrics.json").write_text(json.dumps(kept))
    data = _json(capsys, "checkpoints", "plot", path.name)
    assert data["curves"]["loss"] == [{"step": 4, "value": 2.0}, {"step": 8, "value": 1.0}]


def test_a_run_without_figures_cannot_be_drawn(home, capsys):
    run = make_run(home)
    run.metrics_path.unlink()
    assert main(["checkpoints", "plot", run.id]) == 4
    assert "has no figures yet" in capsys.readouterr().err


def test_a_picture_needs_the_extra_and_says_so(home, capsys, monkeypatch):
    make_run(home)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert main(["checkpoints", "plot", "--save", "x.png"]) == 2
    assert "pip install 'nightschool[plot]'" in capsys.readouterr().err


def test_a_picture_is_written_where_matplotlib_is(home, capsys, tmp_path):
    make_run(home)
    assert main(["checkpoints", "plot", "--save", str(tmp_path / "x.png")]) == 0
    assert (tmp_path / "x.png").read_bytes().startswith(b"\x89PNG")
    pixels = imread(tmp_path / "x.png")[:, :, :3]
    # The curves are there: loss in blue, held-out loss in orange, its best in red, the learning rate in green.
    for name in ("tab:blue", "tab:orange", "tab:red", "tab:green"):
        assert (abs(pixels - to_rgb(name)).max(axis=2) < 0.02).sum() > 50, name
    assert (pixels.min(axis=2) > 0.99).mean() > 0.5
    assert main(["checkpoints", "plot", "--save", str(tmp_path / "x.xyz")]) == 2
    assert "Write for example curves.png" in capsys.readouterr().err


def test_a_long_curve_keeps_its_extremes_and_is_quick():
    points = [(float(step), 1.0 + (step % 7)) for step in range(200_000)]
    points[123_457] = (123_457.0, 99.0)
    lines = chart("loss", points, width=80, height=8).splitlines()
    assert lines[1].strip().startswith("99 ┤")
    assert lines[8].strip().startswith("1 ┤")


@given(
    st.lists(st.tuples(st.integers(0, 10**6), st.floats()), max_size=50),
    st.integers(1, 200),
    st.integers(1, 20),
)
def test_a_chart_has_its_size_whatever_the_values(points, width, height):
    lines = chart("loss", points, width=width, height=height).splitlines()
    if len(lines) > 1:
        assert len(lines) == height + 2
        assert all(len(line) <= max(width, 14) for line in lines[1:-1])


def test_the_list_has_the_documented_columns_in_the_order_of_steps(home, capsys):
    run = make_run(home)
    for step in (100, 8, 20):
        add_checkpoint(run, step, heldout_loss=abs(step - 20) / 100, files=training_metrics(FALLING))
    assert main(["checkpoints", "list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"Found 3 checkpoints of {run.id}:"
    assert [line.split()[:5] for line in lines[2:]] == [
        ["1", "checkpoint-epoch2-step8-files1", "2", "8", "1.500000"],
        ["2", "checkpoint-epoch5-step20-files1", "5", "20", "1.500000"],
        ["3", "checkpoint-epoch25-step100-files1", "25", "100", "1.500000"],
    ]
    assert lines[1].split()[-2:] == ["SAVED", "FOR"]
    assert lines[3].endswith("best")
    assert lines[4].endswith("newest")


def test_a_damaged_checkpoint_is_listed_as_one(home, capsys):
    run = make_run(home)
    add_checkpoint(run, 4)
    (add_checkpoint(run, 8) / "manifest.json").write_text("{")
    rows = _json(capsys, "checkpoints", "ls")
    assert [(row["step"], row["newest"], row["damaged"] is None) for row in rows] == [
        (4, True, True),
        (8, False, False),
    ]
    assert main(["checkpoints", "ls"]) == 0
    assert "DAMAGED" in capsys.readouterr().out


def test_show_has_the_documented_figures(home, capsys):
    run = make_run(home)
    path = add_checkpoint(run, 8, files=training_metrics(FALLING, heldout=[(0, 1.0), (4, 2.5), (8, 2.75)]))
    assert main(["checkpoints", "view", path.name]) == 0
    lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    for line in (
        "timestamp 2026-11-21 06:00:30",
        "step 8",
        "CUDA no",
        "GPUs 0",
        "precision fp32",
        "current loss 1.500000",
        "best loss 1.500000",
        "loss history 8 values",
        f"mean loss {statistics.fmean(FALLING):.6f}",
        f"deviation {statistics.pstdev(FALLING):.6f}",
        "trend ↓ falling",
        "learning rate 1.90e-04",
        "rate history 8 values",
        "best held-out 2.500000 at step 4",
        "steps_since_best 0",
        "completed_steps 8",
    ):
        assert line in lines, (line, lines)
    data = _json(capsys, "checkpoints", "show", path.name)["figures"]
    assert data["loss_trend"] == "falling"
    assert data["best_heldout_step"] == 4


@pytest.mark.parametrize(
    "content",
    [
        {},
        {"loss_history": None, "learning_rates": "x"},
        {"loss_history": [1.0, None, True, "2"], "heldout_steps": [1], "system_info": []},
        {"loss_steps": [1, 2], "loss_history": [1.0, float("nan")], "current_loss": "low", "best_loss": float("nan")},
    ],
)
def test_figures_that_are_missing_or_odd_do_not_hide_a_checkpoint(content, home, capsys):
    path = add_checkpoint(make_run(home), 4, files={"training_metrics.json": content, "metadata.json": content})
    assert main(["checkpoints", "show", path.name]) == 0
    assert main(["checkpoints", "ls"]) == 0
    assert main(["checkpoints", "compare", path.name, path.name]) == 0


def test_checkpoints_side_by_side_are_ordered_by_their_steps(home, capsys):
    run = make_run(home)
    for step, losses in ((4, FALLING[:4]), (20, FALLING), (8, FALLING[:6])):
        add_checkpoint(run, step, files=training_metrics(losses))
    names = [f"checkpoint-epoch{step // 4}-step{step}-files1" for step in (4, 8, 20)]
    data = _json(capsys, "checkpoints", "compare", names[2], names[0], names[1])
    assert data["checkpoints"] == names
    assert data["figures"]["current_loss"] == [2.5, 2.0, 1.5]
    assert data["settings"] == {}
    assert main(["checkpoints", "compare", *names]) == 0
    out = capsys.readouterr().out
    assert "2.000000 (-0.500000)" in out
    assert "1.90e-04" in out
    assert main(["checkpoints", "compare", names[0]]) == 2


def test_checkpoints_of_two_runs_show_the_settings_that_differ(home, capsys):
    first, second = make_run(home), make_run(home, minutes=1, epochs=7)
    paths = [add_checkpoint(run, 4) for run in (first, second)]
    data = _json(capsys, "checkpoints", "compare", *map(str, paths))
    assert data["settings"] == {"train.epochs": [3, 7]}
    assert data["checkpoints"] == [f"{run.id}/{path.name}" for run, path in zip((first, second), paths, strict=True)]


def test_milestones_stay_when_pruned(home, capsys):
    run = make_run(home)
    for step in (4, 8, 12, 16, 20):
        add_checkpoint(run, step)
    removed = _json(capsys, "checkpoints", "prune", "--yes", "--keep-every", "8 steps")["removed"]
    assert removed == ["checkpoint-epoch1-step4-files1", "checkpoint-epoch3-step12-files1"]
    assert main(["checkpoints", "prune", "--yes", "--keep-every", "2h"]) == 2
    assert main(["checkpoints", "prune", "--yes", "--keep-every", "often"]) == 2


def test_the_list_says_what_was_uploaded_and_prune_leaves_what_was_not(home, capsys):
    run = make_run(home)
    paths = [add_checkpoint(run, step) for step in (4, 8, 12, 16)]
    for path in paths[:3]:
        Journal(home).enqueue(path, Upload(url=f"memory://bucket/{path.name}"))
    with Database(home).connect() as db, db.write() as connection:
        for path, state in ((paths[0], "done"), (paths[2], "failed")):
            connection.execute(update(tables.uploads).where(tables.uploads.c.path == str(path)).values(state=state))
    assert [row["upload"] for row in _json(capsys, "checkpoints", "ls")] == ["uploaded", "waiting", "failed", None]
    assert main(["checkpoints", "ls"]) == 0
    assert capsys.readouterr().out.splitlines()[3].endswith("waiting")
    assert main(["top", "--once"]) == 0
    assert "uploads   1 done, 1 waiting" in capsys.readouterr().out
    removed = _json(capsys, "checkpoints", "prune", "--yes")["removed"]
    assert removed == [paths[0].name]


@pytest.mark.parametrize(
    ("values", "found"),
    [
        ([3, 2, 1], None),
        ([4, 3, 2, 1], "falling"),
        ([1, 2, 3, 4], "rising"),
        ([2.0] * 30, "level"),
        ([1, 2, 1, 2, 1, 2, 1, 2], "level"),
        ([9, 8, 7, *[1.0] * 20], "level"),
        ([float("nan"), 4, 3, 2, 1], "falling"),
    ],
)
def test_the_trend_is_that_of_the_last_values_and_beyond_their_noise(values, found):
    assert trend(values) == found


@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=200), st.floats(0.01, 1.0))
def test_smoothing_keeps_the_length_and_stays_between_the_extremes(values, share):
    curve = smoothed(values, share)
    assert len(curve) == len(values)
    room = 1e-6 * max(1.0, max(map(abs, values)))
    assert all(min(values) - room <= value <= max(values) + room for value in curve)
    assert all(map(math.isfinite, curve))
