"""A model that was made elsewhere becomes the first version of a name, by the same way as a candidate, and its champion."""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from pathlib import Path

from nightschool.data.example import Example, Message
from nightschool.errors import Conflict, NotFound, UsageError
from nightschool.feedback.promotion import promote
from nightschool.models.cost import count_parameters
from nightschool.models.hub import fetch_from_hub
from nightschool.models.load import as_path, load_base
from nightschool.models.stored import stored_weights
from nightschool.store.home import Home
from nightschool.store.manifest import file_sha256
from nightschool.store.names import CHAMPION, check_full_name
from nightschool.store.registry import Registry, Version, VersionMetadata
from nightschool.training.publish import publish_candidate

METHOD = "import"
_NOT_OF_A_NAME = re.compile(r"[^a-z0-9._-]+")
# What a version must answer as it did when it was added, before it is served.
_QUESTIONS = (
    "What is the capital of France?",
    "Write one sentence about the sea.",
    "How many days does a week have?",
    "Hello! Who are you?",
)
_PROBED = tuple(Example(messages=(Message("user", asked), Message("assistant", "…"))) for asked in _QUESTIONS)


@dataclass(frozen=True)
class Added:
    """What `add_model` did. `is_new` is False if the same files were added under this name before."""

    version: Version
    champion: Version
    is_new: bool


def add_model(home: Home, name: str, source: str, *, by: str, root: Path | None = None) -> Added:
    """Publish `source` as the first version of `name` and make it the champion.

    It is loaded, published, loaded again by plain transformers, and compared tensor by tensor and in its logits.
    Added again from the same files, nothing changes.

    Args:
        home: Whose registry takes it.
        name: A name without versions.
        source: A folder, a GGUF file or a hub id.
        by: Who does it, for the history.
        root: Where a relative path begins; the working directory without it.

    Raises:
        NameRefused: If the name may not become a path.
        UsageError: If the source is a version of the registry, or `new:`.
        Conflict: If the name has versions of another origin.
        NotFound, ModelError, Damaged: If the source cannot be loaded.
    """
    name = check_full_name(name)
    if source.startswith("new:") or "@" in source:
        raise UsageError(
            f"{source!r} is not a model to add: a folder, a GGUF file or a hub id is. nightschool train makes models from "
            "new:<preset>, and a version is in the registry already."
        )
    registry = Registry(home)
    digest = _digest(source, root)
    version = _added_before(registry, name, digest)
    is_new = version is None
    if version is None:
        version = _publish(registry, name, source, digest, root)
    if CHAMPION not in registry.aliases(name):
        promote(home, name, version.id, by=by)
    return Added(version, registry.resolve(name), is_new)


def name_for(source: str) -> str:
    """The name that a source gets if nobody chooses one: its last part, in the letters that a name may have."""
    last = Path(source).stem if source.lower().endswith(".gguf") else Path(source).resolve().name
    return _NOT_OF_A_NAME.sub("-", last.lower()).strip("-._")[:64]


def _added_before(registry: Registry, name: str, digest: str) -> Version | None:
    versions = registry.versions(name)
    for version in versions:
        if version.facts.source_digest == digest:
            return version
    if versions:
        raise Conflict(
            f"{name!r} has versions of another origin already ({versions[-1].ref} is the oldest). Choose another name."
        )
    return None


def _publish(registry: Registry, name: str, source: str, digest: str, root: Path | None) -> Version:
    home = registry.home
    dtype = stored_weights(source, home, root).dtype
    loaded = load_base(source, home, dtype=dtype, merge=False, root=root)
    facts = VersionMetadata(
        kind="adapter" if loaded.adapter else "model",
        method=METHOD,
        base=loaded.base_ref,
        source_digest=digest,
        num_parameters=count_parameters(loaded.model).total,
        dtype=str(dtype).removeprefix("torch."),
        context_tokens=loaded.context_tokens,
    )
    version, _ = publish_candidate(registry, name, loaded, _PROBED, facts)
    return version


def _digest(source: str, root: Path | None) -> str:
    """SHA-256 of what lies at the source: of the file, or of the names and digests of a folder's files."""
    path = as_path(source, root)
    path = fetch_from_hub(source) if path is None else path
    if path.is_file():
        return file_sha256(path)
    if not path.is_dir():
        raise NotFound(f"There is no model at {source!r}: {path} is not there. Name a folder, a GGUF file or a hub id.")
    lines = [f"{file_sha256(file)}  {file.name}\n" for file in sorted(path.iterdir()) if file.is_file()]
    return hashlib.sha256("".join(lines).encode()).hexdigest()
