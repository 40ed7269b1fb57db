"""Where objects lie: URLs of object stores, and keys, checked before anything is made of them."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from urllib.parse import unquote, urlsplit

from nightschool.errors import UsageError
from nightschool.store.names import check_key

SCHEMES = ("file", "s3", "gs", "az", "hf", "memory")
# Other spellings of the same stores.
_SPELLINGS = {"gcs": "gs", "s3a": "s3", "azure": "az", "abfs": "az"}
_BUCKET = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")


@dataclass(frozen=True)
class Address:
    """`scheme://bucket/prefix`. A prefix has no slash at its ends; for `file`, `bucket` is empty and it is a path."""

    scheme: str
    bucket: str
    prefix: str

    def __str__(self) -> str:
        if self.scheme == "file":
            return f"file://{self.prefix}"
        return f"{self.scheme}://{self.bucket}" + (f"/{self.prefix}" if self.prefix else "")

    @property
    def parent(self) -> tuple[Address, str]:
        """The address without the last part of its prefix, and that part; the part is empty for a whole bucket."""
        head, _, last = self.prefix.rpartition("/")
        return Address(self.scheme, self.bucket, head or ("/" if self.scheme == "file" else "")), last


def is_url(text: str) -> bool:
    """Whether a text is meant as the URL of an object store rather than as a path or a name."""
    return re.match(r"[a-z][a-z0-9+.-]*://", text) is not None


def parse_url(url: str) -> Address:
    """Split the URL of an object store.

    Raises:
        UsageError: If it is no URL of a store that we know, or names no bucket.
        NameRefused: If its path could lead elsewhere.
    """
    parts = urlsplit(url)
    scheme = _SPELLINGS.get(parts.scheme, parts.scheme)
    if scheme not in SCHEMES:
        raise UsageError(
            f"{url!r} is not an address of an object store. Write gs://bucket/folder, s3://bucket/folder, "
            f"az://container/folder, hf://owner/repository or file:///folder."
        )
    if parts.query or parts.fragment or parts.username or parts.password:
        raise UsageError(
            f"{_without_secrets(url)!r} holds more than a place: no user, no `?` and no `#` belongs into an address. "
            f"Give credentials in the environment."
        )
    path = unquote(parts.path)
    if scheme == "file":
        return Address("file", "", _file_path(url, parts.netloc, path))
    bucket, path = (_repository(url, parts.netloc + path)) if scheme == "hf" else (parts.netloc, path)
    if not all(_BUCKET.fullmatch(part) for part in bucket.split("/")):
        raise UsageError(f"{url!r} names no bucket. Write {scheme}://bucket/folder.")
    prefix = path.strip("/")
    return Address(scheme, bucket, check_key(prefix) if prefix else "")


def _file_path(url: str, host: str, path: str) -> str:
    if host not in ("", "localhost") or not path.startswith("/"):
        raise UsageError(f"{url!r} names no folder of this machine. Write file:///folder, with three slashes.")
    return os.path.normpath(path)


def _repository(url: str, path: str) -> tuple[str, str]:
    """`owner/name` or `datasets/owner/name`, and what follows it."""
    parts = path.strip("/").split("/")
    count = 3 if parts[0] in ("datasets", "spaces", "models") else 2
    if len(parts) < count:
        raise UsageError(f"{url!r} names no repository. Write hf://owner/repository or hf://datasets/owner/repository.")
    return "/".join(parts[:count]), "/".join(parts[count:])


def _without_secrets(url: str) -> str:
    parts = urlsplit(url)
    return f"{parts.scheme}://…@{parts.hostname}…" if parts.username or parts.password else f"{url.split('?')[0]}"
