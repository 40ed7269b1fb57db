"""Where webhooks may be sent: to https addresses that everybody can reach.

A server that posts to any address that a tenant names would reach, for the tenant, what only the server can reach: cloud
metadata, databases, other services behind the firewall. So a name is resolved once, every address that it has must be
public, and the connection is made to the address that was looked at: a name that resolves otherwise a moment later gains nothing.
"""

from __future__ import annotations

import ipaddress
import os
import socket
from collections.abc import Mapping
from dataclasses import dataclass
from urllib.parse import urlsplit

from nightschool.errors import Unreachable, UsageError

HOSTS_VARIABLE = "NIGHTSCHOOL_WEBHOOK_HOSTS"
"""Hosts inside of the operator's own network to which webhooks may go, also over http; separated by commas."""
_MOST_CHARACTERS = 2048
# Addresses of the old Internet as networks without it write them (RFC 6052).
_NAT64 = ipaddress.IPv6Network("64:ff9b::/96")


@dataclass(frozen=True)
class Target:
    """A checked address: where to connect to (`ip`), and what to ask for there."""

    scheme: str
    host: str
    port: int
    ip: str
    request_target: str


def check_url(url: str, *, env: Mapping[str, str] | None = None) -> None:
    """Refuse what no webhook may be sent to. A name that cannot be resolved now may be resolved later.

    Raises:
        UsageError: If it is no https address, or leads into a network that is not public.
    """
    try:
        resolve(url, env=env)
    except Unreachable:
        return


def resolve(url: str, *, env: Mapping[str, str] | None = None) -> Target:
    """Look up where a webhook goes.

    Raises:
        UsageError: As `check_url` does.
        Unreachable: If its name has no address.
    """
    allowed = {
        host.strip().lower() for host in (os.environ if env is None else env).get(HOSTS_VARIABLE, "").split(",") if host
    }
    try:
        parts = urlsplit(url)
        host, port = parts.hostname or "", parts.port
    except ValueError:
        raise _refused(url, "it is not an address") from None
    trusted = host in allowed
    if len(url) > _MOST_CHARACTERS or not url.isascii() or not url.isprintable() or " " in url:
        raise _refused(url, f"it is longer than {_MOST_CHARACTERS} characters, or holds a space or no ASCII")
    if not host or parts.scheme not in (("https", "http") if trusted else ("https",)):
        raise _refused(url, "it does not begin with https:// and a host")
    if parts.username is not None or parts.password is not None or parts.fragment:
        raise _refused(url, "it holds a user, a password or a fragment")
    port = port or (443 if parts.scheme == "https" else 80)
    try:
        found = {info[4][0] for info in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)}
    except (OSError, UnicodeError):
        raise Unreachable(f"The name {host} has no address.") from None
    ips = sorted(str(ip) for ip in found)
    if not trusted and not all(_is_public(ip) for ip in ips):
        raise _refused(url, f"{host} is in a network that is not public; an operator may allow it in {HOSTS_VARIABLE}")
    target = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
    return Target(parts.scheme, host, port, ips[0], target)


def _is_public(ip: str) -> bool:
    address = ipaddress.ip_address(ip.partition("%")[0])
    # What is meant by addresses that carry another one inside is that other one.
    if isinstance(address, ipaddress.IPv6Address):
        inside = address.ipv4_mapped or address.sixtofour
        if address in _NAT64:
            inside = ipaddress.IPv4Address(address.packed[-4:])
        address = inside or address
    return address.is_global and not (address.is_multicast or address.is_reserved)


def _refused(url: str, why: str) -> UsageError:
    return UsageError(f"Nothing can be sent to {url[:200]!r}: {why}. Name a public https address.")
