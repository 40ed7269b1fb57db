"""Webhooks go to public https addresses, and nowhere that only this server can reach."""

from __future__ import annotations

import socket

import pytest

from nightschool.errors import Unreachable, UsageError
from nightschool.webhooks.address import HOSTS_VARIABLE, check_url, resolve


@pytest.fixture
def names(monkeypatch):
    """What names resolve to."""
    table = {"example.org": ["93.184.216.34"]}

    def look_up(host, port, **_):
        if host in table:
            return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (ip, port)) for ip in table[host]]
        try:
            socket.inet_pton(socket.AF_INET6 if ":" in host else socket.AF_INET, host)
        except OSError:
            raise socket.gaierror(socket.EAI_NONAME, "no such name") from None
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (host, port))]

    monkeypatch.setattr(socket, "getaddrinfo", look_up)
    return table


def test_a_public_https_address_is_taken_apart(names):
    target = resolve("https://example.org:8443/a/b?c=d", env={})
    assert (target.host, target.port, target.ip, target.request_target) == (
        "example.org",
        8443,
        "93.184.216.34",
        "/a/b?c=d",
    )
    assert resolve("https://example.org", env={}).request_target == "/"


@pytest.mark.parametrize(
    "ip",
    [
        "127.0.0.1",
        "10.1.2.3",
        "172.16.0.1",
        "192.168.1.1",
        "169.254.169.254",
        "100.64.0.1",
        "0.0.0.0",
        "224.0.0.1",
        "255.255.255.255",
        "::1",
        "::",
        "fe80::1",
        "fd00::1",
        "ff02::1",
        "::ffff:10.0.0.1",
        "::ffff:169.254.169.254",
        "2002:0a00:0001::1",
        "64:ff9b::a00:1",
        "::10.0.0.1",
    ],
)
def test_what_only_this_server_can_reach_is_refused_by_address_and_by_name(names, ip):
    literal = f"[{ip}]" if ":" in ip else ip
    with pytest.raises(UsageError, match="not public"):
        resolve(f"https://{literal}/x", env={})
    names["rebound.example.org"] = ["93.184.216.34", ip]
    with pytest.raises(UsageError, match="not public"):
        resolve("https://rebound.example.org/x", env={})


@pytest.mark.parametrize(
    "url",
    [
        "http://example.org/",
        "ftp://example.org/",
        "file:///etc/passwd",
        "https://",
        "https:///path",
        "example.org",
        "https://user:password@example.org/",
        "https://example.org/#part",
        "https://example.org/a b",
        "https://example.org/\r\nHost: other",
        "https://example.org:99999/",
        "https://[::1",
        "https://exämple.org/",
        "https://example.org/" + "a" * 3000,
        "",
    ],
)
def test_what_is_no_https_address_is_refused(names, url):
    with pytest.raises(UsageError, match="Nothing can be sent"):
        check_url(url, env={})


def test_hosts_that_the_operator_names_may_be_inside_and_without_tls(names):
    names["hooks.internal"] = ["10.0.0.5"]
    assert resolve("http://hooks.internal:8080/x", env={HOSTS_VARIABLE: "other, Hooks.internal"}).ip == "10.0.0.5"
    with pytest.raises(UsageError, match=HOSTS_VARIABLE):
        resolve("https://hooks.internal/x", env={HOSTS_VARIABLE: "other"})


def test_a_name_without_an_address_may_have_one_later(names):
    check_url("https://soon.example.org/", env={})
    with pytest.raises(Unreachable, match="has no address"):
        resolve("https://soon.example.org/", env={})
