"""`nightschool memory mcp`: a memory for clients of the Model Context Protocol, over standard input and output."""

from __future__ import annotations

from contextlib import closing

from nightschool.cli.memory import opened
from nightschool.cli.memory.explaining import Explaining
from nightschool.cli.output import who
from nightschool.memory.graph import KnowledgeGraph
from nightschool.store.home import Home


def mcp(name: str, /, *, model: str | None = None) -> None:
    """Serve a memory to a client of the Model Context Protocol, over standard input and output, until the client closes it.

    Tools: create_entities, create_relations, add_observations, delete_entities, delete_observations, delete_relations, read_graph,
    search_nodes and open_nodes, as the reference server server-memory has them; search, add, edit, remove and history of entries; and
    why, which asks a model. POST /mcp/NAME of nightschool serve has the same tools.

    Args:
        name: The memory.
        model: What why asks where a client names no model: NAME, NAME@VERSION, a folder, a GGUF file or a hub id. It is loaded when it is
            first asked.
    """
    from nightschool.memory.mcp import Served, server_of

    with opened(name) as store, closing(Explaining(Home.find(), name, model)) as explaining:
        server_of(Served(KnowledgeGraph(store, author=who()), explaining)).run("stdio")
