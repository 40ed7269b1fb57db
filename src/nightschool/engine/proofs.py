"""What a version must answer before it is served, and which versions have answered it on this machine already.

A version is published with probes: prompts, and the tokens that its training process answered. Whether the same bytes give
the same tokens here depends on the engine, the libraries, the machine and the number format, and on nothing else: so it is
asked once for all of them, by the gate as a rule, and what was proven lies in the home's cache for every other process.
"""

from __future__ import annotations

import hashlib
import logging
import platform
from collections.abc import Sequence
from functools import cache
from importlib.metadata import version as installed
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from nightschool.engine import kernels
from nightschool.engine.request import SamplingParams
from nightschool.errors import Conflict, Damaged, NotFound
from nightschool.store.home import Home
from nightschool.store.manifest import json_digest, read_manifest
from nightschool.store.registry import Version

if TYPE_CHECKING:
    from nightschool.engine.pool import BoundEngine

log = logging.getLogger("nightschool.engine")

# Files that are kept, each empty; when there are more, the older half goes.
_MOST_FILES = 4096
_LIBRARIES = ("torch", "transformers", "safetensors", "tokenizers")


class Proofs:
    """The versions that gave the answers they were published with, of one process and, as files, of its machine."""

    def __init__(self, home: Home) -> None:
        self._folder = home.cache / "proofs"
        self._known: set[tuple[str, str | None]] = set()

    def prove(self, bound: BoundEngine, version: Version) -> None:
        """Ask a version's probes, all at once, unless it has answered them before.

        Raises:
            Conflict: If it answers one otherwise: then it is not what was published.
        """
        # Merged it is another model by rounding.
        known = (version.ref, bound.binding.adapter)
        if known in self._known or not version.facts.probes:
            return
        key = _key(bound, version)
        if key is None or not (self._folder / key).exists():
            _ask(bound, version)
            if key is not None:
                self._keep(key)
        self._known.add(known)

    def _keep(self, key: str) -> None:
        """Failing costs the next process time, so it is only logged."""
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            (self._folder / key).touch()
            files = list(self._folder.iterdir())
            if len(files) > _MOST_FILES:
                for old in sorted(files, key=lambda path: path.stat().st_mtime)[: _MOST_FILES // 2]:
                    old.unlink(missing_ok=True)
        except OSError as error:
            log.warning("a proof is not kept", extra={"facts": {"reason": str(error)}})


def _key(bound: BoundEngine, version: Version) -> str | None:
    """A digest of all that the answers depend on; None where the weights of the base have no digests."""
    loaded = bound.engine.loaded
    if loaded.path is None:
        return None
    try:
        folders = [read_manifest(folder).files for folder in (version.path, loaded.path)]
    except (NotFound, Damaged):
        return None
    weight = next(parameter for parameter in loaded.model.parameters() if parameter.is_floating_point())
    on_gpu = weight.device.type == "cuda"
    return json_digest(
        {
            "files": [{name: file.sha256 for name, file in files.items()} for files in folders],
            "base": loaded.base_ref,
            "adapter": bound.binding.adapter,
            "dtype": str(weight.dtype),
            "device": torch.cuda.get_device_name(weight.device) if on_gpu else torch.backends.cpu.get_cpu_capability(),
            "machine": [platform.node(), platform.machine()],
            "kernels": kernels.is_available(),
            "libraries": {name: installed(name) for name in _LIBRARIES},
            "engine": _own_code(),
        }
    )


@cache
def _own_code() -> str:
    """A digest of the engine's own files."""
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def _ask(bound: BoundEngine, version: Version) -> None:
    probes = version.facts.probes
    asked = [
        (list(probe.prompt_ids), SamplingParams(max_new_tokens=len(probe.expected_ids), temperature=0, ignore_eos=True))
        for probe in probes
    ]
    for number, (probe, answer) in enumerate(zip(probes, bound.answers(asked), strict=True), start=1):
        if list(answer) != list(probe.expected_ids):
            raise Conflict(
                f"probe {number} of {version.ref} expects the tokens {_few(probe.expected_ids)}, and the loaded "
                f"version answers {_few(answer)}. Publish it again."
            )


def _few(token_ids: Sequence[int]) -> str:
    shown = ", ".join(map(str, token_ids[:12]))
    return f"[{shown}, …]" if len(token_ids) > 12 else f"[{shown}]"
