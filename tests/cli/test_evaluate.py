"""`nightschool eval`: what is right, what is wrong, and what could not be asked."""

import json

import pytest

from nightschool.cli.main import main
from nightschool.models.export import save_version_folder
from tests.support.engine_setups import lively_model
from tests.support.tokenizers_for_tests import byte_tokenizer

CONTEXT_TOKENS = 96


@pytest.fixture
def ask(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("NIGHTSCHOOL_HOME", str(tmp_path / "home"))
    model = lively_model("tiny-llama")
    model.config.max_position_embeddings = CONTEXT_TOKENS
    save_version_folder(model, byte_tokenizer(), tmp_path / "folder")

    def run(*rows, words=("--json",)):
        (tmp_path / "q.json").write_text(json.dumps([{"query": q, "retrieved": a} for q, a in rows]))
        code = main(["eval", "./folder", "--suite", "q.json", "--max-new-tokens", "4", *words])
        return code, capsys.readouterr()

    return run


def test_questions_that_do_not_fit_are_listed_and_count_as_wrong(ask):
    rows = [("is it so?", "yes"), ("x" * CONTEXT_TOKENS, "yes")]
    code, output = ask(*rows)
    data = json.loads(output.out)
    assert code == 0
    assert data["questions"]["new"]["asked"] == 2
    (one,) = data["not_asked"]
    assert one["question"] == "x" * CONTEXT_TOKENS
    assert one["tokens"] > one["context_tokens"] == CONTEXT_TOKENS
    _, output = ask(*rows, words=())
    assert "not asked  1, too long for the model's context, counted as wrong" in output.out
    assert f"{one['tokens']} of {CONTEXT_TOKENS} tokens  xxx" in output.out
    assert "held-out" in output.out


def test_a_folder_has_no_questions_of_its_own(ask, capsys):
    ask(("is it so?", "yes"))
    assert main(["eval", "./folder"]) == 2
    assert "Name a file: --suite FILE" in capsys.readouterr().err
