"""Repositories of the Hugging Face Hub. Each object that is stored is a commit; the etag is what git calls the file.

Conditions are those of git: a commit names the one that it follows, and is refused if another came in between.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, hf_hub_url
from huggingface_hub.errors import (
    EntryNotFoundError,
    LocalTokenNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
)
from huggingface_hub.utils import build_hf_headers, disable_progress_bars, get_session  # type: ignore[attr-defined]

from nightschool.errors import (
    BucketMissing,
    Conflict,
    CredentialsRefused,
    NightschoolError,
    NotFound,
    RemoteError,
    Unreachable,
)
from nightschool.remotes.address import Address
from nightschool.remotes.remote import ObjectInfo
from nightschool.remotes.transfer import SourceFile, Transfer

_REVISION = "main"
_CHUNK_BYTES = 8 << 20
_KINDS = {"models": "model", "datasets": "dataset", "spaces": "space"}


def open_hub(address: Address, *, timeout_seconds: float, env: Mapping[str, str] = os.environ) -> HubStore:
    """A repository, with the token HF_TOKEN or the one of `hf auth login`."""
    disable_progress_bars()
    kind, _, rest = address.bucket.partition("/")
    repo_type, repo_id = (_KINDS[kind], rest) if kind in _KINDS else ("model", address.bucket)
    return HubStore(HfApi(token=env.get("HF_TOKEN") or None), repo_id, repo_type, timeout_seconds=timeout_seconds)


class HubStore:
    """A repository. The library sends as fast as it goes: a bandwidth limit holds back only when a file begins."""

    def __init__(self, api: Any, repo_id: str, repo_type: str, *, timeout_seconds: float) -> None:
        self._api = api
        self._where = {"repo_id": repo_id, "repo_type": repo_type, "revision": _REVISION}
        self._url = f"hf://{repo_id}" if repo_type == "model" else f"hf://{repo_type}s/{repo_id}"
        self._timeout_seconds = timeout_seconds

    def put_file(self, key: str, source: SourceFile, transfer: Transfer) -> str:
        whole, blob = hashlib.sha256(), hashlib.sha1(usedforsecurity=False)
        blob.update(f"blob {source.size_bytes}\0".encode())
        for _ in source.pieces(_CHUNK_BYTES, whole, blob):
            continue  # hashed, and paced; the library reads the file itself
        with self._translated(key):
            self._commit(key, CommitOperationAdd(key, source.path))
        present = self._info(key)
        arrived = None if present is None else (present.lfs.sha256 if present.lfs else present.blob_id)
        if present is None or arrived not in (whole.hexdigest(), blob.hexdigest()):
            raise Unreachable(
                f"{self._url}/{key} arrived altered: the Hub has {arrived}, but {whole.hexdigest()} was sent. "
                f"It is sent again."
            )
        transfer.on_session(None)
        return str(present.blob_id)

    def swap(self, key: str, content: bytes, etag: str | None) -> str:
        with self._translated(key):
            head = self._api.repo_info(**self._where).sha
            present = self._info(key, revision=head)
            if (None if present is None else present.blob_id) != etag:
                raise Conflict(f"{self._url}/{key} exists already, or was changed meanwhile. Read it, and compare.")
            self._commit(key, CommitOperationAdd(key, content), parent_commit=head)
            present = self._info(key)
            if present is None:
                raise Unreachable(f"{self._url}/{key} did not arrive. It is sent again.")
            return str(present.blob_id)

    def head(self, key: str) -> ObjectInfo | None:
        found = self._info(key)
        return None if found is None else _facts(found)

    def stream(self, key: str, start: int, etag: str) -> Iterator[bytes]:
        with self._translated(key):
            found = self._info(key)
            if found is None or found.blob_id != etag:
                raise Conflict(f"{self._url}/{key} was changed while it was read. Try again.")
            if start >= found.size:
                return
            headers = build_hf_headers(token=self._api.token) | ({"Range": f"bytes={start}-"} if start else {})
            url = hf_hub_url(filename=key, endpoint=self._api.endpoint, **self._where)
            with get_session().stream(
                "GET", url, headers=headers, timeout=self._timeout_seconds, follow_redirects=True
            ) as answer:
                answer.raise_for_status()
                if start and answer.status_code != 206:
                    raise RemoteError(f"The Hub sent all of {self._url}/{key} instead of its rest. Try again.")
                yield from answer.iter_bytes(1 << 20)

    def list(self, prefix: str) -> Iterator[ObjectInfo]:
        with self._translated(prefix):
            try:
                for found in self._api.list_repo_tree(
                    path_in_repo=prefix.rstrip("/") or None, recursive=True, **self._where
                ):
                    if hasattr(found, "size"):  # folders have none
                        yield _facts(found)
            except EntryNotFoundError:
                return

    def delete(self, key: str) -> None:
        with self._translated(key):
            if self._info(key) is not None:
                self._commit(key, CommitOperationDelete(key))

    def _commit(self, key: str, operation: Any, **more: Any) -> None:
        self._api.create_commit(operations=[operation], commit_message=f"nightschool: {key}", **self._where, **more)

    def _info(self, key: str, **more: Any) -> Any:
        with self._translated(key):
            found = self._api.get_paths_info(paths=[key], **(self._where | more))
            return next((one for one in found if hasattr(one, "size")), None)

    @contextmanager
    def _translated(self, key: str) -> Iterator[None]:
        try:
            yield
        except NightschoolError:
            raise
        except Exception as error:
            if not isinstance(error, OSError | RuntimeError | ValueError) and not _is_of_libraries(error):
                raise
            raise self._meaning(error, f"{self._url}/{key}".rstrip("/")) from error

    def _meaning(self, error: Exception, url: str) -> NightschoolError:
        said = str(error).strip().split("\n")[0][:300]
        status = getattr(getattr(error, "response", None), "status_code", None)
        remedy = "Set HF_TOKEN to a token that may write there, or run hf auth login."
        if isinstance(error, LocalTokenNotFoundError) or status in (401, 403):
            # The Hub says 401 of a private repository that does not exist, too.
            return CredentialsRefused(f"The credentials for {url} are not accepted: {said}. {remedy}")
        if isinstance(error, RepositoryNotFoundError):
            return BucketMissing(f"There is no repository {self._url}. Check its name, or create it: hf repo create.")
        if status in (409, 412):
            return Conflict(f"{url} was changed by somebody else meanwhile. Read it, and try again.")
        if isinstance(error, EntryNotFoundError):
            return NotFound(f"There is no {url}. Check the address, or list what is there.")
        if isinstance(error, OfflineModeIsEnabled):
            return Unreachable(f"{url} may not be reached: HF_HUB_OFFLINE is set. Unset it.")
        refused = isinstance(error, ValueError) and not isinstance(error, json.JSONDecodeError)
        if refused or (status is not None and 400 <= status < 500 and status not in (408, 429)):
            return RemoteError(f"The Hub refused {url}: {said}. Check the address and the repository.")
        return Unreachable(f"{url} could not be reached: {said}. Check the network; what was begun is tried again.")


def _is_of_libraries(error: Exception) -> bool:
    """Whether it comes from the Hub's library or from the HTTP library below it, which is another by version."""
    return type(error).__module__.partition(".")[0] in ("huggingface_hub", "httpx", "httpx2", "httpcore", "requests")


def _facts(found: Any) -> ObjectInfo:
    return ObjectInfo(found.path, found.size, found.blob_id)
