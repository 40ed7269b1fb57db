"""Which versions a version grew from: its line."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from nightschool.errors import Damaged
from nightschool.store.names import split_quantization
from nightschool.store.registry import Registry, Version


@dataclass(frozen=True)
class Line:
    """A version and those of its name that it grew from, newest first, as far as they still exist.

    `broken`: the oldest of them grew from one that was deleted, or its facts cannot be read, so that nobody knows
    which of the older versions belong to the line.
    """

    versions: tuple[Version, ...]
    broken: bool

    @cached_property
    def ids(self) -> frozenset[str]:
        return frozenset(version.id for version in self.versions)

    def may_hold(self, version_id: str) -> bool:
        """Whether this version is of the line, or may be: it is older than where the line breaks off."""
        return version_id in self.ids or (self.broken and version_id < self.versions[-1].id)


def line_of(registry: Registry, version: Version) -> Line:
    """The line of a version."""
    existing = {other.id: other for other in registry.versions(version.name)}
    line = [version]
    while True:
        try:
            name, _, parent = (line[-1].facts.parent or "").partition("@")
        except Damaged:
            return Line(tuple(line), broken=True)
        if name != version.name:
            return Line(tuple(line), broken=False)
        if parent not in existing:
            return Line(tuple(line), broken=True)
        line.append(existing[parent])


def start_of(registry: Registry, name: str, base: str) -> Version | None:
    """The version of `name` that a run with this base starts from; None if it starts anew, from other weights.

    Raises:
        NotFound: If the base names a version that does not exist.
    """
    base, _ = split_quantization(base)
    if base != name and not base.startswith(f"{name}@"):
        return None
    if base == name and name not in registry.names():
        return None  # a model of the hub, or a folder
    return registry.resolve(base)
