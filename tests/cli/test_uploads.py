"""nightschool uploads: status, ls, push, retry, pull."""

import json

import pytest

from nightschool import uploads
from nightschool.cli.main import main
from nightschool.config.checkpoints import Upload
from nightschool.remotes import open_remote
from nightschool.store.home import Home
from nightschool.store.manifest import write_manifest
from tests.support.object_stores import add_checkpoint, make_run, moto, s3  # noqa: F401


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("NIGHTSCHOOL_HOME", str(tmp_path / "home"))
    return Home(tmp_path / "home").ensure()


@pytest.fixture
def url(tmp_path):
    return f"file://{tmp_path}/bucket"


def _json(capsys, *words, code=0):
    assert main([*words, "--json"]) == code
    return json.loads(capsys.readouterr().out)


@pytest.mark.parametrize("verb", ["push", "upload"])
def test_a_checkpoint_is_pushed_and_shown(home, url, capsys, verb):
    run = make_run(home, upload=url)
    path = add_checkpoint(run, 10, num_bytes=1_000_000)
    (row,) = _json(capsys, "uploads", verb, path.name)
    assert (row["state"], row["run_id"], row["url"]) == ("done", run.id, url)
    assert open_remote(url).exists(f"{run.id}/{path.name}/manifest.json")
    data = _json(capsys, "uploads", "status")
    assert data["counts"]["done"] == 1
    assert data["buckets"][0]["checkpoints"][0]["key"] == f"{run.id}/{path.name}"
    assert main(["uploads", "status"]) == 0
    out = capsys.readouterr().out
    assert "1 uploaded, 0 uploading, 0 waiting, 0 failed" in out
    assert "1 checkpoint folders" in out
    assert "2.0 MB" in out
    assert main(["uploads", "list"]) == 0
    assert "uploaded" in capsys.readouterr().out


def test_an_archive_is_pushed_as_documented(home, url, capsys):
    path = add_checkpoint(make_run(home), 10)
    assert main(["uploads", "push", path.name, "--to", url, "--archive"]) == 0
    err = capsys.readouterr().err
    for line in ("Creating archive", "Uploading to", "Successfully uploaded", "Cleaned up"):
        assert line in err
    bucket = _json(capsys, "uploads", "status")["buckets"][0]
    assert [one["key"] for one in bucket["archives"]] == [f"{path.name}.tar.gz"]
    rows = _json(capsys, "uploads", "ls", "--at", url)
    assert rows[0]["size_bytes"] > 0


@pytest.mark.parametrize("words", [["push", "--all"], ["upload-all"]])
def test_everything_that_is_not_there_yet_is_pushed(home, url, capsys, words):
    run = make_run(home, upload=url)
    for step in (10, 20):
        add_checkpoint(run, step)
    add_checkpoint(make_run(home, minutes=1), 5)  # its recipe names no bucket
    assert len(_json(capsys, "uploads", *words)) == 2
    assert _json(capsys, "uploads", *words) == []


def test_a_push_that_fails_exits_1_and_can_be_retried(home, url, capsys):
    run = make_run(home, upload=url)
    path = add_checkpoint(run, 10)
    remote = open_remote(url)
    write_manifest(home.locks, step=10)
    remote.put_if_absent(f"{run.id}/{path.name}/manifest.json", (home.locks / "manifest.json").read_bytes())
    (row,) = _json(capsys, "uploads", "push", path.name, code=1)
    assert (row["state"], row["error_code"]) == ("failed", "conflict")
    assert main(["uploads", "status"]) == 0
    assert "nightschool uploads retry" in capsys.readouterr().out
    remote.delete(f"{run.id}/{path.name}/manifest.json")
    (row,) = _json(capsys, "uploads", "retry", path.name, "--wait")
    assert row["state"] == "done"
    assert _json(capsys, "uploads", "retry") == []
    assert main(["uploads", "retry", "no-such"]) == 4


def test_a_push_may_be_left_to_the_uploader(home, url, capsys, monkeypatch):
    started = []
    monkeypatch.setattr(uploads, "ensure_uploader", lambda home: started.append(home))
    path = add_checkpoint(make_run(home, upload=url), 10)
    (row,) = _json(capsys, "uploads", "push", path.name, "--detach")
    assert row["state"] == "queued"
    assert started == [home]


def test_pull_brings_it_to_another_home(home, url, capsys, monkeypatch, tmp_path):
    run = make_run(home, upload=url)
    path = add_checkpoint(run, 10)
    (path / "recipe.yaml").write_bytes(run.recipe_path.read_bytes())
    write_manifest(path, step=10, attempt=1)
    assert main(["uploads", "push", path.name]) == 0
    monkeypatch.setenv("NIGHTSCHOOL_HOME", str(tmp_path / "elsewhere"))
    capsys.readouterr()
    data = _json(capsys, "uploads", "pull", url)
    assert data["run_id"] == run.id
    assert data["size_bytes"] > 40_000
    assert main(["uploads", "pull", url, path.name]) == 0
    assert f"train --resume {run.id}/{path.name}" in capsys.readouterr().out
    assert main(["checkpoints", "verify", path.name]) == 0


def test_what_makes_no_sense_is_refused(home, url, capsys):
    add_checkpoint(make_run(home), 10)
    assert main(["uploads", "push"]) == 2
    assert main(["uploads", "push", "checkpoint-epoch0-step10-files1"]) == 2
    assert "checkpoints.upload" in capsys.readouterr().err
    assert main(["uploads", "push", "--all", "--to", "nowhere"]) == 2
    assert main(["uploads", "push", "--all", "--to", url, "--bandwidth", "fast"]) == 2
    assert main(["uploads", "ls", "--at", "file:///no/such/folder"]) == 4
    assert main(["uploads", "pull", "file:///no/such/folder"]) == 4
    assert main(["uploads", "status", "--at", "s3://"]) == 2


def test_status_tells_of_a_bucket_that_cannot_be_asked(home, capsys):
    data = _json(capsys, "uploads", "status", "--at", "file:///no/such/folder")
    assert "no folder" in data["buckets"][0]["error"]


def test_the_bucket_of_a_recipe_is_asked(home, url, capsys, tmp_path):
    (tmp_path / "recipe.yaml").write_text(f"base: new:tiny\ndata: [{{path: a}}]\ncheckpoints: {{upload: '{url}'}}\n")
    assert _json(capsys, "uploads", "status", "--config", "recipe.yaml")["buckets"][0]["url"] == url


def test_s3_is_pushed_and_pulled(home, s3, capsys, tmp_path):  # noqa: F811
    url = f"s3://bucket/{tmp_path.name}"
    path = add_checkpoint(make_run(home, upload=url), 10)
    assert _json(capsys, "uploads", "push", path.name)[0]["state"] == "done"
    assert len(_json(capsys, "uploads", "ls", "--at", url)) == 1


@pytest.fixture
def in_bucket(home, url, monkeypatch, tmp_path):
    """A run whose checkpoint is in the bucket only: the home is another one now. Gives the run and its name there."""
    run = make_run(home, upload=url)
    path = add_checkpoint(run, 10)
    (path / "recipe.yaml").write_bytes(run.recipe_path.read_bytes())
    write_manifest(path, step=10, attempt=1, data_fingerprint="data")
    uploads.push_now(home, path, Upload(url=url), say=print)
    monkeypatch.setenv("NIGHTSCHOOL_HOME", str(tmp_path / "elsewhere"))
    return run, path.name


@pytest.fixture
def continued(monkeypatch):
    """What `train --resume` would go on with."""
    from nightschool.cli import train
    from nightschool.jobs.outcome import CycleResult

    calls = []

    def continue_cycle(home, run_id, *, resume, around):
        calls.append((run_id, resume))
        return CycleResult("promoted", "passed", run_id=run_id)

    monkeypatch.setattr(train, "continue_cycle", continue_cycle)
    return calls


@pytest.mark.parametrize("how", ["bucket", "address", "name with the recipe"])
def test_a_run_is_resumed_from_the_bucket(in_bucket, continued, url, capsys, tmp_path, how):
    run, name = in_bucket
    (tmp_path / "r.yaml").write_bytes(run.recipe_path.read_bytes())
    words = {
        "bucket": ["--resume", url],
        "address": ["--resume", f"{url}/{run.id}/{name}"],
        "name with the recipe": ["r.yaml", "--resume", name],
    }[how]
    assert main(["train", *words]) == 0
    assert continued == [(run.id, name)]
    assert main(["train", "--resume", name]) == 0  # it is here now, and the same


def test_another_checkpoint_in_the_bucket_stops_a_resume(in_bucket, continued, url, capsys, tmp_path):
    run, name = in_bucket
    assert main(["uploads", "pull", url]) == 0
    mine = tmp_path / "elsewhere" / "runs" / run.id / "checkpoints" / name
    write_manifest(mine, step=10, attempt=1, changed=True)
    assert main(["train", "--resume", name]) == 1
    err = capsys.readouterr().err
    assert str(mine) in err
    assert f"{url}/{run.id}/{name}" in err
    assert continued == []


def test_uploads_may_be_made_before_training_goes_on(home, url, capsys, monkeypatch, tmp_path):
    from nightschool.cli import train
    from nightschool.jobs.outcome import CycleResult

    seen = []

    def run_cycle(home, recipe, **_):
        seen.append(recipe.checkpoints.upload.background)
        return CycleResult("promoted", "passed", run_id="r")

    monkeypatch.setattr(train, "run_cycle", run_cycle)
    (tmp_path / "r.yaml").write_text(f"base: new:tiny\ndata: [{{path: a}}]\ncheckpoints: {{upload: '{url}'}}\n")
    assert main(["train", "r.yaml"]) == 0
    assert main(["train", "r.yaml", "--no-background-upload"]) == 0
    assert seen == [True, False]
    assert main(["train", "--resume", "x", "--no-background-upload"]) == 2
