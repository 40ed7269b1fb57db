"""Checkpoints back from a bucket: on another machine, verified, and never in place of another."""

import gzip
import io
import tarfile

import pytest

from nightschool import uploads
from nightschool.config.checkpoints import Upload
from nightschool.errors import Conflict, Damaged, NotFound, Unreachable, UsageError
from nightschool.jobs.uploader import main as uploader
from nightschool.remotes import open_remote
from nightschool.store.atomic import publish_directory
from nightschool.store.home import Home
from nightschool.store.manifest import write_manifest
from nightschool.store.runs import RunStore
from nightschool.uploads.archive import make_archive, unpack_archive
from nightschool.uploads.fetch import fetch_checkpoint, locate, ls_remote, refuse_another_in_bucket
from nightschool.uploads.journal import Journal
from tests.support.object_stores import add_checkpoint, make_run, moto, s3  # noqa: F401


@pytest.fixture
def home(tmp_path):
    return Home(tmp_path / "home").ensure()


@pytest.fixture
def elsewhere(tmp_path):
    """The home of another machine."""
    return Home(tmp_path / "elsewhere").ensure()


@pytest.fixture(params=["file", "s3"])
def url(request, tmp_path):
    if request.param == "file":
        return f"file://{tmp_path}/bucket"
    request.getfixturevalue("s3")
    return f"s3://bucket/{tmp_path.name}"


def with_recipe(run, step, **facts):
    """A checkpoint that carries its recipe, as real ones do."""
    path = add_checkpoint(run, step, **facts)
    (path / "recipe.yaml").write_bytes(run.recipe_path.read_bytes())
    write_manifest(path, step=step, attempt=facts.get("attempt", 1))
    return path


@pytest.fixture
def uploaded(home, url):
    """A run with two checkpoints in the bucket; gives the run and their folders."""
    run = make_run(home, upload=url)
    paths = [with_recipe(run, step) for step in (10, 20)]
    drain(home)
    return run, paths


def drain(home, code=0):
    assert uploader(["--home", str(home.path), "--drain", "--timeout-seconds", "5"]) == code


def content(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("how", ["latest", "latest of the run", "name", "run/name", "address", "address of the file"])
def test_another_machine_gets_the_checkpoint_in_its_run(uploaded, url, elsewhere, how):
    run, (old, new) = uploaded
    address, name, wanted = {
        "latest": (url, "latest", new),
        "latest of the run": (f"{url}/{run.id}", "latest", new),
        "name": (url, old.name, old),
        "run/name": (url, f"{run.id}/{old.name}", old),
        "address": (f"{url}/{run.id}/{old.name}", "latest", old),
        "address of the file": (f"{url}/{run.id}/{new.name}/", new.name, new),
    }[how]
    got_run, point = fetch_checkpoint(elsewhere, address, name, say=print)
    assert got_run.id == run.id
    assert content(point.path) == content(wanted)
    point.verify()
    assert RunStore(elsewhere).get(run.id).recipe() == run.recipe()
    assert got_run.status.state == "interrupted"
    assert list((elsewhere.cache / "downloads").iterdir()) == [
        path for path in (elsewhere.cache / "downloads").iterdir() if path.name.endswith(".lock")
    ]
    again_run, again = fetch_checkpoint(elsewhere, address, name, say=print)
    assert (again_run, again) == (got_run, point)


def test_what_is_listed(uploaded, url):
    run, paths = uploaded
    assert [(one.name, one.run_id, one.is_archive) for one in ls_remote(open_remote(url))] == [
        (path.name, run.id, False) for path in paths
    ]


def test_what_was_altered_in_the_bucket_is_refused_and_nothing_appears(uploaded, url, elsewhere, tmp_path):
    run, (_, new) = uploaded
    remote = open_remote(url)
    key = f"{run.id}/{new.name}/model.safetensors"
    altered = bytearray(remote.read(key).data)
    altered[7] ^= 1
    (tmp_path / "altered").write_bytes(altered)
    remote.put_file(key, tmp_path / "altered")
    with pytest.raises(Damaged, match=r"model\.safetensors has the SHA-256"):
        fetch_checkpoint(elsewhere, url, say=print)
    assert RunStore(elsewhere).ls() == []
    remote.put_file(key, new / "model.safetensors")
    _, point = fetch_checkpoint(elsewhere, url, say=print)
    assert content(point.path) == content(new)


def test_a_manifest_that_was_altered_is_refused(uploaded, url, elsewhere):
    run, (_, new) = uploaded
    remote = open_remote(url)
    key = f"{run.id}/{new.name}/manifest.json"
    text = remote.read(key).data
    remote.delete(key)
    with pytest.raises(NotFound, match="no manifest"):
        fetch_checkpoint(elsewhere, f"{url}/{run.id}/{new.name}", say=print)
    remote.put_if_absent(key, text.replace(b"state.json", b"../../state"))
    with pytest.raises(Damaged):
        fetch_checkpoint(elsewhere, url, say=print)


def test_a_name_that_is_here_and_there_with_different_content_is_refused_with_both_shown(uploaded, url, elsewhere):
    run, (_, new) = uploaded
    fetch_checkpoint(elsewhere, url, say=print)
    mine = elsewhere.runs / run.id / "checkpoints" / new.name
    write_manifest(mine, step=20, attempt=1, other=True)
    with pytest.raises(Conflict) as caught:
        fetch_checkpoint(elsewhere, url, say=print)
    assert str(mine) in str(caught.value)
    assert f"{url}/{run.id}/{new.name}" in str(caught.value)
    here = RunStore(elsewhere).get(run.id)
    from nightschool.store import checkpoints

    with pytest.raises(Conflict):
        refuse_another_in_bucket(here, checkpoints.get(here, new.name), url, say=print)


def test_what_cannot_be_asked_keeps_nobody_from_going_on(uploaded):
    from nightschool.store import checkpoints

    run, (_, new) = uploaded
    point = checkpoints.get(run, new.name)
    refuse_another_in_bucket(run, point, run.recipe()["checkpoints"]["upload"]["url"], say=print)


def test_a_name_that_several_runs_have_needs_the_run(home, url, elsewhere):
    runs = [make_run(home, minutes=minutes, upload=url) for minutes in (0, 1)]
    paths = [with_recipe(run, 10) for run in runs]
    drain(home)
    with pytest.raises(UsageError, match="2 checkpoints"):
        locate(url, paths[0].name)
    assert locate(url, f"{runs[0].id}/{paths[0].name}").run_id == runs[0].id
    with pytest.raises(NotFound, match="not a name of a checkpoint"):
        locate(url, "best")
    with pytest.raises(NotFound):
        locate(url, "checkpoint-epoch9-step9-files9")


def test_an_empty_bucket_has_no_latest(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(NotFound, match="no checkpoint in"):
        locate(f"file://{tmp_path}/empty")


def test_archives_go_and_come_back(home, url, elsewhere):
    run = make_run(home, upload={"url": url, "archive": "tar.gz"})
    path = with_recipe(run, 10)
    drain(home)
    remote = open_remote(url)
    assert {one.key for one in remote.list()} == {f"{path.name}.tar.gz", "LATEST.json"}
    assert not list((home.cache / "uploads").iterdir()), "the archive was removed"
    assert not uploads.is_pending(home, path)
    got, point = fetch_checkpoint(elsewhere, url, say=print)
    assert got.id == run.id
    assert content(point.path) == content(path)
    other, point = fetch_checkpoint(
        Home(elsewhere.path.with_name("third")).ensure(), f"{url}/{path.name}.tar.gz", say=print
    )
    assert content(point.path) == content(path)
    assert other.name == run.name


def test_an_archive_is_made_once_however_often_it_is_sent(home, url, monkeypatch):
    from nightschool.uploads import push

    run = make_run(home, upload={"url": url, "archive": "tar.gz"})
    path = with_recipe(run, 10)
    made = []
    monkeypatch.setattr(push, "make_archive", lambda *given: made.append(given) or make_archive(*given))

    def broken(*_):
        raise Unreachable("no network")

    send = push._send
    monkeypatch.setattr(push, "_send", broken)
    assert uploads.push_now(home, path, Upload(url=url, archive="tar.gz"), say=print, give_up_seconds=0)
    assert [one.name for one in (home.cache / "uploads").rglob("*.gz")] == [f"{path.name}.tar.gz"]
    monkeypatch.setattr(push, "_send", send)
    drain(home)
    assert len(made) == 1
    assert not list((home.cache / "uploads").iterdir())


def test_the_archive_of_another_run_is_not_overwritten(home, url):
    for minutes in (0, 1):
        with_recipe(make_run(home, minutes=minutes, upload={"url": url, "archive": "tar.gz"}), 10)
    drain(home, code=1)
    assert sorted(row.state for row in Journal(home).ls()) == ["done", "failed"]
    Journal(home).retry()
    drain(home, code=1)


def packed(*members):
    """A .tar.gz of members: (name, content) or a TarInfo."""
    raw = io.BytesIO()
    with gzip.GzipFile(fileobj=raw, mode="wb") as zipped, tarfile.open(fileobj=zipped, mode="w") as archive:
        for member in members:
            if isinstance(member, tarfile.TarInfo):
                archive.addfile(member)
                continue
            info = tarfile.TarInfo(member[0])
            info.size = len(member[1])
            archive.addfile(info, io.BytesIO(member[1]))
    return raw.getvalue()


def special(name, kind, target=""):
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return info


@pytest.mark.parametrize(
    "members",
    [
        [("../outside", b"x")],
        [("a/../../outside", b"x")],
        [("/tmp/outside", b"x")],
        [special("a/link", tarfile.SYMTYPE, "/etc"), ("a/link/passwd", b"x")],
        [special("a/hard", tarfile.LNKTYPE, "a/x")],
        [special("a/device", tarfile.CHRTYPE)],
        [special("a/pipe", tarfile.FIFOTYPE)],
        [("a/x", b"x"), ("b/x", b"x")],
        [("x", b"x")],
        [("a/x", b"x"), ("a/x", b"y")],
        [],
    ],
    ids=lambda members: "+".join(getattr(one, "name", None) or one[0] for one in members) or "empty",
)
def test_archives_that_reach_outside_are_refused(tmp_path, members):
    (tmp_path / "bad.tar.gz").write_bytes(packed(*members))
    (tmp_path / "into").mkdir()
    with pytest.raises(Damaged):
        unpack_archive(tmp_path / "bad.tar.gz", tmp_path / "into")
    assert not (tmp_path / "outside").exists()


def test_an_archive_that_was_cut_is_refused(tmp_path):
    whole = packed(("a/x", bytes(range(256)) * 1000))
    (tmp_path / "into").mkdir()
    for content_of_it in (whole[:-200], b"no archive", b""):
        (tmp_path / "cut.tar.gz").write_bytes(content_of_it)
        with pytest.raises(Damaged):
            unpack_archive(tmp_path / "cut.tar.gz", tmp_path / "into")


def test_equal_folders_make_equal_archives(tmp_path):
    made = []
    for where in ("one", "two"):
        folder = tmp_path / where / "checkpoint-epoch0-step1-files1"
        with publish_directory(folder) as partial:
            (partial / "deep").mkdir()
            (partial / "deep" / "x").write_bytes(b"x")
            write_manifest(partial)
            (partial / "manifest.json").write_text("{}")
        make_archive(folder, tmp_path / f"{where}.tar.gz")
        made.append((tmp_path / f"{where}.tar.gz").read_bytes())
        (tmp_path / f"into-{where}").mkdir()
        assert unpack_archive(tmp_path / f"{where}.tar.gz", tmp_path / f"into-{where}") == folder.name
        assert content(tmp_path / f"into-{where}") == content(folder)
    assert made[0] == made[1]
