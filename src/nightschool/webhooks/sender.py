"""Send one signed event: Standard Webhooks (https://www.standardwebhooks.com), which OpenAI's clients verify."""

from __future__ import annotations

import http.client
import socket
import ssl
from dataclasses import dataclass
from functools import cache

from standardwebhooks.webhooks import Webhook

from nightschool import __version__
from nightschool.errors import Unreachable
from nightschool.events import now
from nightschool.webhooks.address import Target, resolve
from nightschool.webhooks.endpoints import Endpoint

TIMEOUT_SECONDS = 15.0


@dataclass(frozen=True)
class Reply:
    """What an endpoint answered: `status`, and how many seconds it asks to be left alone."""

    status: int
    retry_after_seconds: float = 0.0

    @property
    def is_taken(self) -> bool:
        return 200 <= self.status < 300


def send(endpoint: Endpoint, event_id: str, body: str) -> Reply:
    """Post an event to an endpoint and return what it answered. Redirects are answers, and are not followed.

    Raises:
        UsageError: If the address leads into a network that is not public.
        Unreachable: If there was no answer.
    """
    target = resolve(endpoint.url)
    moment = now()
    signatures = [Webhook(secret).sign(event_id, moment, body) for secret in endpoint.signing_secrets(moment)]
    headers = {
        "content-type": "application/json",
        "user-agent": f"nightschool/{__version__}",
        "webhook-id": event_id,
        "webhook-timestamp": str(int(moment.timestamp())),
        "webhook-signature": " ".join(signatures),
        "connection": "close",
    }
    connection = _connection(target)
    try:
        connection.request("POST", target.request_target, body.encode(), headers)
        # What it writes back is of no interest, so it is not read: it might never end.
        answer = connection.getresponse()
        return Reply(answer.status, _seconds(answer.headers.get("retry-after", "")))
    except (OSError, http.client.HTTPException) as error:
        raise Unreachable(f"{target.host} did not answer ({type(error).__name__}: {error}).") from error
    finally:
        connection.close()


class _Pinned(http.client.HTTPConnection):
    """A connection to the address that was looked at, whatever its name resolves to by now."""

    def __init__(self, target: Target) -> None:
        super().__init__(target.host, target.port, timeout=TIMEOUT_SECONDS)
        self._target = target

    def connect(self) -> None:
        sock = socket.create_connection((self._target.ip, self._target.port), TIMEOUT_SECONDS)
        if self._target.scheme == "https":
            try:
                sock = _tls().wrap_socket(sock, server_hostname=self._target.host)
            except BaseException:
                sock.close()
                raise
        self.sock = sock


def _connection(target: Target) -> _Pinned:
    connection = _Pinned(target)
    if target.scheme == "https":
        connection.default_port = 443  # so that the Host header leaves it out
    return connection


@cache
def _tls() -> ssl.SSLContext:
    return ssl.create_default_context()


def _seconds(retry_after: str) -> float:
    return float(retry_after) if retry_after.isascii() and retry_after.isdigit() and len(retry_after) < 7 else 0.0
