"""Packed weights kept on disk from load to load: to find the format of a weight takes far longer than to read it back."""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load, save_file
from torch import Tensor

from nightschool.engine.packing import Packed
from nightschool.errors import Damaged, NightschoolError, NotFound
from nightschool.models.load import LoadedModel
from nightschool.store.atomic import publish_directory, remove_folder, sweep_partials
from nightschool.store.home import Home
from nightschool.store.manifest import json_digest, read_manifest, write_manifest

log = logging.getLogger("nightschool.engine")

# Goes up when the order of the words changes.
_FORMAT = 1
_FILE = "packed.safetensors"
# Models that are kept; the one that was used longest ago goes first.
_MOST_MODELS = 8


def folder_of(loaded: LoadedModel, home: Home) -> Path | None:
    """Where the packed weights of a model belong; None if no folder with digests holds its weights."""
    if loaded.path is None:
        return None
    try:
        files = read_manifest(loaded.path).files
    except (NotFound, Damaged):
        return None
    digest = json_digest({name: file.sha256 for name, file in files.items()})
    return home.cache / "packed" / f"{digest}-{_FORMAT}"


def read(folder: Path) -> dict[str, tuple[str, Tensor]]:
    """By the name of a layer its format's name and its words, as `write` got them. Empty if they are not there or broken."""
    try:
        stated = read_manifest(folder).files[_FILE].sha256
        content = (folder / _FILE).read_bytes()
        if hashlib.sha256(content).hexdigest() != stated:
            raise Damaged(f"{folder / _FILE} was altered after it was written.")
        named = load(content)
    except NotFound:
        return {}
    except (Damaged, OSError, KeyError, SafetensorError) as error:
        log.warning("packed weights are made anew", extra={"facts": {"reason": str(error)}})
        return {}
    with contextlib.suppress(OSError):  # the home of somebody who only reads
        os.utime(folder)
    found = {}
    for key, words in named.items():
        layer, _, format_ = key.rpartition(":")
        found[layer] = format_, words
    return found


def write(folder: Path, packed: Mapping[str, Packed]) -> None:
    """Keep the packed weights of a model, and let go of what was used longest ago. Failing costs time, so it is only logged."""
    try:
        sweep_partials(folder.parent)
        with publish_directory(folder, replace=True) as partial:
            named = {f"{layer}:{one.format.name}": one.words for layer, one in packed.items()}
            save_file(named, partial / _FILE)
            write_manifest(partial)
        kept = sorted(folder.parent.glob(f"*-{_FORMAT}"), key=lambda path: path.stat().st_mtime)
        for oldest in kept[:-_MOST_MODELS]:
            remove_folder(oldest)
    except (NightschoolError, OSError) as error:
        log.warning("packed weights are not kept", extra={"facts": {"reason": str(error)}})
