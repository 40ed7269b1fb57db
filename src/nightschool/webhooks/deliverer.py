"""The thread that sends what is due. Every server and every worker has one; leases keep them out of each other's way."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

from nightschool.errors import Unreachable, UsageError
from nightschool.store.database import Database
from nightschool.webhooks.deliveries import Deliveries, Delivery
from nightschool.webhooks.endpoints import Endpoint
from nightschool.webhooks.sender import send

log = logging.getLogger("nightschool.webhooks")
_LOOK_SECONDS = 1.0
_SWEEP_SECONDS = 3600.0
_THREADS = 8


@contextmanager
def delivering(database: Database) -> Iterator[None]:
    """Send what is due as long as the block runs."""
    deliverer = Deliverer(database).start()
    try:
        yield
    finally:
        deliverer.stop()


class Deliverer:
    """Sends from `start` until `stop`. What is on its way then is waited for, at most as long as one attempt takes."""

    def __init__(self, database: Database, *, look_seconds: float = _LOOK_SECONDS) -> None:
        self._deliveries = Deliveries(database)
        self._look_seconds = look_seconds
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="webhooks", daemon=True)

    def start(self) -> Deliverer:
        """Begin. Returns itself."""
        self._thread.start()
        return self

    def stop(self) -> None:
        """End after what is on its way."""
        self._stopping.set()
        if self._thread.is_alive():
            self._thread.join()

    def _run(self) -> None:
        sweep_at = time.monotonic()
        with ThreadPoolExecutor(_THREADS, thread_name_prefix="webhook") as threads:
            while not self._stopping.is_set():
                try:
                    if time.monotonic() >= sweep_at:
                        self._deliveries.sweep()
                        sweep_at = time.monotonic() + _SWEEP_SECONDS
                    due = self._deliveries.claim()
                    list(threads.map(lambda pair: self._deliver(*pair), due))
                except (
                    Exception
                ) as error:  # a full disk or a database that is away ends some day, and the rows are there then
                    log.warning("webhooks wait", extra={"facts": {"error": str(error)}})
                    due = []
                if not due:
                    self._stopping.wait(self._look_seconds)

    def _deliver(self, delivery: Delivery, endpoint: Endpoint) -> None:
        try:
            reply = send(endpoint, delivery.event_id, delivery.body)
        except (UsageError, Unreachable) as error:
            self._deliveries.note(delivery, status=None, error=str(error))
            return
        why = None if reply.is_taken else f"answered {reply.status}"
        if 300 <= reply.status < 400:
            why = f"answered {reply.status}, and redirects are not followed"
        self._deliveries.note(delivery, status=reply.status, error=why, wait_seconds=reply.retry_after_seconds)
