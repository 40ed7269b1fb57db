"""Who asks: a tenant, and what it may do. Keys make it (see server/middleware/keyring.py); the command line is `LOCAL`."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal, cast, get_args

DEFAULT_TENANT = "default"
"""The tenant of whatever names none. It is never shown."""

Scope = Literal["infer", "feedback", "train", "memory", "admin"]
SCOPES: frozenset[Scope] = frozenset(get_args(Scope))
"""`infer` asks models, `feedback` rates, corrects and deletes answers, `train` starts and cancels jobs, `memory` changes
memories, `admin` moves aliases and swaps what is served."""
OLD_SCOPES: dict[str, Scope] = {"generate": "infer", "manage": "admin"}
"""What files of keys called two of them before."""


def parse_scopes(words: Iterable[str]) -> frozenset[Scope]:
    """The scopes of these names, old names included.

    Raises:
        ValueError: If one is no scope, or there is none.
    """
    scopes = frozenset(OLD_SCOPES.get(word, word) for word in words)
    unknown = scopes - SCOPES
    if unknown or not scopes:
        wrong = ", ".join(sorted(unknown)) or "none"
        raise ValueError(f"there is no scope {wrong}; scopes are {', '.join(sorted(SCOPES))}")
    return cast("frozenset[Scope]", scopes)


@dataclass(frozen=True)
class Principal:
    """Whose names are meant (`tenant`), and what may be done with them (`scopes`, some of `SCOPES`).

    `key` is the digest of the API key that was sent, which tells the askers of one tenant apart; None without keys.
    `key_id` is how people name that key; it opens nothing.
    """

    tenant: str
    scopes: frozenset[Scope]
    key: str | None = None
    key_id: str | None = None

    def __post_init__(self) -> None:
        unknown = self.scopes - SCOPES
        if unknown:
            raise ValueError(f"there is no scope {', '.join(sorted(unknown))}; scopes are {', '.join(sorted(SCOPES))}")


LOCAL = Principal(DEFAULT_TENANT, SCOPES)
"""The command line, and everybody who asks a server without keys: it answers on this machine alone."""
