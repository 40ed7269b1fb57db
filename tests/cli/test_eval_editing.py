"""`nightschool eval --suite editing`, with a model whose layers read, in its prompt, and without a memory."""

import json

import pytest

from nightschool.cli.main import main
from nightschool.memory.store import MemoryStore
from nightschool.store.names import memory_path
from tests.support.memory_setups import reader_bot

CASES = [
    {"subject": "Cid", "prompt": "Cid lives in", "new": "Lima", "paraphrases": ["Where does Cid live?"], "locality": ["Bob says"],
     "absent": ["Zoe lives in"]},
    {"subject": "Ada", "prompt": "Ada lives in", "new": "Rome"},
]  # fmt: skip


@pytest.fixture(scope="module")
def bot(tmp_path_factory):
    return reader_bot(tmp_path_factory.mktemp("home"))


@pytest.fixture
def ask(bot, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("NIGHTSCHOOL_HOME", str(bot.home.path))
    (tmp_path / "cases.jsonl").write_text("\n".join(json.dumps(case) for case in CASES))

    def run(model, *words, plain=False):
        given = [
            "eval",
            model,
            "--suite",
            "editing",
            "--cases",
            str(tmp_path / "cases.jsonl"),
            "--max-new-tokens",
            "4",
            *words,
        ]
        code = main(given if plain else ["--json", *given])
        output = capsys.readouterr()
        return code, output.out if plain or code else json.loads(output.out), output.err

    return run


@pytest.mark.parametrize(
    ("model", "words", "read"), [("reader", (), "layers"), ("bot", ("--memory", "facts"), "prompt")]
)
def test_edits_are_measured_and_no_memory_is_written_to(ask, bot, model, words, read):
    revision = MemoryStore.open(memory_path(bot.home, "facts")).revision
    code, data, _ = ask(model, *words)
    assert code == 0
    assert (data["memory_read"], data["cases"]) == (read, 2)
    asked = {name: share["asked"] for name, share in data["columns"].items()}
    assert asked == {
        "efficacy": 2,
        "paraphrase": 1,
        "locality": 1,
        "abstention": 1,
        "false_answers": 1,
        "deletion_leak": 2,
    }
    # Nobody told of Bob or Zoe what is asked, or of them at all; both are as they were.
    assert data["columns"]["abstention"]["share"] == 1.0
    assert data["columns"]["false_answers"]["share"] == 0.0
    assert data["columns"]["deletion_leak"]["share"] == 0.0
    assert MemoryStore.open(memory_path(bot.home, "facts")).revision == revision


def test_with_the_memory_off_the_base_says_everything(ask, tmp_path):
    code, data, _ = ask(
        "reader", "--memory-read", "off", "--show-examples", "1", "--output-file", str(tmp_path / "wrong.jsonl")
    )
    assert code == 0
    assert data["columns"]["efficacy"] == data["before"]
    assert set(data["columns"]) == {"efficacy", "paraphrase"}
    wrong = [json.loads(line) for line in (tmp_path / "wrong.jsonl").read_text().splitlines()]
    assert data["examples"] == wrong[:1]
    code, shown, _ = ask("reader", "--memory-read", "off", plain=True)
    assert "what the base says of the edits by itself" in shown


@pytest.mark.parametrize(
    ("model", "words", "code", "told"),
    [
        ("bot", ("--memory-read", "layers"), 2, "has no layers that read"),
        ("bot", ("--memory", "absent"), 4, "absent"),
        ("bot", ("--memory", "facts", "--memory-read", "off"), 2, "Leave out one"),
    ],
)
def test_what_cannot_be_asked_is_told(ask, model, words, code, told):
    found, _, error = ask(model, *words, plain=True)
    assert found == code
    assert told in error


def test_its_options_belong_to_it(bot, monkeypatch, capsys):
    monkeypatch.setenv("NIGHTSCHOOL_HOME", str(bot.home.path))
    assert main(["eval", "bot", "--suite", "editing"]) == 2
    assert "--cases" in capsys.readouterr().err
    assert main(["eval", "bot", "--suite", "general", "--memory", "facts"]) == 2
    assert "belong to --suite editing" in capsys.readouterr().err
