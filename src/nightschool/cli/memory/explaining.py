"""Why a model answers as it does with a memory, for a client that asks again and again: the model stays loaded."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any

from nightschool.errors import UsageError
from nightschool.store.home import Home
from nightschool.store.names import full_name, split_name
from nightschool.store.registry import Registry

if TYPE_CHECKING:
    from nightschool.engine.local_model import LocalModel


class Explaining:
    """Loads a model when it is first asked, and gives it back when another one is, or at the end.

    Args:
        home: Where memory and models are.
        memory: The memory that is read.
        model: What is asked where nobody names a model.
    """

    def __init__(self, home: Home, memory: str, model: str | None) -> None:
        self._home, self._memory, self._model = home, memory, model
        self._tenant, _ = split_name(memory)
        self._loaded: tuple[str, LocalModel] | None = None
        self._lock = threading.Lock()

    def __call__(self, question: str, model: str | None, max_new_tokens: int) -> dict[str, Any]:
        """What `nightschool memory why --json` says.

        Raises:
            UsageError: If no model is named, or the one that a client names is none of this home's; the message names those.
            NightschoolError: Why the model cannot be loaded, or cannot be asked.
        """
        from nightschool.engine.why import explained_answer

        with self._lock:
            return explained_answer(self._loaded_as(self._ref(model)), question, max_new_tokens).to_json()

    def close(self) -> None:
        """Give the model back."""
        if self._loaded is not None:
            self._loaded[1].close()
            self._loaded = None

    def _ref(self, asked: str | None) -> str:
        # Whoever starts the command may load what they like; what a client says goes no further than this home's versions.
        if asked is None or asked == self._model:
            if self._model is None:
                raise UsageError(
                    f"why asks a model, and none is named. Start `nightschool memory mcp {self._memory} --model NAME`, or name one in "
                    f"model. {self._there_is()}"
                )
            return self._model
        names = self._names()
        own = asked if asked.partition("@")[0] in names else full_name(self._tenant, asked)
        if own.partition("@")[0] not in names:
            raise UsageError(f"There is no model {asked[:80]!r} here. {self._there_is()}")
        return own

    def _names(self) -> list[str]:
        return Registry(self._home).names(self._tenant)

    def _there_is(self) -> str:
        names = ", ".join(self._names())
        return f"There is {names}." if names else "This home has none yet: nightschool models add NAME PATH."

    def _loaded_as(self, ref: str) -> LocalModel:
        from nightschool.engine.local_model import LocalModel
        from nightschool.engine.recall import MemoryChoice

        if self._loaded is None or self._loaded[0] != ref:
            self.close()
            self._loaded = ref, LocalModel(self._home, ref, memory=MemoryChoice(self._memory))
        return self._loaded[1]
