"""A memory for clients of the Model Context Protocol: one set of tools, over standard input and output and over HTTP.

The SDK is imported when a client is first served, so that nobody else waits for it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import TYPE_CHECKING, Any

from nightschool.errors import NotInstalled
from nightschool.memory.mcp.served import HttpAnswer, Served, Why

__all__ = ["HttpAnswer", "Served", "Why", "http_server", "server_of"]

if TYPE_CHECKING:
    from mcp.server import MCPServer

    from nightschool.memory.mcp.http import HttpServer


def server_of(served: Served) -> MCPServer[Any]:
    """The server of one memory, for one client. Raises NotInstalled without the extra `mcp`."""
    with _told_if_missing():
        from nightschool.memory.mcp.tools import server_with
    return server_with(lambda _: served)


@cache
def http_server() -> HttpServer:
    """What answers for all memories over HTTP. Raises NotInstalled without the extra `mcp`."""
    with _told_if_missing():
        from nightschool.memory.mcp.http import HttpServer
    return HttpServer()


@contextmanager
def _told_if_missing() -> Iterator[None]:
    try:
        yield
    except ImportError as error:
        raise NotInstalled(
            f"The Model Context Protocol takes the package mcp, which is not installed here ({error}). "
            "Run: pip install 'nightschool[mcp]'"
        ) from None
