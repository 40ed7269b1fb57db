"""chat and ask: commands, marks, Ctrl-C, a model here and a model behind a server."""

import io
import json
from types import SimpleNamespace

import pytest

from nightschool.cli import chat as chat_module
from nightschool.cli.chat.backends import LocalBackend, Params, Reply, ServerBackend
from nightschool.cli.chat.commands import COMMANDS
from nightschool.cli.main import main
from nightschool.data.example import Message
from nightschool.errors import NotFound, UsageError
from nightschool.feedback.conversations import ConversationStore
from nightschool.feedback.pins import Pins
from nightschool.store.database import Database
from nightschool.store.home import Home
from tests.support.fake_slot import FakeSlot
from tests.support.live_server import live


class Parrot:
    """Repeats the last question, in two pieces; with `stops_at` somebody presses Ctrl-C after so many pieces."""

    def __init__(self, home, model, *, record, memory=None, stops_at=None):
        self.model, self.record, self.marks, self.asked, self.params = model, record, [], [], []
        self.stops_at, self.closed = stops_at, False

    def stream(self, messages, params, reply):
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

    def type_lines(*lines, stops_at=None, options=()):
        def backend(home, model, *, record, memory=None):
            made.append(Parrot(home, model, record=record, memory=memory, stops_at=stops_at))
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


def test_an_unknown_command_is_an_error_and_the_chat_goes_on(talk):
    assert talk("/hlep", "hello")[0] == ["error: There is no command /hlep. /help lists them.", "hello!"]


def test_clear_undo_and_retry_change_what_is_asked(talk):
    _, parrot = talk("one", "/retry", "two", "/undo", "three", "/clear", "four")
    assert [len(asked) for asked in parrot.asked] == [1, 1, 3, 3, 1]
    assert parrot.asked[3] == ["user: one", "assistant: one!", "user: three"]


@pytest.mark.parametrize("command", ["/retry", "/undo", "/good", "/fix x", "/pin", "/save a.jsonl"])
def test_what_needs_an_answer_says_so_before_there_is_one(command, talk):
    assert talk(command)[0] == ["error: There is no answer yet. Ask something first."]


def test_parameters_are_set_checked_and_shown(talk):
    out, parrot = talk("/temp 0", "/params max_new_tokens=5 seed=7", "/temp hot", "/temp 9", "/params foo=1", "hello")
    assert out[0] == "temperature=0"
    assert out[1] == "max_new_tokens=5 temperature=0.0 top_p=0.9 seed=7"
    assert out[2].startswith("error: temperature cannot be 'hot'")
    assert out[3].startswith("error: temperature is 9, but lies between 0 and 2")
    assert out[4].startswith("error: There is no parameter 'foo'")
    assert parrot.params[-1] == Params(5, 0.0, 0.9, 7)


def test_options_set_parameters_and_are_checked(talk, capsys):
    _, parrot = talk("hello", options=["-t", "0", "--max-new-tokens", "3"])
    assert parrot.params == [Params(3, 0.0)]
    assert main(["chat", "bot", "--temperature", "-1"]) == 2
    assert "lies between 0 and 2" in capsys.readouterr().err


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
    def answer_hello(request_id, messages, params):
        chunk = SimpleNamespace(error=None, finish_reason="stop", text="Hello.")
        handle = SimpleNamespace(chunks=lambda: iter([chunk]), cancel=lambda: None)
        return SimpleNamespace(handle=handle, found=None)

    loaded = SimpleNamespace(ref=ref, begin=answer_hello, reads=None, close=lambda: None)
    monkeypatch.setattr("nightschool.engine.local_model.LocalModel", lambda home, model, memory: loaded)
    home = Home(tmp_path).ensure()
    backend, reply = LocalBackend(home, model, record=True), Reply()
    assert list(backend.stream([Message("user", "hi")], Params(), reply)) == ["Hello."]
    one = ConversationStore(Database(home).connect()).get(reply.request_id)
    assert (one.model, one.version) == kept
