"""The states of entries that were computed lately, by their tokens: what an entry says now has other tokens than what it said."""

from __future__ import annotations

from collections import OrderedDict

from torch import Tensor

Text = tuple[int, ...]


class EntryStates:
    """Of those that were asked for last, as many as fit. For one thread.

    Args:
        most_bytes: So much is kept at most; 0 keeps nothing.
    """

    def __init__(self, most_bytes: int) -> None:
        self._most_bytes = most_bytes
        self._states: OrderedDict[Text, Tensor] = OrderedDict()
        self.num_bytes = 0

    def __len__(self) -> int:
        return len(self._states)

    def get(self, text: Text) -> Tensor | None:
        """The states of an entry's tokens, if they are still kept."""
        found = self._states.get(text)
        if found is not None:
            self._states.move_to_end(text)
        return found

    def clear(self) -> None:
        """Let go of all of them."""
        self._states.clear()
        self.num_bytes = 0

    def keep(self, text: Text, states: Tensor) -> None:
        """Keep the states of an entry, and let go of those that were not asked for in the longest time. One that is too large is not kept."""
        if states.nbytes > self._most_bytes or text in self._states:
            return
        # A part of a larger tensor would keep all of that alive.
        self._states[text] = states.clone()
        self.num_bytes += states.nbytes
        while self.num_bytes > self._most_bytes:
            self.num_bytes -= self._states.popitem(last=False)[1].nbytes
