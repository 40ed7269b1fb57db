"""Object stores by URL: `open_remote("s3://bucket/folder")`, and a cache of what was fetched from them."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module

from nightschool.errors import UsageError
from nightschool.remotes.address import Address, is_url, parse_url
from nightschool.remotes.remote import Content, ObjectInfo, ObjectStore, Remote
from nightschool.remotes.transfer import Throttle, Transfer

__all__ = [
    "Address",
    "Content",
    "ObjectInfo",
    "ObjectStore",
    "Remote",
    "Throttle",
    "Transfer",
    "is_url",
    "open_remote",
    "parse_url",
]

TIMEOUT_SECONDS = 120.0

# scheme: (module, function, what to install). Imported when such an address is opened: who uploads to one store
# does not need the libraries of the others.
_STORES: dict[str, tuple[str, str, str]] = {
    "file": ("nightschool.remotes.local", "open_folder", ""),
    "memory": ("nightschool.remotes.cloud", "open_memory", "obstore"),
    "s3": ("nightschool.remotes.cloud", "open_s3", "obstore"),
    "az": ("nightschool.remotes.cloud", "open_azure", "obstore"),
    "gs": ("nightschool.remotes.google", "open_google", "'nightschool[gcs]'"),
    "hf": ("nightschool.remotes.hub", "open_hub", "huggingface_hub"),
}


def open_remote(url: str, *, timeout_seconds: float = TIMEOUT_SECONDS) -> Remote:
    """A folder of an object store. Nothing is asked of the store yet.

    Args:
        url: gs://bucket/folder, s3://…, az://container/…, hf://owner/repository/…, file:///folder or memory://name.
        timeout_seconds: How long one request (a part of 8 MiB) may take before it is tried again.

    Raises:
        UsageError: If it is no such address, or the library for it is not installed.
        CredentialsRefused: If credentials are there, but of no use.
    """
    address = parse_url(url)
    module, function, package = _STORES[address.scheme]
    try:
        opened: Callable[..., ObjectStore] = getattr(import_module(module), function)
    except ImportError as error:
        raise UsageError(
            f"{address.scheme}:// needs a library that is missing ({error}). Install it: pip install {package}."
        ) from error
    return Remote(address, opened(address, timeout_seconds=timeout_seconds))
