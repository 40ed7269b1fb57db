"""chat and ask: commands, marks, Ctrl-C, a model here and a model behind a server."""

import io
import json
from http.client import IncompleteRead
from pathlib import Path
from types import SimpleNamespace
from typing import ClassVar

import pytest

from nightschool.cli import chat as chat_module
from nightschool.cli.chat.backends import ContextFull, Reply
from nightschool.cli.chat.commands import COMMANDS
from nightschool.cli.chat.local_backend import LocalBackend
from nightschool.cli.chat.modes import MODES
from nightschool.cli.chat.params import SETTINGS, Params
from nightschool.cli.chat.server_backend import ServerBackend
from nightschool.cli.main import main
from nightschool.config.data_sets import DATA_SETS
from nightschool.data.example import Message
from nightschool.data.sources.row_templates import RowTemplate
from nightschool.data.sources.rows import Row
from nightschool.engine.request import SamplingParams
from nightschool.errors import NightschoolError, NotFound, UsageError
from nightschool.feedback.conversations import ConversationStore
from nightschool.feedback.pins import Pins
from nightschool.store.database import Database
from nightschool.store.home import Home
from tests.support.fake_slot import FakeSlot
from tests.support.live_server import live


class Parrot:
    """Repeats the last question, in two pieces; with `stops_at` somebody presses Ctrl-C after so many pieces.

    Its context holds so many characters, of turns and of an answer.
    """

    def __init__(self, home, model, *, record, memory=None, experts_resident=None, stops_at=None, context=1_000_000):
        self.model, self.record, self.marks, self.asked, self.params = model, record, [], [], []
        self.stops_at, self.closed, self.context = stops_at, False, context

    def stream(self, messages, params, reply, *, shorten=False):
        characters = sum(len(turn.content) for turn in messages)
        if characters + (1 if shorten else params.max_new_tokens) > self.context:
            raise ContextFull("There is no room for it.")
        self.asked.append([f"{turn.role}: {turn.content}" for turn in messages])
        self.params.append(params)
        reply.request_id, reply.version = f"req-{len(self.asked)}", f"{self.model}@v"
        for number, piece in enumerate((f"{messages[-1].content}", "!")):
            if number == self.stops_at:
                raise KeyboardInterrupt
            reply.parts.append(piece)
            yield piece
        reply.finish_reason = "stop"

    def feedback(self, request_id, rating, correction):
        if not self.record:
            raise UsageError("Answers are not kept here.")
        self.marks.append((request_id, rating, correction))

    def switch(self, model):
        if model == "nobody":
            raise NotFound("There is no 'nobody'.")
        self.model = model

    def close(self):
        self.closed = True


@pytest.fixture
def talk(tmp_path, monkeypatch, capsys):
    """Type lines into a chat; returns what was printed and the parrot that answered."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("NIGHTSCHOOL_HOME", str(tmp_path / "home"))
    made = []

    def type_lines(*lines, options=(), **traits):
        def backend(home, model, *, record, memory=None, experts_resident=None):
            made.append(Parrot(home, model, record=record, memory=memory, **traits))
            return made[-1]

        monkeypatch.setattr(chat_module, "LocalBackend", backend)
        monkeypatch.setattr("sys.stdin", io.StringIO("".join(line + "\n" for line in lines)))
        assert main(["chat", "bot", *options]) == 0
        assert made[-1].closed
        return capsys.readouterr().out.splitlines(), made[-1]

    return type_lines


def test_a_conversation_keeps_its_turns_and_ends_with_the_input(talk):
    out, parrot = talk("hello", "again", options=["--system", "Be kind."])
    assert out == ["hello!", "again!"]
    assert parrot.asked[1] == ["system: Be kind.", "user: hello", "assistant: hello!", "user: again"]


@pytest.mark.parametrize("word", ["/exit", "/bye", "/quit", "/q"])
def test_leaving_has_several_spellings(word, talk):
    assert talk("hello", word, "never asked")[0] == ["hello!"]


def test_help_lists_every_command(talk):
    out, _ = talk("/help")
    assert [line.split()[0] for line in out] == [f"/{name}" for name in COMMANDS]
    assert all(len(line.split()) > 2 for line in out)


def test_the_page_shows_every_command_and_every_parameter():
    page = (Path(__file__).parents[2] / "docs" / "chat.md").read_text("utf-8")
    assert [name for name in COMMANDS if f"`/{name}" not in page] == []
    assert [name for name in SETTINGS if f"| `--{name.replace('_', '-')}`" not in page] == []


def test_an_unknown_command_is_an_error_and_the_chat_goes_on(talk):
    assert talk("/hlep", "hello")[0] == ["error: Unknown command: /hlep. /help lists those that there are.", "hello!"]


def test_clear_undo_and_retry_change_what_is_asked(talk):
    out, parrot = talk("one", "/retry", "two", "/undo", "three", "/clear", "four")
    assert "Conversation history cleared." in out
    assert [len(asked) for asked in parrot.asked] == [1, 1, 3, 3, 1]
    assert parrot.asked[3] == ["user: one", "assistant: one!", "user: three"]


def test_retry_asks_a_question_again_that_was_never_answered(talk):
    out, parrot = talk("one", "/retry", stops_at=0)
    assert out == ["[stopped]", "[stopped]"]
    assert parrot.asked == [["user: one"], ["user: one"]]


@pytest.mark.parametrize("command", ["/retry", "/undo", "/good", "/fix x", "/pin", "/save a.jsonl"])
def test_what_needs_an_answer_says_so_before_there_is_one(command, talk):
    assert talk(command)[0] == ["error: There is no answer yet. Ask something first."]


ALL = "temperature=0 top_p=0.9 top_k=0 max_new_tokens=5 repetition_penalty=1 presence_penalty=0 frequency_penalty=0 seed=7"


def test_parameters_are_set_and_shown(talk):
    out, parrot = talk("/temp 1.2", "/top-p 0.5", "/top-k 40", "/max 9", "/temp", "hello")
    assert out[:5] == [
        "Temperature set to 1.2", "Top-p set to 0.5", "Top-k set to 40", "Maximum length set to 9", "Temperature is 1.2"
    ]  # fmt: skip
    assert parrot.params == [Params(temperature=1.2, top_p=0.5, top_k=40, max_new_tokens=9)]
    assert talk("/temp 0", "/params max_new_tokens=5 seed=7", "/params")[0][1:] == [ALL, ALL]


@pytest.mark.parametrize(
    ("line", "error"),
    [
        ("/temp hot", "Invalid temperature value: 'hot'. Write a number from 0 to 2."),
        ("/temp 9", "Invalid temperature value: 9. Write a number from 0 to 2."),
        ("/temp nan", "Invalid temperature value: nan. Write a number from 0 to 2."),
        ("/top-k 1.5", "Invalid top-k value: '1.5'. Write a whole number from 0 to 1000."),
        ("/top-p 0", "Invalid top-p value: 0. Write a number from 0.001 to 1."),
        ("/max 0", "Invalid maximum length value: 0. Write a whole number from 1 to 65536."),
        ("/params temperature", "Invalid temperature value: ''. Write a number from 0 to 2."),
        ("/code sort a list", "/code takes nothing. Write /code, and what you ask on the next line."),
    ],
)
def test_a_wrong_value_is_an_error_that_changes_nothing(line, error, talk):
    out, parrot = talk(line, "hello")
    assert out == [f"error: {error}", "hello!"]
    assert parrot.params == [Params()]
    assert talk("/params foo=1")[0][0].startswith("error: There is no parameter 'foo'")


def test_options_set_parameters_and_are_checked(talk, capsys):
    _, parrot = talk("hello", options=["-t", "0", "--max-length", "3", "--top-k", "5", "--repetition-penalty", "1.2"])
    assert parrot.params == [Params(temperature=0, max_new_tokens=3, top_k=5, repetition_penalty=1.2)]
    assert main(["chat", "bot", "--temperature", "-1"]) == 2
    assert "Invalid temperature value: -1. Write a number from 0 to 2." in capsys.readouterr().err


def test_in_code_mode_a_line_is_a_task_to_write_code_for(talk):
    out, parrot = talk("/code", "sort a list", "/chat", "thanks")
    assert [out[0], out[-2]] == ["Switched to code mode", "Switched to chat mode"]
    assert parrot.asked[1] == [
        "user: ### Code Task:\nsort a list\n\n### Solution:",
        "assistant: ### Code Task:\nsort a list\n\n### Solution:!",
        "user: thanks",
    ]
    assert talk("sort", options=["--code"])[1].asked == [["user: ### Code Task:\nsort\n\n### Solution:"]]


def test_code_mode_asks_as_data_sets_under_headings_are_trained():
    row = Row({"instruction": "sort a list", "output": "sorted"}, "codealpaca", 1)
    example = RowTemplate(DATA_SETS["codealpaca"].headings, "{output}").example(row)
    assert MODES["code"]("sort a list") == example.messages[0].content


def test_the_oldest_turns_give_way_when_the_context_is_full_and_that_is_said(talk, tmp_path):
    # Of twenty characters, five are for the answer; a question and its answer take seven.
    options = ["--max-new-tokens", "5", "--system", "S"]
    out, parrot = talk("one", "two", "six", "ten", "/save all.jsonl", context=20, options=options)
    asked = [" ".join(turn.partition(": ")[2] for turn in turns) for turns in parrot.asked]
    assert asked == ["S one", "S one one! two", "S two two! six", "S six six! ten"]
    assert [line.partition(".")[0] for line in out if "context is full" in line] == [
        "The context is full: the model no longer sees the oldest 2 turns (2 more than before)",
        "The context is full: the model no longer sees the oldest 4 turns (2 more than before)",
    ]
    [row] = map(json.loads, (tmp_path / "all.jsonl").read_text().splitlines())
    assert [turn["content"] for turn in row["messages"]] == [
        "S",
        "one",
        "one!",
        "two",
        "two!",
        "six",
        "six!",
        "ten",
        "ten!",
    ]


def test_after_clear_undo_and_another_model_the_context_is_looked_at_anew(talk):
    out, parrot = talk(
        "one", "two", "six", "/model big", "ten", "/clear", "new", context=19, options=["--max-length", "5"]
    )
    assert parrot.asked[2:] == [
        ["user: two", "assistant: two!", "user: six"], ["user: six", "assistant: six!", "user: ten"], ["user: new"],
    ]  # fmt: skip
    assert sum("(4 more than before)" in line for line in out) == 1


def test_a_question_that_leaves_less_room_than_asked_gets_a_shorter_answer_and_one_that_leaves_none_an_error(talk):
    out, parrot = talk("one", "four", "fifteen letters", "six", context=7, options=["--max-length", "5"])
    assert out == [
        "The context has no room for an answer of 5 tokens: this one ends where the context does.",
        "one!",
        "The context is full: the model no longer sees the oldest 2 turns (2 more than before). /clear starts anew, a "
        "smaller /max leaves more room.",
        "The context has no room for an answer of 5 tokens: this one ends where the context does.",
        "four!",
        "error: There is no room for it.",
        "The context has no room for an answer of 5 tokens: this one ends where the context does.",
        "six!",
    ]  # fmt: skip
    assert parrot.asked[-1] == ["user: six"]


def test_model_and_system_are_switched_while_talking(talk):
    out, parrot = talk("/model other", "/model nobody", "/model", "/system Be brief.", "hello", "/system", "hello")
    assert out[:3] == ["other", "error: There is no 'nobody'.", "other"]
    assert parrot.asked[0][0] == "system: Be brief."
    assert parrot.asked[1][0] == "user: hello"


def test_answers_are_marked_by_their_request_id_and_a_correction_replaces_the_answer(talk):
    _, parrot = talk("one", "/good", "two", "/bad", "three", "/fix The right one.", "four", options=["--record"])
    assert parrot.marks == [("req-1", "good", None), ("req-2", "bad", None), ("req-3", "bad", "The right one.")]
    assert parrot.asked[3][-2:] == ["assistant: The right one.", "user: four"]


def test_without_recording_nothing_can_be_marked(talk):
    assert talk("one", "/good", "/fix")[0][1:] == [
        "error: Answers are not kept here.",
        "error: /fix needs the right answer. Write /fix The right answer.",
    ]


def test_save_appends_data_that_can_be_trained(talk, tmp_path):
    talk("one", "/save chats.jsonl", "two", "/save chats.jsonl", options=["--system", "S"])
    rows = [json.loads(line) for line in (tmp_path / "chats.jsonl").read_text().splitlines()]
    assert [len(row["messages"]) for row in rows] == [3, 5]
    assert main(["data", "check", "chats.jsonl"]) == 0


def test_load_goes_on_with_the_last_conversation_of_a_file(talk, tmp_path):
    talk(
        "one",
        "/save chats.jsonl",
        "two",
        "/save chats.jsonl",
        "/clear",
        "three",
        "/save chats.jsonl",
        options=["--system", "S"],
    )
    (tmp_path / "alpaca.json").write_text('[{"instruction": "Where?", "output": "Here."}]')
    out, parrot = talk("/load chats.jsonl", "/good", "four", "/load alpaca.json", "/retry")
    assert out[0] == "Loaded 3 turns, the last conversation of chats.jsonl."
    assert out[1] == "error: The last answer is not one of this conversation. Ask something first."
    assert parrot.asked == [["system: S", "user: three", "assistant: three!", "user: four"], ["user: Where?"]]


@pytest.mark.parametrize(
    ("line", "error"),
    [
        ("/load absent.jsonl", "absent.jsonl"),
        ("/load text.txt", "text.txt has no conversation. /save writes one."),
        ("/load broken.jsonl", "broken.jsonl"),
        ("/load", "/load needs a file. Write /load chats.jsonl."),
        ("/save no/such/folder.jsonl", "no/such/folder.jsonl cannot be written: No such file or directory. Name another file."),
        ("/save", "/save needs a file. Write /save chats.jsonl."),
    ],
)  # fmt: skip
def test_a_file_that_is_none_leaves_the_conversation_as_it_is(line, error, talk, tmp_path):
    (tmp_path / "text.txt").write_text("No turns.")
    (tmp_path / "broken.jsonl").write_text('{"messages": [{"role": "nobody"}]}')
    out, parrot = talk("one", line, "two")
    assert out[1].startswith("error: ")
    assert error in "\n".join(out)
    assert parrot.asked[-1] == ["user: one", "assistant: one!", "user: two"]


def test_pin_keeps_question_and_answer(talk, tmp_path):
    talk("Where?", "/pin")
    assert [(pin.question, pin.answer) for pin in Pins(Database(Home(tmp_path / "home")).connect()).ls("bot")] == [
        ("Where?", "Where?!")
    ]


def test_ctrl_c_stops_the_answer_and_what_was_said_stays(talk):
    out, parrot = talk("one", "two", stops_at=1)
    assert out == ["one [stopped]", "two [stopped]"]
    assert parrot.asked[1] == ["user: one", "assistant: one", "user: two"]


def test_ctrl_c_twice_at_the_prompt_leaves(talk, monkeypatch):
    class Impatient(io.StringIO):
        def readline(self, *_):
            raise KeyboardInterrupt

    lines = Impatient()
    monkeypatch.setattr(io, "StringIO", lambda _text: lines)
    assert talk()[0] == ["Ctrl-C again, or /exit, leaves."]


def test_with_json_every_answer_is_one_object_on_a_line(talk):
    out, _ = talk("one", "/params", "two", options=["--json"])
    assert [json.loads(line) for line in out] == [
        {"request_id": f"req-{k}", "version": "bot@v", "answer": f"{word}!", "finish_reason": "stop"}
        for k, word in ((1, "one"), (2, "two"))
    ]


def test_ask_prints_one_answer_or_several_side_by_side(talk, capsys, monkeypatch):
    talk()
    assert main(["ask", "Where?"]) == 0
    assert capsys.readouterr().out == "Where?!\n"
    assert main(["ask", "Where?", "-m", "a", "-m", "b"]) == 0
    assert capsys.readouterr().out == "a@v\nWhere?!\n\nb@v\nWhere?!\n"
    monkeypatch.setattr("sys.stdin", io.StringIO("From a pipe?\n"))
    assert main(["ask", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["answer"] == "From a pipe?!"
    assert main(["ask", ""]) == 2


def test_a_server_is_asked_streaming_and_marks_go_to_it(tmp_path):
    home = Home(tmp_path).ensure()
    conversations = ConversationStore(Database(home).connect())
    with live(FakeSlot(), record_conversations=True, conversations=conversations) as server:
        backend = ServerBackend(server.url + "/v1/", None)
        reply = Reply()
        pieces = list(backend.stream([Message("user", "hi")], Params(temperature=0, seed=1), reply))
        assert "".join(pieces) == reply.text == "Hello, wörld!"
        assert len(pieces) > 1
        assert reply.finish_reason == "stop"
        assert "@" in reply.version
        backend.feedback(reply.request_id, "bad", "Good morning!")
        kept = conversations.select(corrected=True)
        assert [(one.answer, one.correction) for one in kept] == [("Hello, wörld!", "Good morning!")]
        with pytest.raises(NotFound, match="The server answered 404"):
            backend.feedback("req-unknown", "good", None)
        backend.switch("nobody")
        with pytest.raises(NotFound, match="nobody"):
            list(backend.stream([Message("user", "hi")], Params(), Reply()))


def test_the_whole_command_against_a_server(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with live(FakeSlot()) as server:
        assert main(["ask", "hi", "--url", server.url]) == 0
        assert capsys.readouterr().out == "Hello, wörld!\n"
        monkeypatch.setattr("sys.stdin", io.StringIO("hi\n/good\n"))
        assert main(["chat", "--url", server.url]) == 0
        assert "error: The server answered 409" in capsys.readouterr().out


def test_a_server_gets_every_parameter_and_the_turns_that_its_context_has_room_for(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("NIGHTSCHOOL_HOME", str(tmp_path / "home"))
    slot = FakeSlot(context_tokens=200)  # of bytes, and a question with its answer takes some 40
    lines = [
        "/params top_k=7 repetition_penalty=1.5 presence_penalty=0.25 frequency_penalty=-0.5 seed=3",
        "one",
        "/max 20",
    ]
    monkeypatch.setattr("sys.stdin", io.StringIO("\n".join([*lines, "two", "six", "q" * 110])))
    with live(slot) as server:
        assert main(["chat", "--url", server.url, "--json"]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row["answer"] for row in rows] == ["Hello, wörld!"] * 4
    assert [row.get("turns_left_out", 0) for row in rows] == [0, 0, 0, 4]
    asked = [handle.request for handle in slot.current.engine.handles]
    assert asked[0].params == SamplingParams(
        max_new_tokens=asked[0].params.max_new_tokens, temperature=0.7, top_p=0.9, top_k=7, repetition_penalty=1.5,
        presence_penalty=0.25, frequency_penalty=-0.5, seed=3,
    )  # fmt: skip
    # The first asked for more than the context holds, and got what was left.
    assert [request.params.max_new_tokens for request in asked] == [200 - len(asked[0].prompt_ids), 20, 20, 20]


def test_an_answer_that_fails_on_the_server_is_an_error(tmp_path):
    slot = FakeSlot(answer=lambda prompt: "Hello." * 100, seconds_per_token=0.001)
    with live(slot) as server:
        pieces = ServerBackend(server.url, None).stream([Message("user", "hi")], Params(), Reply())
        assert next(pieces)
        slot.current.engine.fails_with = RuntimeError("broken")
        with pytest.raises(NightschoolError, match="The server ended the answer"):
            list(pieces)


class BrokenResponse(io.BytesIO):
    """An answer whose connection is lost after its first words."""

    headers: ClassVar = {}

    def __iter__(self):
        yield b'data: {"id": "1", "choices": [{"delta": {"content": "Hel"}}]}'
        raise IncompleteRead(b"")


def test_a_connection_that_is_lost_is_an_error_and_the_chat_goes_on(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(ServerBackend, "_open", lambda self, path, body: BrokenResponse())
    monkeypatch.setattr("sys.stdin", io.StringIO("one\ntwo\n"))
    assert main(["chat", "bot", "--url", "http://127.0.0.1:1"]) == 0
    error = "error: The answer of http://127.0.0.1:1 broke off: IncompleteRead(0 bytes read). Ask again with /retry."
    assert capsys.readouterr().out.splitlines() == ["Hel", error, "Hel", error]


def test_a_server_with_keys_gets_the_key_of_the_environment(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with live(FakeSlot(), wait=True, api_keys=("secret-key-1",)) as server:
        monkeypatch.delenv("NIGHTSCHOOL_API_KEY", raising=False)
        assert main(["ask", "hi", "--url", server.url]) == 1
        assert "The server answered 401" in capsys.readouterr().err
        monkeypatch.setenv("NIGHTSCHOOL_API_KEY", "secret-key-1")
        assert main(["ask", "hi", "--url", server.url]) == 0


def test_no_server_is_an_error_with_a_remedy(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["ask", "hi", "--url", "http://127.0.0.1:9"]) == 4
    assert "No server answers at http://127.0.0.1:9" in capsys.readouterr().err
    assert main(["ask", "hi", "--url", "ftp://x"]) == 2
    assert main(["chat", "--url", "http://127.0.0.1:9", "--record"]) == 2
    assert main(["chat", "--url", "http://127.0.0.1:9", "--experts-resident", "4"]) == 2


@pytest.mark.parametrize(
    ("model", "ref", "kept"),
    [
        ("bot", "bot@20261121_060000", ("bot", "20261121_060000")),
        ("bot@champion", "bot@20261121_060000", ("bot", "20261121_060000")),
        ("./folder", "./folder", ("local", "./folder")),
        ("org/model", "org/model", ("local", "org/model")),
        ("gpt2", "gpt2", ("local", "gpt2")),
    ],
)
def test_a_local_answer_is_kept_with_the_version_as_a_server_keeps_it(model, ref, kept, tmp_path, monkeypatch):
    def answer_hello(request_id, messages, params, *, shorten):
        chunk = SimpleNamespace(error=None, finish_reason="stop", text="Hello.")
        handle = SimpleNamespace(chunks=lambda: iter([chunk]), cancel=lambda: None)
        return SimpleNamespace(handle=handle, found=None)

    loaded = SimpleNamespace(ref=ref, begin=answer_hello, reads=None, close=lambda: None)
    monkeypatch.setattr("nightschool.engine.local_model.LocalModel", lambda home, model, **_: loaded)
    home = Home(tmp_path).ensure()
    backend, reply = LocalBackend(home, model, record=True), Reply()
    assert list(backend.stream([Message("user", "hi")], Params(), reply)) == ["Hello."]
    one = ConversationStore(Database(home).connect()).get(reply.request_id)
    assert (one.model, one.version) == kept
