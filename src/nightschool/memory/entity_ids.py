"""Whose a memory is, where programs keep many users, agents, apps and runs apart by ids: each exact set of ids has a memory of its own.

What supersedes what, what is found, and what a model reads are all decided within one memory, so what is said of one user ends nothing of
another's and is read for nobody else, without a filter that some reader could forget. It lies over the memory that it is named after as any
other overlay does (`memory.layers`).
"""

from __future__ import annotations

import re
from dataclasses import astuple, dataclass
from hashlib import blake2b
from urllib.parse import parse_qsl, urlencode

from nightschool.errors import UsageError

MOST_SOURCE_CHARACTERS = 1000
_DIGEST_BYTES = 8
_OF_IDS = re.compile(rf"-[0-9a-f]{{{2 * _DIGEST_BYTES}}}")


@dataclass(frozen=True)
class EntityIds:
    """Ids of a user, an agent, an app and a run. All None is the memory itself."""

    user_id: str | None = None
    agent_id: str | None = None
    app_id: str | None = None
    run_id: str | None = None

    def __bool__(self) -> bool:
        return any(one is not None for one in astuple(self))

    def to_json(self) -> dict[str, str | None]:
        return dict(vars(self))

    def memory(self, name: str) -> str:
        """What the memory of these ids is called, beside the memory `name`: its name, and a digest of the ids."""
        if not self:
            return name
        digest = blake2b(self._written().encode(), digest_size=_DIGEST_BYTES).hexdigest()
        return f"{name}-{digest}"

    def source(self, program: str) -> str:
        """The source of entries that a program writes for these ids, from which `ids_of` reads them.

        Raises:
            UsageError: If the ids are too long for it.
        """
        source = f"{program}?{self._written()}" if self else program
        if len(source) > MOST_SOURCE_CHARACTERS:
            raise UsageError(
                f"The ids have {len(source)} characters, written as a source, and an entry keeps {MOST_SOURCE_CHARACTERS}. "
                "Send shorter ids."
            )
        return source

    def _written(self) -> str:
        # The same order, whatever order they were given in.
        return urlencode({kind: one for kind, one in vars(self).items() if one is not None})


KINDS = tuple(vars(EntityIds()))


def ids_of(source: str) -> EntityIds:
    """The ids that a source names; none of a source that `EntityIds.source` did not write."""
    named = dict(parse_qsl(source.partition("?")[2]))
    return EntityIds(**named) if named and named.keys() <= set(KINDS) else EntityIds()


def is_of(memory: str, name: str) -> bool:
    """Whether a memory is `name` itself, or that of some ids beside it."""
    return memory == name or (memory.startswith(name) and _OF_IDS.fullmatch(memory, len(name)) is not None)
