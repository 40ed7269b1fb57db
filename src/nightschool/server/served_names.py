"""The names that one server answers for, and the one way from a request's `model` to what answers it.

A server of given names answers for these alone. A server that was given none answers for whatever its registry has: a
name is loaded when it is first asked for (`on_demand`), and leaves when others are asked for more.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import anyio.to_thread

from nightschool.engine.binding import Binding
from nightschool.engine.pool import Generation
from nightschool.engine.slot import Slot
from nightschool.errors import Conflict, NameRefused, NotFound, NotLoaded, SwapFailed, UsageError
from nightschool.server.errors import Refusal
from nightschool.server.on_demand import OnDemand
from nightschool.store.names import CHAMPION, full_name, split_name
from nightschool.store.principal import Principal
from nightschool.store.registry import Registry, Version

DEFAULT_NAME = "default"
"""Answers who names no model, where a tenant has several names."""


class ServedNames:
    """Slots by name: first those given at the start, in their order, which stay; then those that were asked for.

    Args:
        given: Slots that are there from the start; who names no model is answered by the first one of its own.
        on_demand: Opens the slots of other names.
        registry: Where these names are; needed with `on_demand`.

    Raises:
        UsageError: If there is no name, or one is given twice.
    """

    def __init__(
        self, given: Sequence[Slot], on_demand: OnDemand | None = None, registry: Registry | None = None
    ) -> None:
        self._given = {slot.name: slot for slot in given}
        if not given or len(self._given) < len(given):
            names = ", ".join(slot.name for slot in given) or "none"
            raise UsageError(f"A server needs one name or more, each once, and was given {names}. Name each once.")
        self.first: Slot = given[0]
        self.on_demand = on_demand
        self._registry = registry
        self._marks: dict[str, tuple[int, ...] | None] = {}

    def __iter__(self) -> Iterator[Slot]:
        """Every slot that is open."""
        yield from self._given.values()
        if self.on_demand is not None:
            yield from self.on_demand.slots()

    @property
    def needed(self) -> list[Slot]:
        """Those without which this server isn't ready: what it was given by name."""
        return list(self._given.values()) if self.on_demand is None else []

    def get(self, key: str) -> Slot | None:
        """The open slot of a name, or of a version that is served by itself."""
        return self._given.get(key) or (self.on_demand.get(key) if self.on_demand is not None else None)

    def of(self, tenant: str) -> list[Slot]:
        """The open slots of a tenant; what others have does not exist for it."""
        return [slot for slot in self if split_name(slot.name)[0] == tenant]

    def loaded(self, tenant: str) -> list[Slot]:
        """Those of them that answer."""
        return [slot for slot in self.of(tenant) if slot.current is not None]

    async def versions(self, tenant: str) -> list[Version]:
        """The versions that answer for a tenant's names, or would if they were asked."""
        own = [slot.current.version for slot in self.loaded(tenant) if slot.current is not None]
        if self._registry is None or self.on_demand is None:
            return own
        champions = await anyio.to_thread.run_sync(self._champions, tenant)
        return [*champions, *(version for version in own if version not in champions)]

    async def load(self, key: str) -> Slot:
        """The slot of a name, or of a version of it (`name@version`), loaded if need be.

        Raises:
            NotFound: If it was not given to this server and cannot be loaded on demand, or has no champion.
            NightschoolError: Why it cannot be served.
        """
        slot = self._given.get(key)
        if slot is not None and (slot.current is not None or self.on_demand is None):
            return slot
        if self.on_demand is None:
            raise NotFound(f"{key!r} is not served here. Name it when you start the server.")
        if slot is not None:
            await anyio.to_thread.run_sync(slot.refresh)
            return slot
        try:
            return await self.on_demand.load(key)
        except NotFound:
            raise NotFound(f"{key!r} has no promoted version to be loaded. Promote one.") from None
        except SwapFailed as error:
            # Where the home lies is nobody's business over HTTP.
            where = f"{self._registry.home.path}/" if self._registry is not None else ""
            raise SwapFailed(error.stage, error.reason.replace(where, "")) from error

    async def unload(self, key: str) -> bool:
        """Close the slot of a name, or of a version, once it has answered what it took. Returns whether it was open.

        Raises:
            Conflict: If the server was given this name at its start.
        """
        if key in self._given:
            raise Conflict(f"{key!r} was named when the server was started, and stays loaded. Stop the server.")
        return self.on_demand is not None and await self.on_demand.unload(key)

    async def find(self, model: str | None, principal: Principal) -> Slot:
        """The slot that `model` means: a name, `name@champion`, or `name@version`; loaded on demand if it may be.

        The name is the tenant's own, with or without `tenant/` before it. A server of given names answers for the
        versions that it serves now; one on demand loads any version that there is.

        Raises:
            Refusal: 404 if there is none for this tenant; the message names what there is.
            NotLoaded: If nothing was named, and there is nothing yet.
            NightschoolError: Why it cannot be loaded.
        """
        slot = self._open(model, principal)
        if slot is None and self.on_demand is not None:
            key = await anyio.to_thread.run_sync(self._key, model, principal)
            slot = await self.load(key)
        if slot is None:
            raise self._unknown(model, principal)
        return slot

    async def resolve(
        self, model: str | None, principal: Principal, owner: str | None = None
    ) -> tuple[Generation, Binding]:
        """What answers a request for `model`, bound to who asks. With `owner`, it is a name of that tenant.

        Raises:
            Refusal, NotLoaded, NightschoolError: As `find`.
            NotLoaded: If no version of the name is loaded.
        """
        slot = await (self.find(model, principal) if owner is None else self._shared(model, principal, owner))
        generation = slot.current
        if generation is None:
            raise NotLoaded(f"No version of {slot.name!r} is served. Promote one, or wait until it is loaded.")
        return generation, generation.binding.of(principal.tenant, principal.key)

    def moved(self) -> list[Slot]:
        """The open slots whose champion may have moved since the last call, or that are new: one `stat` for each."""
        if self._registry is None:
            return []
        slots = list(self)
        marks = {slot.name: self._registry.mark(slot.name) for slot in slots}
        before, self._marks = self._marks, marks
        return [slot for slot in slots if marks[slot.name] != before.get(slot.name)]

    async def close(self) -> None:
        """Close every slot; what they were answering ends as cancelled."""
        if self.on_demand is not None:
            await self.on_demand.close()
        for slot in self._given.values():
            await anyio.to_thread.run_sync(slot.close)

    async def _shared(self, model: str | None, principal: Principal, owner: str) -> Slot:
        """The slot of another tenant's name. Of what else that tenant has, no message tells."""
        try:
            return await self.find(model, replace(principal, tenant=owner))
        except SwapFailed as error:
            raise NotLoaded(f"The model {model!r} could not be loaded; its owner may hear why.") from error
        except (Refusal, NotFound):
            raise self._unknown(model, principal) from None

    def _open(self, model: str | None, principal: Principal) -> Slot | None:
        """The open slot that `model` means, without a look at the disk."""
        if model is None:
            own = [slot for slot in self._given.values() if split_name(slot.name)[0] == principal.tenant]
            return next((slot for slot in own if slot.current is not None or self.on_demand is None), None)
        name, at, pointer = model.partition("@")
        own_name = _own(name, principal.tenant)
        slot = self.get(own_name) if own_name is not None else None
        if slot is None or (at and not pointer) or (slot.current is None and self.on_demand is not None):
            return None
        current = slot.current
        if pointer in ("", CHAMPION) or (current is not None and pointer == current.version.id):
            return slot
        return None if self.on_demand is None else self.on_demand.get(f"{own_name}@{pointer}")

    def _key(self, model: str | None, principal: Principal) -> str:
        """The key of what `model` means in the registry."""
        assert self._registry is not None, "a server on demand has a registry"
        tenant = principal.tenant
        if model is None:
            names = [version.name for version in self._champions(tenant)]
            if not names:
                raise NotLoaded("Nothing was promoted yet. Train a model and promote it, or add one.")
            preferred = full_name(tenant, DEFAULT_NAME)
            if len(names) == 1 or preferred in names:
                return preferred if preferred in names else names[0]
            raise Refusal(
                404, f"Several models are here. Name one of {', '.join(names)}.", "model_not_found", param="model"
            )
        name, at, pointer = model.partition("@")
        own = _own(name, tenant)
        if own is None or (at and not pointer) or not self._registry.versions(own):
            raise self._unknown(model, principal)
        try:
            version = self._registry.resolve(f"{own}@{pointer or CHAMPION}")
        except (NotFound, NameRefused) as error:
            raise Refusal(404, str(error), "model_not_found", param="model") from None
        if pointer in ("", CHAMPION):  # whichever it is by the time it is loaded
            return own
        champion = self._registry.champion(own)
        return own if champion is not None and champion.id == version.id else version.ref

    def _champions(self, tenant: str) -> list[Version]:
        assert self._registry is not None, "a server on demand has a registry"
        found = [self._registry.champion(name) for name in self._registry.names(tenant)]
        return [version for version in found if version is not None]

    def _unknown(self, model: str | None, principal: Principal) -> Refusal:
        if self.on_demand is None:
            slots = self.of(principal.tenant)
            names = [slot.name for slot in slots]
            there_is = [slot.name if slot.current is None else slot.current.version.ref for slot in slots]
        else:
            names = there_is = [version.name for version in self._champions(principal.tenant)]
        what = "No model of yours is served here" if model is None else f"The model {model[:200]!r} is not served here"
        return Refusal(
            404,
            f"{what}. There is {', '.join(there_is) or 'none'}: "
            f"ask for {' or '.join(map(repr, names)) or 'one to be served'}.",
            "model_not_found",
            param="model",
        )


def _own(name: str, tenant: str) -> str | None:
    """The full name that a tenant means by `name` or `tenant/name`; None if it cannot be one of its own."""
    try:
        owner, bare = split_name(name if "/" in name else full_name(tenant, name))
    except NameRefused:
        return None
    return full_name(owner, bare) if owner == tenant else None
