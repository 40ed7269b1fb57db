"""hf:// against an imitation of the calls of huggingface_hub: commits, parents, and hashes as git and LFS make them."""

import hashlib
from types import SimpleNamespace

import pytest

from nightschool.errors import BucketMissing, Conflict, CredentialsRefused, Damaged, NotFound, Unreachable
from nightschool.store.remotes import Transfer, parse_url
from nightschool.store.remotes import hub as module
from nightschool.store.remotes.hub import HubStore, open_hub
from nightschool.store.remotes.remote import Remote

LARGE = 1000


class Answer(Exception):
    def __init__(self, status):
        self.response = SimpleNamespace(status_code=status)
        super().__init__(f"HTTP {status}")


class Repository:
    """A branch of a repository: each commit follows the one before."""

    token = None
    endpoint = "https://hub.invalid"

    def __init__(self):
        self.files, self.commits, self.corrupt, self.meanwhile = {}, 0, False, None

    def repo_info(self, **_):
        return SimpleNamespace(sha=f"commit{self.commits}")

    def create_commit(self, *, operations, parent_commit=None, **_):
        if self.meanwhile:
            self.meanwhile, wanted = None, self.meanwhile
            self.files |= wanted
            self.commits += 1
        if parent_commit not in (None, f"commit{self.commits}"):
            raise module.HfHubHTTPError("parent", response=_response(412))
        for operation in operations:
            if hasattr(operation, "path_or_fileobj"):
                with operation.as_file() as file:
                    content = file.read()
                self.files[operation.path_in_repo] = content[:-1] + b"X" if self.corrupt else content
            else:
                del self.files[operation.path_in_repo]
        self.commits += 1

    def get_paths_info(self, *, paths, **_):
        return [self._facts(path) for path in paths if path in self.files]

    def list_repo_tree(self, *, path_in_repo=None, **_):
        found = [self._facts(path) for path in self.files if not path_in_repo or path.startswith(path_in_repo + "/")]
        return [SimpleNamespace(path="folder", tree_id="t"), *found]

    def _facts(self, path):
        content = self.files[path]
        blob = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
        lfs = SimpleNamespace(sha256=hashlib.sha256(content).hexdigest()) if len(content) >= LARGE else None
        return SimpleNamespace(path=path, size=len(content), blob_id=blob, lfs=lfs)


def _response(status):
    import httpx2

    return httpx2.Response(status, request=httpx2.Request("POST", "https://hub.invalid"))


@pytest.fixture
def repository(monkeypatch):
    repository = Repository()

    def stream(self, key, start, etag):
        yield repository.files[key][start:]

    monkeypatch.setattr(HubStore, "stream", stream)
    return repository


@pytest.fixture
def remote(repository):
    return Remote(parse_url("hf://owner/repo/run"), HubStore(repository, "owner/repo", "model", timeout_seconds=5))


@pytest.mark.parametrize("size_bytes", [0, 10, LARGE])
def test_files_arrive_and_are_compared_by_the_hash_of_their_kind(remote, repository, tmp_path, size_bytes):
    source = tmp_path / "f"
    source.write_bytes(b"x" * size_bytes)
    remote.put_file("a/f", source, Transfer(sha256=hashlib.sha256(source.read_bytes()).hexdigest()))
    assert repository.files == {"run/a/f": source.read_bytes()}
    assert remote.get_to_file("a/f", tmp_path / "got").read_bytes() == source.read_bytes()
    assert [found.key for found in remote.list()] == ["a/f"]
    remote.delete("a/f")
    remote.delete("a/f")
    assert remote.head("a/f") is None


def test_what_arrives_altered_is_found(remote, repository, tmp_path):
    (tmp_path / "f").write_bytes(b"x" * LARGE)
    repository.corrupt = True
    with pytest.raises(Unreachable, match="arrived altered"):
        remote.put_file("f", tmp_path / "f")
    with pytest.raises(Damaged):
        remote.put_file("f", tmp_path / "f", Transfer(sha256="0" * 64))


def test_a_commit_that_came_in_between_is_a_conflict(remote, repository):
    etag = remote.compare_and_swap("LATEST.json", b"1", None)
    repository.meanwhile = {"run/LATEST.json": b"2"}
    with pytest.raises(Conflict):
        remote.compare_and_swap("LATEST.json", b"3", etag)
    with pytest.raises(Conflict):
        remote.put_if_absent("LATEST.json", b"3")
    assert remote.read("LATEST.json").data == b"2"


@pytest.mark.parametrize(("status", "kind"), [(401, CredentialsRefused), (403, CredentialsRefused), (503, Unreachable)])
def test_errors_are_told_apart(remote, repository, monkeypatch, status, kind):
    def refuse(**_):
        raise module.HfHubHTTPError("no", response=_response(status))

    monkeypatch.setattr(repository, "get_paths_info", refuse)
    with pytest.raises(kind):
        remote.head("x")


def test_a_repository_that_is_not_there(remote, repository, monkeypatch):
    def refuse(**_):
        raise module.RepositoryNotFoundError("no", response=_response(404))

    monkeypatch.setattr(repository, "get_paths_info", refuse)
    with pytest.raises(BucketMissing, match="hf://owner/repo"):
        remote.head("x")
    monkeypatch.setattr(repository, "get_paths_info", lambda **_: [])
    with pytest.raises(NotFound):
        remote.read("x")


@pytest.mark.parametrize(
    ("url", "repo_id", "repo_type"),
    [("hf://o/r/x", "o/r", "model"), ("hf://datasets/o/r", "o/r", "dataset"), ("hf://models/o/r", "o/r", "model")],
)
def test_kinds_of_repositories(url, repo_id, repo_type):
    store = open_hub(parse_url(url), timeout_seconds=5, env={"HF_TOKEN": "t"})
    assert (store._where["repo_id"], store._where["repo_type"]) == (repo_id, repo_type)
