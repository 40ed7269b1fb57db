"""S3, Azure and memory, by way of obstore."""

from __future__ import annotations

import configparser
import hashlib
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import obstore
from obstore.exceptions import (
    AlreadyExistsError,
    BaseError,
    NotModifiedError,
    PermissionDeniedError,
    PreconditionError,
    UnauthenticatedError,
)
from obstore.store import AzureStore, MemoryStore, S3Store

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

_PART_BYTES = 8 << 20
_RANGE_BYTES = 32 << 20
# S3 takes at most 10,000 parts.
_MOST_PARTS = 9000
_CONCURRENCY = 4
_MD5_ETAG = re.compile(r"[0-9a-f]{32}(-[0-9]+)?")
_RETRY: Any = {
    "max_retries": 4,
    "retry_timeout": timedelta(seconds=60),
    "backoff": {"init_backoff": timedelta(seconds=0.1), "max_backoff": timedelta(seconds=5), "base": 2},
}
_CREDENTIALS = re.compile(
    r"ExpiredToken|InvalidAccessKeyId|SignatureDoesNotMatch|InvalidToken|AccessDenied|AuthenticationFailed|"
    r"AuthorizationFailure|InvalidAuthenticationInfo|RequestTimeTooSkewed|169\.254\.|metadata endpoint|"
    r"[Cc]redential|40[13] (Unauthorized|Forbidden)"
)
_NO_BUCKET = re.compile(r"NoSuchBucket|ContainerNotFound|ContainerBeingDeleted|InvalidBucketName")
_REFUSED = re.compile(r"non-2xx status code: 4(?!08|29)\d\d")
_MEMORIES: dict[str, MemoryStore] = {}


def open_s3(address: Address, *, timeout_seconds: float, env: Mapping[str, str] = os.environ) -> CloudStore:
    """A bucket of S3, or of whatever speaks like it at AWS_ENDPOINT_URL.

    Credentials: AWS_ACCESS_KEY_ID and its like, web identity, container and machine roles; else the profile
    AWS_PROFILE of ~/.aws/credentials.
    """
    endpoint = env.get("AWS_ENDPOINT_URL_S3") or env.get("AWS_ENDPOINT_URL") or env.get("AWS_ENDPOINT")
    more: dict[str, Any] = _profile(env) | ({"endpoint": endpoint} if endpoint else {})
    # The payload is not signed: a second hash of each byte would be as much work as sending it. What arrived is
    # compared by the store's own checksum.
    store = S3Store(
        address.bucket,
        unsigned_payload=True,
        client_options=_client(endpoint, timeout_seconds),
        retry_config=_RETRY,
        **more,
    )
    return CloudStore(store, f"s3://{address.bucket}", _S3_CREDENTIALS)


def open_azure(address: Address, *, timeout_seconds: float, env: Mapping[str, str] = os.environ) -> CloudStore:
    """A container of the account AZURE_STORAGE_ACCOUNT_NAME, with AZURE_STORAGE_ACCOUNT_KEY or what obstore reads."""
    endpoint = env.get("AZURE_STORAGE_ENDPOINT") or env.get("AZURE_ENDPOINT")
    store = AzureStore(
        address.bucket,
        client_options=_client(endpoint, timeout_seconds),
        retry_config=_RETRY,
        **({"endpoint": endpoint} if endpoint else {}),  # type: ignore[arg-type]
    )
    return CloudStore(store, f"az://{address.bucket}", _AZURE_CREDENTIALS)


def open_memory(address: Address, *, timeout_seconds: float) -> CloudStore:  # noqa: ARG001
    """Objects that end with this process."""
    return CloudStore(_MEMORIES.setdefault(address.bucket, MemoryStore()), f"memory://{address.bucket}", "")


_S3_CREDENTIALS = "Set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY (and AWS_SESSION_TOKEN if they are temporary)"
_AZURE_CREDENTIALS = "Set AZURE_STORAGE_ACCOUNT_NAME and AZURE_STORAGE_ACCOUNT_KEY"


class CloudStore:
    """A bucket. `credentials` says what to set when they are refused."""

    def __init__(self, store: S3Store | AzureStore | MemoryStore, url: str, credentials: str) -> None:
        self._store = store
        self._url = url
        self._credentials = credentials

    def put_file(self, key: str, source: SourceFile, transfer: Transfer) -> str:  # noqa: ARG002
        """Parts of 8 MiB, four at a time; an interrupted upload begins again (obstore tells nobody its upload id)."""
        part_bytes = max(_PART_BYTES, -(-source.size_bytes // (_MOST_PARTS << 20)) << 20)
        parts = _Parts(source, part_bytes)
        with self._translated(key, parts):
            if source.size_bytes <= part_bytes:
                # The whole file at once: a second try of obstore's own needs it again.
                stored = obstore.put(self._store, key, b"".join(parts), use_multipart=False)
            else:
                stored = obstore.put(
                    self._store,
                    key,
                    iter(parts),
                    use_multipart=True,
                    chunk_size=part_bytes,
                    max_concurrency=_CONCURRENCY,
                )
        etag = (stored["e_tag"] or "").strip('"')
        if etag != parts.etag():
            self._settle(key, source, etag, sent=parts.etag())
        return etag

    def swap(self, key: str, content: bytes, etag: str | None) -> str:
        with self._translated(key):
            mode: Any = "create"
            if etag is not None:
                # Azure and memory compare the very text, quotation marks and all.
                present = obstore.head(self._store, key)
                if _etag(present["e_tag"]) != etag:
                    raise Conflict(f"{self._url}/{key} was changed by somebody else meanwhile. Read it, and try again.")
                mode = {name: present[name] for name in ("e_tag", "version") if present[name] is not None}
            return _etag(obstore.put(self._store, key, content, mode=mode)["e_tag"])

    def head(self, key: str) -> ObjectInfo | None:
        with self._translated(key):
            try:
                found = obstore.head(self._store, key)
            except FileNotFoundError:
                # A HEAD has no body that could say whether the object or its bucket is missing.
                self._ask_for_bucket()
                return None
        return _facts(found)

    def stream(self, key: str, start: int, etag: str) -> Iterator[bytes]:
        with self._translated(key):
            size_bytes = obstore.head(self._store, key)["size"]
            # In ranges, because a request must end within its time, however large the object is.
            for begin in range(start, size_bytes, _RANGE_BYTES):
                options: Any = {"range": (begin, min(begin + _RANGE_BYTES, size_bytes))}
                got = obstore.get(self._store, key, options=options)
                if _etag(got.meta["e_tag"]) != etag:
                    raise Conflict(f"{self._url}/{key} was changed while it was read. Try again.")
                for chunk in got.stream(min_chunk_size=1 << 20):
                    yield bytes(chunk)

    def list(self, prefix: str) -> Iterator[ObjectInfo]:
        with self._translated(prefix):
            for page in obstore.list(self._store, prefix or None):
                for found in page:
                    yield _facts(found)

    def delete(self, key: str) -> None:
        with self._translated(key):
            try:
                obstore.delete(self._store, key)
            except FileNotFoundError:
                return

    def _ask_for_bucket(self) -> None:
        next(iter(obstore.list(self._store, "no-such-folder", chunk_size=1)), None)

    def _settle(self, key: str, source: SourceFile, etag: str, *, sent: str) -> None:
        """The etag is not the MD5 of what was sent. Azure, and S3 with keys of KMS, make it of something else: read back.

        Raises:
            Unreachable: If other bytes arrived; another transfer may bring the right ones.
        """
        present = self.head(key)
        if present is not None and present.size_bytes == source.size_bytes and self._holds(key, source, present.etag):
            return
        raise Unreachable(
            f"{self._url}/{key} arrived altered: the store has {etag}, but {sent} was sent. It is sent again."
        )

    def _holds(self, key: str, source: SourceFile, etag: str) -> bool:
        with source.path.open("rb") as mine:
            return all(mine.read(len(chunk)) == chunk for chunk in self.stream(key, 0, etag)) and not mine.read(1)

    @contextmanager
    def _translated(self, key: str, parts: _Parts | None = None) -> Iterator[None]:
        try:
            yield
        except NightschoolError:
            raise
        except (BaseError, OSError, ValueError) as error:
            if parts is not None and parts.failure is not None:
                # Our own reading failed; obstore only passes it on in its words.
                raise parts.failure from None
            raise self._meaning(error, f"{self._url}/{key}".rstrip("/")) from error

    def _meaning(self, error: Exception, url: str) -> NightschoolError:
        said = str(error)
        first = said.split("\n\nDebug source")[0].split("\n")[0].strip()
        if _NO_BUCKET.search(said):
            return BucketMissing(f"There is no {self._url}. Check its name, or create it.")
        if isinstance(error, AlreadyExistsError):
            return Conflict(f"{url} exists already. Compare the two, and choose another place.")
        if isinstance(error, PreconditionError | NotModifiedError):
            return Conflict(f"{url} was changed by somebody else meanwhile. Read it, and try again.")
        if isinstance(error, FileNotFoundError):
            return NotFound(f"There is no {url}. Check the address, or list what is there.")
        if isinstance(error, PermissionDeniedError | UnauthenticatedError) or _CREDENTIALS.search(said):
            code = re.search(r"<Code>(\w+)</Code>", said)
            what = code[1] if code else ("none were found" if "169.254" in said else "refused")
            return CredentialsRefused(
                f"The credentials for {url} are not accepted: {what}. {self._credentials}, and see that they may read and "
                f"write there."
            )
        if _REFUSED.search(said):
            return RemoteError(f"The store refused {url}: {first}. Check the address and its settings.")
        return Unreachable(f"{url} could not be reached: {first}. Check the network; what was begun is tried again.")


class _Parts:
    """The parts of a file, with the MD5 of each, of which S3 makes the etag."""

    def __init__(self, source: SourceFile, part_bytes: int) -> None:
        self._source = source
        self._part_bytes = part_bytes
        self._digests: list[bytes] = []
        self.failure: Exception | None = None

    def __iter__(self) -> Iterator[bytes]:
        try:
            for part in self._source.pieces(self._part_bytes):
                self._digests.append(hashlib.md5(part, usedforsecurity=False).digest())
                yield part
        except Exception as error:
            self.failure = error
            raise

    def etag(self) -> str:
        if self._source.size_bytes <= self._part_bytes:
            whole = self._digests[0] if self._digests else hashlib.md5(b"", usedforsecurity=False).digest()
            return whole.hex()
        return f"{hashlib.md5(b''.join(self._digests), usedforsecurity=False).hexdigest()}-{len(self._digests)}"


def _profile(env: Mapping[str, str]) -> dict[str, str]:
    """The static keys of a profile of the AWS command line, where the environment has none of its own."""
    if any(env.get(name) for name in _S3_SOURCES):
        return {}
    path = Path(env.get("AWS_SHARED_CREDENTIALS_FILE") or "~/.aws/credentials").expanduser()
    parser = configparser.ConfigParser(interpolation=None)
    try:
        parser.read(path)
    except configparser.Error as error:
        raise CredentialsRefused(f"{path} cannot be read: {error}. {_S3_CREDENTIALS}, or mend that file.") from error
    profile = env.get("AWS_PROFILE", "default")
    if not parser.has_section(profile):
        return {}
    names = ("aws_access_key_id", "aws_secret_access_key", "aws_session_token")
    return {name.removeprefix("aws_"): parser[profile][name] for name in names if name in parser[profile]}


_S3_SOURCES = (
    "AWS_ACCESS_KEY_ID",
    "AWS_WEB_IDENTITY_TOKEN_FILE",
    "AWS_CONTAINER_CREDENTIALS_RELATIVE_URI",
    "AWS_CONTAINER_CREDENTIALS_FULL_URI",
    "AWS_SKIP_SIGNATURE",
)


def _client(endpoint: str | None, timeout_seconds: float) -> Any:
    return {
        "allow_http": bool(endpoint and endpoint.startswith("http://")),
        "timeout": timedelta(seconds=timeout_seconds),
        "connect_timeout": timedelta(seconds=min(10.0, timeout_seconds)),
    }


def _etag(text: str | None) -> str:
    return (text or "").strip('"')


def _facts(found: Any) -> ObjectInfo:
    return ObjectInfo(found["path"], found["size"], _etag(found["e_tag"]), found["last_modified"])
