"""Whose a key is: keys of the settings, which a process holds from its start, and keys of the database."""

from __future__ import annotations

import hmac
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Literal

from nightschool.events import now
from nightschool.server.middleware.lookups import Lookup
from nightschool.server.settings import ServerSettings
from nightschool.store.api_keys import KEY_PREFIX, ApiKeys, StoredKey, digest_of
from nightschool.store.principal import Principal


class Keyring:
    """Knows the principal of a key, as both kinds make it.

    Args:
        settings: Their keys count for as long as the process lives.
        stored: The keys of the database; None where there is none.
        thread: Where the database is asked.
    """

    def __init__(
        self,
        settings: ServerSettings,
        stored: ApiKeys | None,
        thread: ThreadPoolExecutor,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._settings: dict[str, Principal] = {}
        for key in settings.api_keys:
            digest = digest_of(key.key.get_secret_value())
            self._settings[digest] = Principal(key.tenant, key.scopes, digest, f"settings:{digest[:8]}")
        self._stored: Lookup[str, StoredKey] | None = None
        self._any: Lookup[None, Literal["some", "none"]] | None = None
        if stored is not None:
            self._stored = Lookup(stored.find, thread, clock)
            self._any = Lookup(lambda _: "some" if stored.any() else "none", thread, clock)
        self._needed = bool(self._settings)

    @property
    def was_needed(self) -> bool:
        """The same as `is_needed` as far as it is known, without asking the database."""
        return self._needed

    async def is_needed(self) -> bool:
        """Whether who asks must have a key: there is one, or there was one once.

        Once there is one it stays so: a revoked key does not open the door to those who have none.

        Raises:
            Refusal: 503 if the database does not say.
        """
        if not self._needed and self._any is not None:
            self._needed = await self._any.get(None) == "some"
        return self._needed

    async def principal_of(self, key: str) -> Principal | None:
        """Who asks with a key; None if it is unknown, revoked or expired.

        Raises:
            Refusal: 503 if the database does not say.
        """
        digest = digest_of(key)
        # Each is compared in constant time, so that timing says nothing about any of them.
        matches = [who for known, who in self._settings.items() if hmac.compare_digest(digest, known)]
        if matches:
            return matches[0]
        # Other keys are not asked for: clients of servers without keys send any text.
        if self._stored is None or not key.startswith(KEY_PREFIX):
            return None
        found = await self._stored.get(digest)
        if found is None:
            return None
        self._needed = True
        if not found.is_active(now()):
            return None
        return Principal(found.tenant, found.scopes, digest, found.id)
