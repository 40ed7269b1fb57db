"""The names that one server answers for, and the one way from a request's `model` to what answers it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from nightschool.engine.binding import Binding
from nightschool.engine.pool import Generation
from nightschool.engine.slot import Slot
from nightschool.errors import NotLoaded, UsageError
from nightschool.server.errors import Refusal
from nightschool.store.names import full_name, split_name
from nightschool.store.principal import Principal


class ServedNames:
    """Slots by name, in the order in which they were given; who names no model is answered by the first.

    Raises:
        UsageError: If there is no name, or one is given twice.
    """

    def __init__(self, slots: Sequence[Slot]) -> None:
        self._slots = {slot.name: slot for slot in slots}
        if not slots or len(self._slots) < len(slots):
            given = ", ".join(slot.name for slot in slots) or "none"
            raise UsageError(f"A server needs one name or more, each once, and was given {given}. Name each once.")
        self.first: Slot = slots[0]

    def __iter__(self) -> Iterator[Slot]:
        return iter(self._slots.values())

    def __len__(self) -> int:
        return len(self._slots)

    def get(self, name: str) -> Slot | None:
        """The slot of a name, if this server serves it."""
        return self._slots.get(name)

    def of(self, principal: Principal) -> list[Slot]:
        """The slots of the tenant that asks; what others have does not exist for it."""
        return [slot for slot in self if split_name(slot.name)[0] == principal.tenant]

    def slot_of(self, model: str | None, principal: Principal) -> Slot:
        """The slot that `model` means: a name, `name@champion`, or `name@version` of the version served now.

        The name is the tenant's own, with or without `tenant/` before it.

        Raises:
            Refusal: 404 if this server does not serve it to this tenant; the message names what it serves.
        """
        own = {slot.name: slot for slot in self.of(principal)}
        if model is None and own:
            return next(iter(own.values()))
        name, _, version = (model or "").partition("@")
        slot = own.get(name) or own.get(full_name(principal.tenant, name))
        current = slot.current if slot is not None else None
        is_served = version in ("", "champion") or (current is not None and version == current.version.id)
        if slot is None or model is None or not is_served or model.endswith("@"):
            loaded = [other.name if other.current is None else other.current.version.ref for other in own.values()]
            raise Refusal(
                404,
                f"The model {(model or '')[:200]!r} is not served here. There is {', '.join(loaded) or 'none'}: "
                f"ask for {' or '.join(repr(other) for other in own) or 'one to be served'}.",
                "model_not_found",
                param="model",
            )
        return slot

    def resolve(self, model: str | None, principal: Principal) -> tuple[Generation, Binding]:
        """What answers a request for `model`, bound to who asks.

        Raises:
            Refusal: 404, as `slot_of`.
            NotLoaded: If no version of the name is loaded.
        """
        slot = self.slot_of(model, principal)
        generation = slot.current
        if generation is None:
            raise NotLoaded(f"No version of {slot.name!r} is served. Promote one, or wait until it is loaded.")
        return generation, generation.binding.of(principal.tenant, principal.key)
