"""chat with a memory: what an answer came from, and corrections that are remembered now or studied at night."""

import io
import json

import pytest

from nightschool.cli.chat.remembering import fact_of
from nightschool.cli.main import main
from nightschool.cli.memory.shown_why import found_lines, word_lines
from nightschool.feedback.conversations import ConversationStore
from nightschool.store.database import Database
from tests.support.memory_setups import reader_bot, served

QUESTION = "Where does Ada live?"
GREEDY = ["-t", "0", "--max-new-tokens", "6"]


@pytest.fixture(scope="module")
def bot(tmp_path_factory):
    return reader_bot(tmp_path_factory.mktemp("home"))


@pytest.fixture(scope="module")
def server(bot):
    with served(bot) as server:
        yield server


@pytest.fixture
def talk(bot, monkeypatch, capsys):
    """Type lines into a chat with a model here; returns what was printed. The memory is left as it was."""
    monkeypatch.setenv("NIGHTSCHOOL_HOME", str(bot.home.path))
    before = bot.facts.revision

    def type_lines(*lines, options=(), model="bot"):
        monkeypatch.setattr("sys.stdin", io.StringIO("".join(line + "\n" for line in lines)))
        assert main(["chat", model, *GREEDY, *options]) == 0
        return capsys.readouterr().out

    yield type_lines
    bot.facts.rollback(before, author="test")


def at(server):
    return ["--url", server.url]


@pytest.mark.parametrize("where", ["here", "server"])
@pytest.mark.parametrize(("model", "read"), [("bot", "prompt"), ("reader", "layers")])
def test_why_says_of_the_last_answer_what_the_command_says_of_the_same_question(
    where, model, read, talk, server, capsys
):
    options = ["--memory", "facts", "--memory-read", read, *(at(server) if where == "server" else [])]
    answer, why = map(json.loads, talk(QUESTION, "/why", options=["--json", *options], model=model).splitlines())
    words = ["memory", "why", "facts", QUESTION, "--model", model, "--max-new-tokens", "6", "--json"]
    assert main(words) == 0
    told = json.loads(capsys.readouterr().out)
    assert (why["answer"], why["memory"]) == (told["answer"], told["memory"])
    assert answer["memory"] == why["memory"]
    for mine, other in zip(why["why"], told["why"], strict=True):
        assert mine["from"] == other["from"]
        assert [one["id"] for one in mine["entries"]] == [one["id"] for one in other["entries"]]
        assert mine["probability"] == pytest.approx(other["probability"], abs=1e-3)
    shown = talk(QUESTION, "/why", options=options, model=model)
    assert f"{told['memory']['entries'][0]['id']}  Ada lives in Oslo." in shown
    assert "WITHOUT ANY" in shown


def test_a_drawn_answer_is_told_of_as_it_was_drawn_when_a_server_is_asked_why(talk, server):
    options = ["--memory", "facts", *at(server), "--json"]
    answer, why = map(json.loads, talk("/temp 1", QUESTION, "/why", options=options).splitlines())
    assert why["answer"] == answer["answer"]


@pytest.mark.parametrize("where", ["here", "server"])
def test_a_correction_is_written_only_when_it_is_confirmed_and_counts_for_the_next_message(
    where, talk, bot, server, capsys
):
    options = ["--memory", "facts", *(at(server) if where == "server" else [])]
    offered = talk(QUESTION, "/fix Ada lives in Rome.", options=options)
    assert "/remember" in offered
    assert "/study" in offered
    assert [one.text for one in bot.facts.about("Ada")] == ["Ada lives in Oslo."]
    out = talk(QUESTION, "/fix Ada lives in Rome.", "/remember", QUESTION, "/why", options=[*options, "--json"])
    first, done, second, why = map(json.loads, out.splitlines())
    [entry] = bot.facts.about("Ada")
    assert (entry.text, entry.source) == ("Ada lives in Rome.", first["request_id"])
    assert entry.author
    done = done["remembered"]
    assert (done["entry"], done["superseded"]) == (entry.id, "Ada lives in Oslo.")
    for after in (second, why):
        assert [one["text"] for one in after["memory"]["entries"]] == ["Ada lives in Rome."]
        assert after["memory"]["revision"] == done["revision"]
    if where == "here":
        assert main(done["undo"].split()[1:]) == 0
    else:
        assert done["undo"] == f"curl -X POST {server.url}/api/memories/facts/undo"
        import httpx2

        assert httpx2.post(done["undo"].split()[-1]).status_code == 200
    assert [one.text for one in bot.facts.about("Ada")] == ["Ada lives in Oslo."]


def test_words_say_what_was_superseded_and_how_it_is_undone(talk):
    out = talk(QUESTION, "/fix Rome", "/remember", "/remember", options=["--memory", "facts"])
    assert "now: Ada lives in Rome." in out
    assert "It superseded: Ada lives in Oslo." in out
    assert "To undo it: nightschool memory undo facts" in out
    assert "facts has it already as m1: nothing was written." in out


def test_what_was_corrected_is_studied_at_night_if_that_is_chosen(talk, bot):
    options = ["--memory", "facts", "--record"]
    out = talk(QUESTION, "/fix Ada lives in Rome.", "/study", options=options)
    assert "a night that studies conversations learns it" in out
    kept = ConversationStore(Database(bot.home).connect()).select(corrected=True)
    assert [one.correction for one in kept] == ["Ada lives in Rome."]
    assert [one.text for one in bot.facts.about("Ada")] == ["Ada lives in Oslo."]


def test_a_fact_of_ones_own_is_remembered_and_one_that_ended_is_told(talk, bot):
    out = talk(
        QUESTION, "/remember Eve speaks Latin.", "/remember Eve no longer speaks Latin.", options=["--memory", "facts"]
    )
    assert "Eve speaks Latin. It counts for the next message." in out
    assert "facts no longer has" in out
    assert bot.facts.about("Eve") == []


@pytest.mark.parametrize("where", ["here", "server"])
def test_what_is_corrected_is_written_over_the_memory_and_read_at_once(where, talk, bot, server):
    name = f"over-{where}"
    bot.remember(name, "Eve speaks Latin.")
    bot.remember(f"{name}-user", "Kim lives in Bern.")
    overlays = ["--overlay", f"{name}-user", "--overlay", name]
    options = ["--memory", "facts", *overlays, *(at(server) if where == "server" else [])]
    out = talk(QUESTION, "/why", "/fix Rome", "/remember", QUESTION, "/why", options=options)
    assert f"{name} remembers {name}/m2" not in out
    assert f"{name} remembers m2: Ada lives in Rome." in out
    assert "m1  Ada lives in Oslo." in out
    assert f"{name}/m2  Ada lives in Rome." in out
    assert [one.text for one in bot.facts.about("Ada")] == ["Ada lives in Oslo."]


def test_an_overlay_lies_over_a_memory(bot, monkeypatch, capsys):
    monkeypatch.setenv("NIGHTSCHOOL_HOME", str(bot.home.path))
    assert main(["chat", "bot", "--overlay", "facts"]) == 2
    assert "lies over no memory" in capsys.readouterr().err


def test_what_is_read_takes_its_room_in_the_context_and_the_oldest_turns_make_way(talk):
    def left_out(*options):
        out = talk(*[QUESTION] * 6, options=["--memory", "facts", "--json", *options])
        rows = [json.loads(line) for line in out.splitlines()]
        assert len(rows) == 6
        return [row.get("turns_left_out", 0) for row in rows]

    told = left_out("--memory-read", "prompt")
    assert told[0] == 0
    assert told == sorted(told)
    assert told[-1] > left_out("--memory-read", "off")[-1]


def test_off_reads_nothing_and_still_knows_where_to_write(talk, bot):
    out = talk(QUESTION, "/why", "/remember Eve speaks Latin.", options=["--memory", "facts", "--memory-read", "off"])
    assert bot.greedy(QUESTION, 6).splitlines()[0] in out
    assert "error: The last answer read no memory" in out
    assert [one.text for one in bot.facts.about("Eve")] == ["Eve speaks Latin."]


def test_a_version_reads_its_own_memory_without_being_told(talk):
    out = talk(QUESTION, "/fix Rome", model="reader")
    assert "/remember      facts remembers it now: Ada lives in Rome." in out


def test_without_a_memory_nothing_can_be_remembered_or_explained(talk):
    out = talk(QUESTION, "/why", "/remember Ada lives in Rome.", "/study").splitlines()
    assert [line.split(".")[0] for line in out[-3:]] == [
        "error: The last answer read no memory, so all of it is from the weights",
        "error: The last answer read no memory, so all of it is from the weights",
        "error: /study keeps what /fix corrected",
    ]


@pytest.mark.parametrize(
    ("options", "code"),
    [(["--memory", "absent"], 4), (["--memory", "../facts"], 2), (["--memory", "facts", "--memory-read", "layers"], 2)],
)
def test_a_memory_that_cannot_be_read_is_told_at_the_start(options, code, bot, monkeypatch):
    monkeypatch.setenv("NIGHTSCHOOL_HOME", str(bot.home.path))
    assert main(["chat", "bot", *options]) == code


@pytest.mark.parametrize(
    ("correction", "wrong", "read", "fact"),
    [
        ("Ada lives in Rome.", "In Oslo.", [], "Ada lives in Rome."),
        ("Rome!", "She lives in Oslo.", ["Ada lives in Oslo.", "Ada speaks Latin."], "Ada lives in Rome."),
        ("Rome", "No idea.", ["Ada lives in Oslo."], "Ada lives in Rome."),
        ("Rome", "No idea.", ["Ada lives in Oslo.", "Ada speaks Latin."], None),
        ("Rome", "Oslo", [], None),
        ("  ", "Oslo", ["Ada lives in Oslo."], None),
    ],
)
def test_what_a_correction_states(correction, wrong, read, fact):
    assert fact_of(correction, wrong, read) == fact


def test_tokens_are_shown_as_words_and_what_the_weights_said_between_them_as_one():
    def token(text, entries=(), probability=0.5, without=None):
        named = [{"id": entry, "weight": weight} for entry, weight in entries]
        return {"token": text, "from": "copied" if named else "weights", "entries": named, "probability": probability,
                "without": without or {}, "without_memory": 0.25}  # fmt: skip

    lines = word_lines(
        [token("She"), token(" lives"), token(" O", [("m1", 0.9)], 0.8, {"m1": 0.1}),
         token("slo", [("m1", 0.5), ("m2", 0.2)], 0.5, {"m1": 0.2}), token(" now")]
    )  # fmt: skip
    cells = [[cell.strip() for cell in line.split("  ") if cell.strip()] for line in lines]
    assert cells == [
        ["WORDS", "FROM", "ENTRIES", "LIKELY", "WITHOUT m1", "WITHOUT ANY"],
        ["She lives", "from the weights"],
        ["Oslo", "copied", "m1 90%, m2 20%", "0.400", "0.020", "0.062"],
        ["now", "from the weights"],
    ]


@pytest.mark.parametrize(("entries", "is_said"), [([], True), ([{"id": "m1", "weight": 0.9}], False)])
def test_entries_of_which_no_word_was_read_are_told_as_such(entries, is_said):
    read = {"name": "facts", "revision": 3, "read": "layers", "entries": [{"id": "m1", "text": "Ada lives in Oslo."}]}
    lines = found_lines(read, [{"token": " Oslo", "entries": entries}])
    assert lines[:2] == ["the model's layers had of facts, revision 3:", "m1  Ada lives in Oslo."]
    assert ("No word came from them." in lines) is is_said
