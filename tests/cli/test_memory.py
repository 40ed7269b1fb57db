"""`nightschool memory`: facts from files and sentences, edited, taken back, purged."""

import json
import sqlite3
from contextlib import closing

import pytest

from nightschool.cli.main import main
from nightschool.memory.memory import Memory
from nightschool.memory.store import MemoryStore
from nightschool.store.home import Home
from nightschool.store.names import memory_path
from tests.support.cli_home import add_version, make_run
from tests.support.memory_parts import encoder, vocabulary


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("NIGHTSCHOOL_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("USER", "ada")
    return tmp_path


def facts(folder, text, name="facts.txt"):
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return str(path)


def test_a_memory_is_built_read_edited_and_taken_back(folder, ask):
    built = ask("build", "friends", "--from", facts(folder, "Ada lives in Oslo.\nBob speaks French.\n"))
    assert (built["added"], built["revision"]) == (2, 1)
    added = ask("add", "friends", "Ada lives in Rome.", "--source", "chat_88")
    assert (added["superseded"], added["entries"][0]["id"], added["entries"][0]["source"]) == (1, "m1", "chat_88")
    assert [one["text"] for one in ask("ls", "friends")] == ["Bob speaks French.", "Ada lives in Rome."]
    assert [one["text"] for one in ask("ls", "friends", "--at", "1")] == ["Ada lives in Oslo.", "Bob speaks French."]
    assert [one["text"] for one in ask("history", "friends", "m1")] == ["Ada lives in Oslo.", "Ada lives in Rome."]
    assert ask("edit", "friends", "m1", "--value", "Bern")["entries"][0]["text"] == "Ada lives in Bern."
    assert ask("undo", "friends")["undone"] == 3
    assert [one["id"] for one in ask("search", "friends", "ROME ada")] == ["m1"]
    assert ask("search", "friends", "nobody %") == []
    assert [one["operation"] for one in ask("history", "friends")] == ["undo", "edit", "add", "build", "create"]
    assert {one["author"] for one in ask("history", "friends")} == {"ada", ""}


def test_memories_are_listed_with_what_they_hold(ask, say):
    assert "There is no memory yet" in say("ls")
    ask("build", "friends")
    ask("build", "acme/staff")
    ask("add", "acme/staff", "--subject", "Ada", "--relation", "works for", "--value", "Acme")
    (memory_path(Home.find(), "friends") / "memory.db").write_bytes(b"x" * 5000)
    rows = {row["name"]: row for row in ask("ls")}
    assert (rows["acme/staff"]["entries"], rows["acme/staff"]["revision"]) == (1, 1)
    assert "not a database" in rows["friends"]["problem"]


def test_a_write_says_what_it_replaced_and_what_it_ended(ask, say):
    ask("build", "friends")
    assert "1 added.\nm1  Ada lives in Oslo.\n" in say("add", "friends", "Ada lives in Oslo.")
    assert "1 known already.\nm1  Ada lives in Oslo.\n" in say("add", "friends", "Ada lives in Oslo.")
    assert "1 replaced.\nm1  Ada lives in Rome.  (was: Ada lives in Oslo.)\n" in say(
        "add", "friends", "Ada lives in Rome."
    )
    assert "m3  Ada no longer lives in Rome.\nm1  ended: Ada lives in Rome.\n" in say(
        "add", "friends", "Ada no longer lives in Rome."
    )
    assert "1 ended.\nm3  ended: Ada no longer lives in Rome.\n" in say("rm", "friends", "m3")
    # Both are written, though the second ends the first.
    both = say("add", "friends", "Bob lives in Oslo.", "Bob no longer lives in Oslo.")
    assert "m4  ended: Bob lives in Oslo.\nm5  Bob no longer lives in Oslo.\n" in both
    say("undo", "friends")
    undone = next(line for line in say("history", "friends").splitlines() if " undo " in line)
    assert undone.endswith("revision 5")


def test_a_list_says_since_and_until_when_entries_hold_where_one_of_them_does(ask, say):
    ask("build", "friends")
    ask("add", "friends", "Ada speaks Latin.")
    assert "UNTIL" not in say("ls", "friends")
    ask("add", "friends", "Ada works for Acme.", "--valid-from", "2020-03-01", "--valid-to", "2021-01-01T08:30:00Z")
    assert [line.split() for line in say("search", "friends", "acme").splitlines()] == [
        ["ID", "TEXT", "HOLDS", "FROM", "UNTIL", "SOURCE", "REVISION"],
        ["m2", "Ada", "works", "for", "Acme.", "2020-03-01", "2021-01-01", "08:30:00", "-", "2"],
    ]


def test_a_page_of_entries_says_how_to_go_on(folder, ask, say):
    ask("build", "many", "--from", facts(folder, "".join(f"P{n} lives in Oslo.\n" for n in range(7))))
    assert "3 of 7 entries; --after m3 goes on" in say("ls", "many", "--limit", "3")
    assert [one["id"] for one in ask("ls", "many", "--limit", "3", "--after", "m3")] == ["m4", "m5", "m6"]
    assert len(ask("ls", "many", "--limit", "0")) == 7


def test_an_end_is_not_a_purge_and_a_purge_asks(folder, ask, say):
    ask("build", "friends", "--from", facts(folder, "Ada lives in Oslo.\nZerlinda speaks French.\n"))
    ask("versions", "friends", "monday")
    assert ask("rm", "friends", "m1")["removed"] == 1
    assert "Nobody can be asked here" in say("rm", "friends", "m2", "--purge", code=2)
    done = ask("rm", "friends", "m2", "--purge", "--yes")
    assert done == {
        "name": "friends",
        "revision": 3,
        "entries": ["m2"],
        "rows": 1,
        "versions": ["monday"],
        "index_dropped": False,
        "learned": [],
    }
    left = b"".join(path.read_bytes() for path in (folder / "home").rglob("*") if path.is_file())
    assert b"erlinda" not in left
    assert "was purged" in say("history", "friends", "m2", code=4)
    assert "Nobody can be asked" in say("rm", "friends", code=2)
    assert ask("rm", "friends", "--yes")["removed"] == "friends"
    assert "no memory 'friends'" in say("ls", "friends", code=4)


def test_an_entry_of_another_memory_is_ended_in_this_one_only(folder, ask, say):
    ask("build", "friends", "--from", facts(folder, "Ada lives in Oslo.\nBob speaks French.\n"))
    ask("build", "acme/mine", "--from", facts(folder, "Eve speaks Latin.\n", "more.txt"))
    ended = ask("rm", "acme/mine", "friends/m1", "shared:friends/m2")
    assert [(one["text"], one["source"]) for one in ended["entries"]] == [
        ("No longer: Ada lives in Oslo.", "friends/m1"),
        ("No longer: Bob speaks French.", "shared:friends/m2"),
    ]
    assert len(ask("ls", "acme/mine")) == 3
    assert [one["operation"] for one in ask("history", "friends")] == ["build", "create"]
    assert ask("undo", "acme/mine")["removed"] == 2
    assert ask("rm", "acme/mine", "acme/mine/m1")["removed"] == 1
    assert "End them by themselves" in say("rm", "acme/mine", "friends/m1", "m1", code=2)
    assert "End them by themselves" in say("rm", "acme/mine", "friends/m1", "--purge", "--yes", code=2)
    assert "no memory 'absent'" in say("rm", "acme/mine", "absent/m1", code=4)
    assert "m9" in say("rm", "acme/mine", "friends/m9", code=4)


def test_a_search_of_memories_over_one_another_shows_what_is_read(folder, ask, say):
    ask("build", "friends", "--from", facts(folder, "Ada lives in Oslo.\nAda speaks French.\nAda was born in Bonn.\n"))
    ask("build", "mine", "--from", facts(folder, "Ada lives in Rome.\n", "more.txt"))
    ask("rm", "mine", "friends/m3")
    layered = ["search", "friends", "ada", "--overlay", "mine"]
    assert {one["id"]: one["text"] for one in ask(*layered)} == {
        "mine/m1": "Ada lives in Rome.",
        "m2": "Ada speaks French.",
    }
    ask("build", "session", "--from", facts(folder, "Ada lives in Bern.\n", "third.txt"))
    assert [one["id"] for one in ask(*layered, "--overlay", "session")] == ["session/m1", "m2"]
    assert len(ask("search", "friends", "ada")) == 3
    assert "mine/m1" in say(*layered)
    for words, said in (
        (["--overlay", "friends"], "cannot lie over itself"),
        (["--overlay", "mine", "--overlay", "mine"], "cannot lie over itself"),
        (["--overlay", "mine", "--at", "1"], "--at"),
    ):
        assert said in say("search", "friends", "ada", *words, code=2)
    assert "no memory 'absent'" in say("search", "friends", "ada", "--overlay", "absent", code=4)


def test_a_purge_takes_the_index_along(ask):
    ask("build", "friends")
    ask("add", "friends", "Ada lives in Oslo.")
    index = memory_path(Home.find(), "friends") / "index"
    index.mkdir()
    (index / "tokens.npy").write_bytes(b"what Ada said")
    assert ask("rm", "friends", "m1", "--purge", "--yes")["index_dropped"]
    assert not index.exists()


def test_a_write_says_which_versions_learned_what_it_ended(ask, say, capsys):
    home = Home.find().ensure()
    run = make_run(home, name="bot")
    said = [
        {"role": "user", "content": "Where does Ada live?"},
        {"role": "assistant", "content": "In Oslo.", "weight": 1},
    ]
    (run.path / "new_examples.jsonl").write_text(json.dumps({"messages": said}) + "\n")
    learned = add_version(home, name="bot", run_id=run.id)
    ask("build", "friends")
    assert ask("add", "friends", "Ada lives in Oslo.", "Bob lives in Oslo.")["stale"] == []
    assert "No version learned" in say("stale", "friends")
    change = ask("edit", "friends", "m1", "--value", "Rome")
    assert change["stale"] == [{"id": "m1", "text": "Ada lives in Oslo.", "ended": 2, "versions": [learned.ref]}]
    assert f"{learned.ref} learned what holds no longer" not in say("rm", "friends", "m2")
    assert [one["id"] for one in ask("stale", "friends")] == ["m1"]
    capsys.readouterr()
    assert main(["--json", "models", "ls"]) == 0
    assert [row["stale"] for row in json.loads(capsys.readouterr().out)] == [
        [{"memory": "friends", "id": "m1", "text": "Ada lives in Oslo.", "ended": 2}]
    ]
    assert main(["models", "show", learned.ref]) == 0
    assert "friends no longer says: Ada lives in Oslo." in capsys.readouterr().out
    ask("add", "friends", "Ada lives in Oslo.")
    assert ask("stale", "friends") == []
    assert ask("undo", "friends")["stale"][0]["versions"] == [learned.ref]
    assert f"{learned.ref} learned m1, and still know" in say("rm", "friends", "m1", "m2", "--purge", "--yes")


def test_versions_are_named_compared_and_brought_back(ask, say):
    ask("build", "friends")
    ask("add", "friends", "Ada lives in Oslo.")
    assert ask("versions", "friends", "monday")["revision"] == 1
    ask("add", "friends", "Ada lives in Rome.", "Bob lives in Bern.")
    (changed, new) = ask("diff", "friends", "monday")
    assert (changed["kind"], changed["before"]["value"], changed["after"]["value"]) == ("changed", "Oslo", "Rome")
    assert (new["kind"], new["id"]) == ("added", "m3")
    assert "- m1  Ada lives in Oslo.\n+ m1  Ada lives in Rome.\n+ m3" in say("diff", "friends", "monday")
    assert ask("rollback", "friends", "monday")["entries"] == 1
    assert "was as monday already" in say("rollback", "friends", "monday")
    assert ask("versions", "friends")[0]["name"] == "monday"
    ask("versions", "friends", "monday", "--rm")
    assert "no version 'monday'" in say("rollback", "friends", "monday", code=4)


def test_conflicts_are_shown_and_settled(ask, say):
    ask("build", "friends")
    assert "no conflicts" in say("conflicts", "friends")
    ask("relations", "friends", "lives in", "multi")
    ask("add", "friends", "Ada lives in Oslo.", "Ada lives in Rome.")
    assert ask("relations", "friends", "lives in", "single") == [{"relation": "lives in", "cardinality": "single"}]
    assert "multi, several values" in say("relations", "friends", "Speaks")
    assert ask("relations", "friends", "lives  in") == {"relation": "lives  in", "cardinality": "single"}
    shown = say("conflicts", "friends")
    assert "resolve friends m1 m2 --keep" in shown
    assert "a  m1  Ada lives in Oslo.\nb  m2  Ada lives in Rome.\n" in shown
    assert [(one["kind"], one["a"]["id"], one["b"]["id"]) for one in ask("conflicts", "friends")] == [
        ("values", "m1", "m2")
    ]
    assert say("resolve", "friends", "m1", "m2", "--keep", "both").startswith("Both stand, and are not shown")
    assert "no conflicts" in say("conflicts", "friends")
    settled = ask("resolve", "friends", "m1", "m2", "--keep", "a")
    assert [one["text"] for one in settled["entries"]] == ["Ada lives in Oslo."]
    assert ask("relations", "friends", "lives in", "default") == []


@pytest.mark.parametrize("name", ["out.jsonl", "out.json", "out.csv"])
def test_what_is_exported_is_imported_again(ask, say, name):
    ask("build", "friends")
    ask("add", "friends", "Oslo is the capital of Norway.", "Rain, says Ada, is “wet”.", "--source", 'chat, "88"')
    ask("add", "friends", "--subject", "Ada", "--relation", "wohnt in", "--value", "Köln", "--valid-from", "2020-01-01")
    ask("export", "friends", name)
    assert "is there already" in say("export", "friends", name, code=1)
    ask("export", "friends", name, "--force")
    ask("build", "again", "--from", name)
    shown = ("text", "wording", "subject", "relation", "value", "source", "valid_from")
    one, other = ([[row[key] for key in shown] for row in ask("ls", which)] for which in ("friends", "again"))
    assert one[:2] == other[:2]
    assert other[2] == [*one[2][:5], name, one[2][6]]


def test_an_empty_memory_and_statements_are_exported_too(folder, ask, say):
    ask("build", "friends")
    for name in ("a.jsonl", "a.json", "a.csv", "a.txt"):
        ask("export", "friends", name)
    assert json.loads((folder / "a.json").read_text()) == []
    assert len((folder / "a.csv").read_text().splitlines()) == 1
    ask("add", "friends", "Oslo is the capital of Norway.")
    ask("export", "friends", "b.txt")
    assert (folder / "b.txt").read_text() == "Oslo is the capital of Norway.\n"
    assert "is not known" in say("export", "friends", "b.xml", code=2)


def test_a_file_with_a_mistake_leaves_no_memory_behind(folder, ask, say):
    path = facts(folder, '{"text": "Ada sings."}\n{"text": ""}\n', "facts.jsonl")
    assert "facts.jsonl:2: the fact is empty" in say("build", "friends", "--from", path, code=1)
    assert ask("ls") == []
    ask("build", "friends")
    assert "facts.jsonl:2" in say("import", "friends", path, code=1)
    assert ask("ls", "friends") == []
    assert "already" in say("build", "friends", code=1)
    assert ask("import", "friends", facts(folder, "Ada sings."))["added"] == 1


def test_a_check_names_what_was_altered(ask, say):
    ask("build", "friends")
    ask("add", "friends", "Ada lives in Oslo.")
    assert "All is as it was written" in say("check", "friends")
    with sqlite3.connect(memory_path(Home.find(), "friends") / "memory.db") as connection:
        connection.execute("UPDATE rows SET value = 'Rome'")
    connection.close()
    report = ask("check", "friends", code=1)
    assert (report["ok"], report["findings"][0]["entry"]) == (False, "m1")
    assert "can be edited, ended or purged" in say("check", "friends", code=1)


def test_an_entry_that_is_not_what_was_written_is_shown_so_and_not_exported(ask, say):
    ask("build", "friends")
    ask("add", "friends", "Ada lives in Oslo.", "Bob lives in Bern.")
    with sqlite3.connect(memory_path(Home.find(), "friends") / "memory.db") as connection:
        connection.execute("UPDATE rows SET text = 'Ada lives in Osln.', value = 'Osln' WHERE row = 1")
    connection.close()
    for words in (("ls", "friends"), ("search", "friends", "Ada"), ("history", "friends", "m1")):
        said = say(*words)
        assert "Osln.  (damaged)" in said
        assert "Row 1 of m1 is not what was written" in said
    assert [one["damaged"] for one in ask("ls", "friends")] == [True, False]
    assert "Row 1 of m1 is not what was written" in say("export", "friends", "out.jsonl", code=1)
    ask("edit", "friends", "m1", "Ada lives in Oslo.")
    assert [one["damaged"] for one in ask("ls", "friends")] == [False, False]
    ask("rm", "friends", "m1", "--purge", "--yes")
    assert "All is as it was written" in say("check", "friends")


def test_a_damaged_index_alone_is_removed_by_a_command_that_the_check_names(ask, say):
    ask("build", "friends")
    ask("add", "friends", "Ada lives in Oslo.")
    path = memory_path(Home.find(), "friends")
    with closing(Memory.open(path, encoder(), vocabulary())) as memory:
        folder = memory.index_folder
    file = max(folder.iterdir(), key=lambda one: one.stat().st_size)
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    said = say("check", "friends", code=1)
    assert "The entries are whole" in said
    assert "nightschool memory check friends --rebuild-index" in said
    assert folder.is_dir()
    assert "Removed the index" in say("check", "friends", "--rebuild-index")
    assert not folder.is_dir()
    assert "All is as it was written" in say("check", "friends", "--rebuild-index")
    with closing(Memory.open(path, encoder(), vocabulary())) as memory:
        assert memory.rebuilt == "there was none"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["add", "friends"], "Give sentences, or --subject"),
        (["add", "friends", "Ada sings.", "--subject", "Ada"], "Give sentences, or --subject"),
        (["add", "friends", "Ada sings.", "--valid-from", "soon"], "'soon' is no date"),
        (["add", "../x", "Ada sings."], "refused"),
        (["edit", "friends", "7", "x"], "looks like m123"),
        (["versions", "friends", "--rm"], "Name the version"),
        (["rm", "friends", "--purge"], "--purge needs entries"),
        (["import", "friends"], "at least one file"),
    ],
)
def test_what_makes_no_sense_is_refused_with_a_remedy(ask, say, words, said):
    ask("build", "friends")
    assert said in say(*words, code=2)


def test_the_audit_log_keeps_no_facts(ask, capsys):
    ask("build", "friends")
    ask("add", "friends", "Zerlinda lives in Oslo.")
    ask("edit", "friends", "m1", "Zerlinda lives in Rome.")
    ask("rm", "friends", "m1", "--purge", "--yes")
    capsys.readouterr()
    assert main(["--json", "audit", "ls"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [(row["action"], row["target"]) for row in rows] == [
        ("memory.delete", "friends m1"),
        ("memory.build", "friends"),
    ]


def test_a_store_that_is_open_sees_that_its_memory_was_deleted_and_made_anew(ask):
    ask("build", "friends")
    ask("add", "friends", "Ada lives in Oslo.")
    with MemoryStore.open(memory_path(Home.find(), "friends")) as store:
        ask("rm", "friends", "--yes")
        ask("build", "friends")
        ask("add", "friends", "Bob lives in Rome.")
        assert [one.text for one in store.entries()] == ["Bob lives in Rome."]


GRAPH = """\
{"type": "entity", "name": "Ada", "entityType": "person", "observations": ["lives in Oslo"]}
{"type": "relation", "from": "Ada", "to": "Acme", "relationType": "works at"}
{"type": "entity", "name": "Acme", "entityType": "company", "observations": []}
"""


def test_the_file_of_server_memory_comes_in_and_goes_out(folder, ask, say, capsys):
    path = facts(folder, GRAPH, "memory.json")
    assert main(["memory", "build", "graph", "--from", facts(folder, GRAPH, "memory.jsonl")]) == 1
    assert "Add --format server-memory." in capsys.readouterr().err
    built = ask("build", "graph", "--from", path, "--format", "server-memory")
    assert (built["added"], built["revision"]) == (4, 1)
    assert ask("import", "graph", path, "--format", "server-memory")["unchanged"] == 4
    ask("add", "graph", "It may rain.")
    assert "because no subject can be told of them: 1." in say(
        "export", "graph", "out.jsonl", "--format", "server-memory"
    )
    assert ask("export", "graph", "out.jsonl", "--format", "server-memory", "--force")["left_out"] == 1
    assert ask("import", "graph", "out.jsonl", "--format", "server-memory")["unchanged"] == 4
    assert (
        main(["memory", "import", "graph", facts(folder, GRAPH + "[]\n", "bad.jsonl"), "--format", "server-memory"])
        == 1
    )
    assert "bad.jsonl:4" in capsys.readouterr().err
    assert ask("ls", "graph")[-1]["text"] == "It may rain."
