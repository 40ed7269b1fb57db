"""What answers a request, from its first token to its last."""

from __future__ import annotations

from dataclasses import dataclass, replace

from nightschool.store.principal import DEFAULT_TENANT


@dataclass(frozen=True, slots=True)
class Binding:
    """A request is pinned to one when it is submitted; labels, cached prefixes and probes go by it.

    `base` is the reference of the weights that an engine holds, `adapter` of the version that stands on them, if one does.
    `memory_revision` is the state of the explicit memory that is read. `tenant` is who asks, and whose turn it is when many
    wait. `key` tells the askers of one tenant apart: two bindings that differ in anything share no cached prefix.
    """

    base: str
    adapter: str | None = None
    memory_revision: str | None = None
    tenant: str = DEFAULT_TENANT
    key: str | None = None

    @property
    def label(self) -> str:
        """The reference of the version that answers."""
        return self.adapter or self.base

    def of(self, tenant: str, key: str | None = None) -> Binding:
        """The same for another asker."""
        return replace(self, tenant=tenant, key=key)
