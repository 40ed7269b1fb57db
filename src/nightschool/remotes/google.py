"""Google Cloud Storage, by its own library, with uploads that a later process goes on with.

The etag of an object is its generation, which is what the store compares in conditions.
"""

from __future__ import annotations

import base64
import os
import random
import re
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import google.auth
import google_crc32c
import requests
from google.api_core import exceptions as api
from google.auth import exceptions as auth
from google.auth.credentials import AnonymousCredentials
from google.cloud import storage
from google.cloud.storage.exceptions import DataCorruption, InvalidResponse
from google.cloud.storage.retry import DEFAULT_RETRY

from nightschool.errors import BucketMissing, Conflict, CredentialsRefused, NightschoolError, RemoteError, Unreachable
from nightschool.remotes.address import Address
from nightschool.remotes.remote import ObjectInfo
from nightschool.remotes.transfer import SourceFile, Transfer

# A multiple of 256 KiB, as the protocol wants.
_PART_BYTES = 8 << 20
_ATTEMPTS = 5
_RETRY_SECONDS = 60.0
# What the store may take later: a timeout, too many requests.
_PASSING = (408, 429)
_FAULTS = (
    api.GoogleAPIError,
    auth.GoogleAuthError,
    requests.RequestException,
    ConnectionError,
    DataCorruption,
    InvalidResponse,
)
_CREDENTIALS = (
    "Set GOOGLE_APPLICATION_CREDENTIALS to the file of a service account, or run gcloud auth application-default login, "
    "and see that the account may read and write there."
)


def open_google(address: Address, *, timeout_seconds: float, env: Mapping[str, str] = os.environ) -> GoogleStore:
    """A bucket, with the application default credentials; without any, as anybody, which does for public buckets."""
    known = True
    if env.get("STORAGE_EMULATOR_HOST"):
        credentials: Any = AnonymousCredentials()  # type: ignore[no-untyped-call]
    else:
        try:
            credentials, _ = google.auth.default(scopes=["https://www.googleapis.com/auth/devstorage.read_write"])
        except auth.DefaultCredentialsError:
            credentials, known = AnonymousCredentials(), False  # type: ignore[no-untyped-call]
    client = storage.Client(project=env.get("GOOGLE_CLOUD_PROJECT", "none"), credentials=credentials)
    return GoogleStore(client, address.bucket, timeout_seconds=timeout_seconds, credentials_known=known)


class GoogleStore:
    """A bucket."""

    def __init__(self, client: Any, bucket: str, *, timeout_seconds: float, credentials_known: bool = True) -> None:
        self._client = client
        self._bucket = client.bucket(bucket)
        self._url = f"gs://{bucket}"
        self._credentials_known = credentials_known
        self._how: dict[str, Any] = {
            "timeout": (min(10.0, timeout_seconds), timeout_seconds),
            "retry": DEFAULT_RETRY.with_timeout(min(_RETRY_SECONDS, 2 * timeout_seconds)),
        }
        # The address of a session is its own key: nobody signs in for it.
        self._http = requests.Session()

    def put_file(self, key: str, source: SourceFile, transfer: Transfer) -> str:
        with self._translated(key):
            session, arrived = self._session(key, source, transfer)
            crc: Any = google_crc32c.Checksum()  # type: ignore[no-untyped-call]
            end = start = arrived if isinstance(arrived, int) else source.size_bytes
            for part in source.pieces(_PART_BYTES, crc, start=start):
                arrived = self._send(key, session, part, end, source.size_bytes, transfer)
                end += len(part)
            if source.size_bytes == 0:
                arrived = self._send(key, session, b"", 0, 0, transfer)
            transfer.on_session(None)
            if isinstance(arrived, int):
                raise Unreachable(f"{self._url}/{key} did not arrive as a whole. It is sent again.")
            return self._compared(key, arrived, base64.b64encode(crc.digest()).decode())

    def swap(self, key: str, content: bytes, etag: str | None) -> str:
        with self._translated(key):
            blob = self._bucket.blob(key)
            # The generation 0 is that of an object which does not exist.
            blob.upload_from_string(content, if_generation_match=int(etag or 0), checksum="crc32c", **self._how)
            return str(blob.generation)

    def head(self, key: str) -> ObjectInfo | None:
        with self._translated(key):
            found = self._bucket.get_blob(key, **self._how)
            if found is None:
                next(iter(self._client.list_blobs(self._bucket, max_results=1, **self._how)), None)
                return None
            return _facts(found)

    def stream(self, key: str, start: int, etag: str) -> Iterator[bytes]:
        with self._translated(key):
            found = self._bucket.get_blob(key, **self._how)
            if found is None or str(found.generation) != etag:
                raise Conflict(f"{self._url}/{key} was changed while it was read. Try again.")
            for begin in range(start, found.size, _PART_BYTES):
                last = min(begin + _PART_BYTES, found.size) - 1
                yield found.download_as_bytes(
                    start=begin,
                    end=last,
                    raw_download=True,
                    checksum=None,
                    if_generation_match=found.generation,
                    **self._how,
                )

    def list(self, prefix: str) -> Iterator[ObjectInfo]:
        with self._translated(prefix):
            for found in self._client.list_blobs(self._bucket, prefix=prefix or None, **self._how):
                yield _facts(found)

    def delete(self, key: str) -> None:
        with self._translated(key):
            try:
                self._bucket.blob(key).delete(**self._how)
            except api.NotFound:
                return

    def _session(self, key: str, source: SourceFile, transfer: Transfer) -> tuple[str, dict[str, Any] | int]:
        """Where to send to, and what `_exchange` says of it."""
        if transfer.session is not None:
            try:
                return transfer.session, self._exchange(transfer.session, f"bytes */{source.size_bytes}")
            except api.ClientError as error:
                if error.code in _PASSING:
                    raise
            transfer.on_session(None)  # sessions end after a week, or with their bucket
        blob = self._bucket.blob(key)
        session = blob.create_resumable_upload_session(size=source.size_bytes, checksum=None, **self._how)
        transfer.on_session(session)
        return session, 0

    def _send(
        self, key: str, session: str, part: bytes, start: int, total: int, transfer: Transfer
    ) -> dict[str, Any] | int:
        """Send what lies at `start`, all of it. Returns what `_exchange` says afterwards."""
        end, fault = start + len(part), ""
        arrived: dict[str, Any] | int = start
        for attempt in range(_ATTEMPTS):
            try:
                if attempt or not part:  # after a fault, only the store knows what it has
                    arrived = self._exchange(session, f"bytes */{total}")
                if isinstance(arrived, int) and start <= arrived < end:
                    content_range = f"bytes {arrived}-{end - 1}/{total}"
                    arrived = self._exchange(session, content_range, part[arrived - start :])
                if isinstance(arrived, dict) or arrived == end < total:
                    return arrived
                if not start <= arrived <= end:
                    raise api.NotFound("what had arrived is gone")  # type: ignore[no-untyped-call]
                fault = f"{arrived} of {total} bytes have arrived"
            except api.ClientError as error:
                if error.code in (404, 410):
                    transfer.on_session(None)
                    raise Unreachable(
                        f"The upload session of {self._url}/{key} is over. It is sent from the beginning."
                    ) from error
                if error.code not in _PASSING:
                    raise
                fault = _first_line(error)
            except (requests.RequestException, api.GoogleAPIError, ValueError) as error:
                fault = _first_line(error)
            time.sleep(random.uniform(0.5, 1.0) * 0.2 * 2**attempt)
        raise Unreachable(f"{self._url}/{key} could not be sent: {fault}. Check the network; it goes on from there.")

    def _exchange(self, session: str, content_range: str, data: bytes = b"") -> dict[str, Any] | int:
        """Send some bytes or none. Returns the object if all of it is there, else how many bytes have arrived."""
        answer = self._http.put(
            session,
            data=data,
            headers={"Content-Range": content_range, "Content-Length": str(len(data))},
            timeout=self._how["timeout"],
            allow_redirects=False,
        )
        if answer.status_code in (200, 201):
            return dict(answer.json())
        if answer.status_code == 308:
            match = re.fullmatch(r"bytes=0-(\d+)", answer.headers.get("Range", ""))
            return int(match[1]) + 1 if match else 0
        raise api.from_http_response(answer)  # type: ignore[no-untyped-call]

    def _compared(self, key: str, stored: dict[str, Any], crc: str) -> str:
        """The generation of an object that has the checksum of what was sent.

        Raises:
            Unreachable: If it has another: it was altered on the way, and is removed.
        """
        theirs, generation = stored.get("crc32c"), str(stored["generation"])
        if theirs != crc:
            self._bucket.blob(key).delete(if_generation_match=int(generation), **self._how)
            raise Unreachable(
                f"{self._url}/{key} arrived altered: the store has the CRC32C {theirs}, but {crc} was sent. "
                f"It is sent again."
            )
        return generation

    @contextmanager
    def _translated(self, key: str) -> Iterator[None]:
        try:
            yield
        except NightschoolError:
            raise
        except _FAULTS as error:
            raise self._meaning(error, key) from error

    def _meaning(self, error: Exception, key: str) -> NightschoolError:
        said, url = _first_line(error), f"{self._url}/{key}".rstrip("/")
        if isinstance(error, api.NotFound):
            return BucketMissing(f"There is no {self._url}. Check its name, or create it.")
        if isinstance(error, api.PreconditionFailed):
            return Conflict(f"{url} exists already, or was changed by somebody else meanwhile. Read it, and compare.")
        if isinstance(error, api.Unauthorized | api.Forbidden | auth.RefreshError | auth.DefaultCredentialsError):
            what = said if self._credentials_known else "none were found"
            return CredentialsRefused(f"The credentials for {url} are not accepted: {what}. {_CREDENTIALS}")
        if isinstance(error, api.ClientError) and error.code not in _PASSING:
            return RemoteError(f"The store refused {url}: {said}. Check the address and its settings.")
        return Unreachable(f"{url} could not be reached: {said}. Check the network; what was begun is tried again.")


def _first_line(error: Exception) -> str:
    return re.sub(r"upload_id=[^&\s]+", "upload_id=…", str(error).split("\n")[0])[:300]


def _facts(found: Any) -> ObjectInfo:
    return ObjectInfo(found.name, found.size, str(found.generation), found.updated)
