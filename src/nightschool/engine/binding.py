"""What answers a request, from its first token to its last."""

from __future__ import annotations

from dataclasses import dataclass, replace

from nightschool.store.principal import DEFAULT_TENANT


@dataclass(frozen=True, slots=True)
class Binding:
    """A request is pinned to one when it is submitted; labels, cached prefixes and probes go by it.

    `base` is the reference of the weights that an engine holds, `adapter` of the version that stands on them, if one does.
    `memory_revision` is the state of the explicit memory that is read. `tenant` is who asks: two tenants share no prefix.
    """

    base: str
    adapter: str | None = None
    memory_revision: str | None = None
    tenant: str = DEFAULT_TENANT

    @property
    def label(self) -> str:
        """The reference of the version that answers."""
        return self.adapter or self.base

    def of(self, tenant: str) -> Binding:
        """The same for another tenant."""
        return replace(self, tenant=tenant)
