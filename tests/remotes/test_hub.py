"""hf:// by the real library, against a server of our own: commits, parents, and hashes as git makes them."""

import hashlib

import pytest
from huggingface_hub import HfApi, constants

from nightschool import uploads
from nightschool.config.checkpoints import Upload
from nightschool.errors import BucketMissing, Conflict, CredentialsRefused, Damaged, NotFound, Unreachable
from nightschool.remotes import Transfer, parse_url
from nightschool.remotes import hub as module
from nightschool.remotes.hub import HubStore, open_hub
from nightschool.remotes.remote import Remote
from nightschool.store.home import Home
from tests.support.fake_hub import fake_hub
from tests.support.object_stores import add_checkpoint, free_port, make_run


@pytest.fixture
def hub(monkeypatch):
    """The repository owner/repo on a server of our own; `hf://` leads there."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    with fake_hub() as (repository, url):
        monkeypatch.setattr(module, "HfApi", lambda token: HfApi(endpoint=url, token=token))
        monkeypatch.setenv("HF_TOKEN", repository.token)
        yield repository


@pytest.fixture
def remote(hub):
    return open_at("hf://owner/repo/run")


def open_at(url, **env):
    import os

    address = parse_url(url)
    return Remote(address, open_hub(address, timeout_seconds=5, env=os.environ | env))


@pytest.mark.parametrize("size_bytes", [0, 10, 3_000_000])
def test_files_go_and_come_back(remote, hub, tmp_path, size_bytes):
    source = tmp_path / "f"
    source.write_bytes(b"x" * size_bytes)
    remote.put_file("a/f", source, Transfer(sha256=hashlib.sha256(source.read_bytes()).hexdigest()))
    assert hub.files == {"run/a/f": source.read_bytes()}
    assert remote.get_to_file("a/f", tmp_path / "got").read_bytes() == source.read_bytes()
    assert b"".join(remote.store.stream("run/a/f", size_bytes // 2, remote.head("a/f").etag)) == b"x" * (
        size_bytes - size_bytes // 2
    )
    assert [found.key for found in remote.list()] == ["a/f"]
    assert list(remote.list("other")) == []
    remote.delete("a/f")
    remote.delete("a/f")
    assert remote.head("a/f") is None


def test_what_arrives_altered_is_found(remote, hub, tmp_path):
    (tmp_path / "f").write_bytes(b"x" * 1000)
    hub.corrupt = True
    with pytest.raises(Unreachable, match="arrived altered"):
        remote.put_file("f", tmp_path / "f")
    with pytest.raises(Unreachable):
        remote.put_if_absent("g", b"12345")
    assert not remote.exists("g")
    with pytest.raises(Damaged):
        remote.put_file("f", tmp_path / "f", Transfer(sha256="0" * 64))


def test_a_commit_that_came_in_between_is_a_conflict(remote, hub):
    etag = remote.compare_and_swap("LATEST.json", b"1", None)
    hub.meanwhile = {"run/LATEST.json": b"2"}
    with pytest.raises(Conflict):
        remote.compare_and_swap("LATEST.json", b"3", etag)
    with pytest.raises(Conflict):
        remote.put_if_absent("LATEST.json", b"3")
    assert remote.read("LATEST.json").data == b"2"


def test_errors_are_told_apart(remote):
    with pytest.raises(NotFound):
        remote.read("x")
    with pytest.raises(CredentialsRefused, match="HF_TOKEN"):
        open_at("hf://owner/repo", HF_TOKEN="wrong").head("x")
    with pytest.raises(BucketMissing, match="hf://owner/other"):
        list(open_at("hf://owner/other").list())


def test_nobody_at_the_address_is_worth_another_try(monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    url = f"http://127.0.0.1:{free_port()}"
    monkeypatch.setattr(module, "HfApi", lambda token: HfApi(endpoint=url, token=token))
    with pytest.raises(Unreachable, match="Check the network"):
        open_at("hf://owner/repo").head("x")


def test_offline_is_said(remote, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(Unreachable, match="HF_HUB_OFFLINE"):
        remote.head("x")


def test_a_checkpoint_goes_to_a_repository(hub, tmp_path):
    home = Home(tmp_path / "home").ensure()
    run = make_run(home)
    path = add_checkpoint(run, 10)
    done = uploads.push_now(home, path, Upload(url="hf://owner/repo"), say=print, give_up_seconds=0)
    assert done.state == "done", done.error
    assert {f"{run.id}/{path.name}/{one.name}" for one in path.iterdir()} < set(hub.files)
    assert {"LATEST.json", f"{run.id}/LATEST.json"} < set(hub.files)


@pytest.mark.parametrize(
    ("url", "repo_id", "repo_type"),
    [("hf://o/r/x", "o/r", "model"), ("hf://datasets/o/r", "o/r", "dataset"), ("hf://models/o/r", "o/r", "model")],
)
def test_kinds_of_repositories(url, repo_id, repo_type):
    store = open_hub(parse_url(url), timeout_seconds=5, env={"HF_TOKEN": "t"})
    assert isinstance(store, HubStore)
    assert (store._where["repo_id"], store._where["repo_type"]) == (repo_id, repo_type)
