"""What the rooms before the app ask of the database, and write there: keys, quotas, use, the audit log."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime
from functools import partial

from nightschool.events import now
from nightschool.server.middleware.keyring import Keyring
from nightschool.server.middleware.lookups import Lookup
from nightschool.server.settings import ServerSettings
from nightschool.store.api_keys import KEY_ID_PREFIX, ApiKeys
from nightschool.store.audit import AuditLog
from nightschool.store.database import Database
from nightschool.store.principal import Principal
from nightschool.store.tenants import UNBOUNDED, Quota, Tenants, Usage, day_of

log = logging.getLogger("nightschool.server.access_store")

_WRITE_SECONDS = 1.0
_USE_SECONDS = 60.0


class AccessStore:
    """One thread reads, so that every request may ask; another writes, which may have to wait for others that write.

    Args:
        settings: Their keys count besides those of the database.
        database: None where the server has no home: then nobody has bounds, and nothing is counted.
    """

    def __init__(
        self, settings: ServerSettings, database: Database | None, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._reading = ThreadPoolExecutor(1, thread_name_prefix="keys")
        self._writing = ThreadPoolExecutor(1, thread_name_prefix="use")
        self._clock = clock
        self.keyring = Keyring(settings, ApiKeys(database) if database else None, self._reading, clock)
        self._database = database
        self._used: dict[tuple[str, str], Usage] = {}
        self._keys_used: dict[str, datetime] = {}
        self._keys_noted: dict[str, float] = {}
        self._timer: asyncio.TimerHandle | None = None
        if database is not None:
            self._quotas = Lookup(Tenants(database).quota, self._reading, clock)
            self._stored_use = Lookup(partial(_used_on, Tenants(database)), self._reading, clock)

    async def quota(self, tenant: str) -> Quota:
        """What a tenant may use. Raises Refusal (503) if the database does not say."""
        return UNBOUNDED if self._database is None else await self._quotas.get(tenant) or UNBOUNDED

    async def generated_today(self, tenant: str) -> int:
        """The tokens generated for a tenant since midnight, by all servers. Raises Refusal (503) likewise."""
        day = day_of(now())
        stored = None if self._database is None else await self._stored_use.get((tenant, day))
        return (stored or Usage()).generated_tokens + self._used.get((tenant, day), Usage()).generated_tokens

    def count(self, principal: Principal, used: Usage) -> None:
        """Write soon what a request with a key has used."""
        if self._database is None or principal.key_id is None:
            return
        place = (principal.tenant, day_of(now()))
        self._used[place] = self._used.get(place, Usage()) + used
        if principal.key_id.startswith(KEY_ID_PREFIX):
            noted = self._keys_noted.get(principal.key_id)
            if noted is None or self._clock() - noted >= _USE_SECONDS:
                self._keys_noted[principal.key_id] = self._clock()
                self._keys_used[principal.key_id] = now()
        if self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(_WRITE_SECONDS, self._write)

    def _write(self) -> asyncio.Future[None]:
        self._timer = None
        used, keys = dict(self._used), dict(self._keys_used)
        writing = asyncio.get_running_loop().run_in_executor(self._writing, self._write_now, used, keys)
        writing.add_done_callback(partial(self._written, used, keys))
        return writing

    def _write_now(self, used: dict[tuple[str, str], Usage], keys: dict[str, datetime]) -> None:
        assert self._database is not None
        Tenants(self._database).count(used)
        if keys:
            ApiKeys(self._database).note_use(keys)

    def _written(
        self, used: dict[tuple[str, str], Usage], keys: dict[str, datetime], done: asyncio.Future[None]
    ) -> None:
        if not done.cancelled() and (error := done.exception()) is not None:
            # It stays in memory and goes with the next one.
            log.error("what tenants used could not be written", extra={"facts": {"error": str(error)}})
            return
        for place, written in used.items():
            rest = self._used[place] - written
            if rest == Usage():
                del self._used[place]
            else:
                self._used[place] = rest
            self._stored_use.forget(place)
        for key_id in keys:
            self._keys_used.pop(key_id, None)

    async def audit(self, action: str, target: str, principal: Principal, request_id: str) -> None:
        """Write a row of the audit log before the answer goes out; one that cannot be written is logged instead."""
        if self._database is None:
            return
        record = partial(
            AuditLog(self._database).record,
            action,
            target,
            tenant=principal.tenant,
            by="http",
            key_id=principal.key_id,
            request_id=request_id,
        )
        try:
            await asyncio.get_running_loop().run_in_executor(self._writing, record)
        except Exception as error:  # what was done is done, and must not look as if it were not
            facts = {"action": action, "target": target, "key_id": principal.key_id, "error": str(error)}
            log.error("the audit log could not be written", extra={"facts": facts})

    async def close(self) -> None:
        """Write what is left."""
        if self._timer is not None:
            self._timer.cancel()
            await asyncio.wait([self._write()])
        for thread in (self._reading, self._writing):
            await asyncio.to_thread(thread.shutdown)


def _used_on(tenants: Tenants, place: tuple[str, str]) -> Usage:
    return tenants.used(*place)
