"""A memory as clients of the Model Context Protocol use it: the SDK's own client, in this process and over a pipe."""

from __future__ import annotations

import asyncio
import json
import sys
from contextlib import closing

import pytest
from mcp import Client, StdioServerParameters, stdio_client

from nightschool.cli.memory.explaining import Explaining
from nightschool.errors import UsageError
from nightschool.memory.graph import KnowledgeGraph
from nightschool.memory.mcp import Served, server_of
from nightschool.memory.store import MemoryStore
from nightschool.store.home import Home
from nightschool.store.names import memory_path
from tests.support.memory_setups import MemoryBot

ADA = {"name": "Ada_Lovelace", "entityType": "person", "observations": ["lives in Oslo", "Up at six!"]}
ACME = {"name": "Acme", "entityType": "company", "observations": []}


@pytest.fixture
def store(tmp_path):
    with MemoryStore.create(tmp_path / "facts") as made:
        yield made


def no_model(question, model, max_new_tokens):
    raise UsageError("There is no model.")


def ask(store, *calls, why=no_model):
    """The answers of one session: what each tool says, or ("error", its message)."""

    async def session():
        answers = []
        async with Client(server_of(Served(KnowledgeGraph(store, author="test"), why))) as client:
            for tool, arguments in calls:
                result = await client.call_tool(tool, arguments)
                text = result.content[0].text
                answers.append(("error", text) if result.is_error else json.loads(text))
        return answers

    return asyncio.run(session())


def test_the_tools_of_the_reference_server_and_ours_are_there(store):
    async def names():
        async with Client(server_of(Served(KnowledgeGraph(store, author="test"), no_model))) as client:
            return {tool.name: tool.input_schema for tool in (await client.list_tools()).tools}

    tools = asyncio.run(names())
    assert set(tools) == {
        "create_entities", "create_relations", "add_observations", "delete_entities", "delete_observations",
        "delete_relations", "read_graph", "search_nodes", "open_nodes", "search", "add", "edit", "remove", "history", "why",
    }  # fmt: skip
    assert set(tools["delete_entities"]["properties"]) == {"entityNames"}
    assert set(tools["create_relations"]["$defs"]["Relation"]["properties"]) == {"from", "to", "relationType"}


def test_a_graph_is_written_read_found_and_taken_back(store):
    works = {"from": "Ada_Lovelace", "to": "Acme", "relationType": "works at"}
    *_, fresh, again, whole, found, opened = ask(
        store,
        ("create_entities", {"entities": [ADA, ACME]}),
        ("create_relations", {"relations": [works]}),
        ("create_relations", {"relations": [works]}),
        ("read_graph", {}),
        ("search_nodes", {"query": "Oslo"}),
        ("open_nodes", {"names": ["acme", "nobody"]}),
    )
    assert fresh == {"relations": [works]}
    assert again == {"relations": []}
    assert whole["relations"] == [works]
    assert whole["entities"] == [ADA | {"observations": ["Ada_Lovelace lives in Oslo", "Up at six!"]}, ACME]
    assert (found["entities"], found["relations"]) == (whole["entities"][:1], [works])
    assert opened == {"entities": [ACME], "relations": []}

    ended, no_relation, left = ask(
        store,
        ("delete_observations", {"deletions": [{"entityName": "Ada_Lovelace", "observations": ["Up at six!"]}]}),
        ("delete_relations", {"relations": [works]}),
        ("read_graph", {}),
    )
    assert (ended, no_relation) == ({"ended": 1}, {"ended": 1})
    assert left["relations"] == []
    assert [len(one["observations"]) for one in left["entities"]] == [1, 0]

    gone, nothing = ask(store, ("delete_entities", {"entityNames": ["Ada_Lovelace", "Acme"]}), ("read_graph", {}))
    assert gone == {"ended": 3}
    assert nothing == {"entities": [], "relations": []}


def test_a_new_value_takes_the_place_of_the_old_one_and_history_says_who_wrote_both(store):
    added, graph, history, edited = ask(
        store,
        ("add", {"facts": ["Ada lives in Oslo."]}),
        ("add_observations", {"observations": [{"entityName": "Ada", "contents": ["lives in Bergen"]}]}),
        ("history", {"entry": "m1"}),
        ("edit", {"entry": "m1", "text": "Ada lives in Narvik."}),
    )
    assert added["entries"][0]["id"] == "m1"
    assert len(graph["entities"][0]["observations"]) == 1
    assert [one["value"] for one in history["entries"]] == ["Oslo", "Bergen"]
    assert [one["author"] for one in history["entries"]] == ["test", "test"]
    assert (edited["entries"][0]["value"], edited["entries"][0]["source"]) == ("Narvik", "mcp")


def test_what_a_later_fact_of_the_same_call_ends_was_written_all_the_same(store):
    (both,) = ask(store, ("add", {"facts": ["Ada speaks French.", "Ada no longer speaks French."]}))
    assert (both["added"], both["removed"]) == (2, 1)
    assert [one.died for one in store.history("m1")] == [store.revision]


def test_what_cannot_be_done_is_told_and_changes_nothing(store):
    revision = store.revision
    unknown, empty, wrong, endless = ask(
        store,
        ("history", {"entry": "m99"}),
        ("add", {"facts": [""]}),
        ("create_entities", {"entities": [{"name": "Ada", "type": "person"}]}),
        ("search", {"query": "Ada", "limit": -1}),
    )
    assert unknown[0] == empty[0] == wrong[0] == endless[0] == "error"
    assert "m99" in unknown[1]
    assert "The fact is empty" in empty[1]
    assert store.revision == revision


def test_a_memory_that_is_too_large_for_a_prompt_is_read_in_parts(store, monkeypatch):
    monkeypatch.setattr("nightschool.memory.graph.MOST_ENTRIES", 1)
    _, refused, part = ask(
        store,
        ("add", {"facts": ["Ada lives in Oslo.", "Bo lives in Rome."]}),
        ("read_graph", {}),
        ("search_nodes", {"query": "Rome"}),
    )
    assert refused[0] == "error"
    assert "search_nodes" in refused[1]
    assert [one["name"] for one in part["entities"]] == ["Bo"]
    assert "more" not in part


def test_of_an_entity_of_which_very_much_is_said_a_part_is_read(store, monkeypatch):
    monkeypatch.setattr("nightschool.memory.graph.MOST_ENTRIES", 3)
    said = [f"has seen place {number}" for number in range(5)]
    written, *_, opened = ask(
        store,
        ("add_observations", {"observations": [{"entityName": "Ada", "contents": said}]}),
        ("open_nodes", {"names": ["Ada", "Bo"]}),
    )
    assert len(store.about("Ada")) == 5
    assert [len(graph["entities"][0]["observations"]) for graph in (written, opened)] == [3, 3]
    assert written["more"] is opened["more"] is True


def test_deleting_an_entity_ends_relations_to_it_however_many_and_no_types(store):
    people = [f"Person {number}" for number in range(30)]
    relations = [
        {"from": one, "to": "the Acme" if one == "Person 7" else "Acme", "relationType": "works at"} for one in people
    ]
    ended, *_, nobody, left = ask(
        store,
        ("create_entities", {"entities": [ACME, {"name": "Person", "entityType": "kind"}]}),
        ("create_entities", {"entities": [{"name": one, "entityType": "person"} for one in people]}),
        ("create_relations", {"relations": relations}),
        ("delete_entities", {"entityNames": ["Acme"]}),
        ("delete_entities", {"entityNames": ["Person", "nowhere"]}),
        ("read_graph", {}),
    )[2:]
    assert len(ended["relations"]) == 30
    assert nobody == {"ended": 1}, "what it is of type person stays"
    assert left["relations"] == []
    assert {one["entityType"] for one in left["entities"]} == {"person"}


def test_a_value_that_is_no_entity_is_not_deleted_as_one(store):
    _, ended = ask(store, ("create_entities", {"entities": [ADA]}), ("delete_entities", {"entityNames": ["Oslo"]}))
    assert ended == {"ended": 0}


def test_why_over_a_pipe_asks_a_model_of_this_home_or_says_what_to_do(tmp_path_factory):
    bot = MemoryBot(tmp_path_factory.mktemp("home"))
    question = ("why", {"question": "Where does Ada live?", "max_new_tokens": 4})
    with closing(Explaining(bot.home, "facts", None)) as explaining:
        none, absent, told, again = ask(
            bot.facts,
            question,
            ("why", question[1] | {"model": str(tmp_path_factory.getbasetemp())}),
            ("why", question[1] | {"model": "bot"}),
            ("why", question[1] | {"model": "bot@champion"}),
            why=explaining,
        )
    assert "--model NAME" in none[1]
    assert "There is bot." in none[1]
    assert "There is no model" in absent[1], "a client loads nothing but versions of this home"
    assert (told["model"].split("@")[0], len(told["why"])) == ("bot", 4)
    assert [entry["text"] for entry in told["memory"]["entries"]] == ["Ada lives in Oslo."]
    assert again == told
    with closing(Explaining(bot.home, "facts", "bot")) as explaining:
        assert explaining("Where does Ada live?", None, 4) == told
    empty = Explaining(Home(tmp_path_factory.mktemp("empty")).ensure(), "acme/facts", None)
    with pytest.raises(UsageError, match="nightschool models add"):
        empty("Where does Ada live?", None, 4)


def test_a_client_starts_the_command_and_speaks_over_its_pipe(tmp_path):
    home = Home(tmp_path / "home").ensure()
    MemoryStore.create(memory_path(home, "facts")).close()
    command = StdioServerParameters(
        command=sys.executable,
        args=["-m", "nightschool", "memory", "mcp", "facts"],
        env={"NIGHTSCHOOL_HOME": str(home.path)},
    )

    async def session():
        async with Client(stdio_client(command)) as client:
            await client.call_tool("add", {"facts": ["Ada lives in Oslo."]})
            return json.loads((await client.call_tool("search", {"query": "Ada"})).content[0].text)

    (found,) = asyncio.run(session())["entries"]
    assert (found["text"], found["source"]) == ("Ada lives in Oslo.", "mcp")
