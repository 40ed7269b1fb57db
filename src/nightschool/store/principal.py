"""Who asks: a tenant, and what it may do. Keys make it (see server/middleware/auth.py); the command line is `LOCAL`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

DEFAULT_TENANT = "default"
"""The tenant of whatever names none. It is never shown."""

Scope = Literal["generate", "feedback", "manage"]
SCOPES: frozenset[Scope] = frozenset(get_args(Scope))
"""`generate` asks models, `feedback` rates and corrects their answers, `manage` moves aliases and swaps what is served."""


@dataclass(frozen=True)
class Principal:
    """Whose names are meant (`tenant`), and what may be done with them (`scopes`, some of `SCOPES`).

    `key` is the digest of the API key that was sent, which tells the askers of one tenant apart; None without keys.
    """

    tenant: str
    scopes: frozenset[Scope]
    key: str | None = None

    def __post_init__(self) -> None:
        unknown = self.scopes - SCOPES
        if unknown:
            raise ValueError(f"there is no scope {', '.join(sorted(unknown))}; scopes are {', '.join(sorted(SCOPES))}")


LOCAL = Principal(DEFAULT_TENANT, SCOPES)
"""The command line, and everybody who asks a server without keys: it answers on this machine alone."""
