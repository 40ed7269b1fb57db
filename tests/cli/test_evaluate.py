"""`nightschool eval`: what is right, what is wrong, and what could not be asked."""

import json

import pytest

from nightschool.cli.eval_judge import judge_named
from nightschool.cli.main import main
from nightschool.config.judge import Judge
from nightschool.models.export import save_version_folder
from tests.evaluation.test_model_judge import served
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


def test_a_model_may_judge_what_was_answered_and_what_it_changes_is_told(ask, tmp_path):
    rows = [("is it so?", "yes"), ("is it not?", "no")]
    file = tmp_path / "answers.jsonl"
    with served(lambda one: "right" if one["expected"] == "yes" else "who knows") as (judge, asked):
        words = ("--judge", judge.url, "--judge-model", "wise")
        code, output = ask(*rows, words=(*words, "--json", "--output-file", str(file)))
        _, told = ask(*rows, words=words)
    assert code == 0
    data = json.loads(output.out)
    assert data["questions"]["new"]["correct"] == 1
    assert data["judge"] | {"changed": 0} == {
        "name": f"wise at {judge.url}",
        "asked": 2,
        "unclear": 1,
        "changed": 0,
        "failure": None,
    }
    (changed,) = data["judge"]["changed"]
    assert (changed["question"], changed["correct"], changed["overruled"]) == ("is it so?", True, True)
    assert [json.loads(line)["correct"] for line in file.read_text().splitlines()].count(True) == 1
    assert "1 are right and 0 wrong against the rules; 1 replies were unclear" in told.out
    assert "(the rules said wrong)" in told.out
    assert len(asked) == 4
    code, output = ask(*rows, words=("--json", *words))
    assert code == 1
    assert "could not be asked" in json.loads(output.out)["judge"]["failure"]
    assert json.loads(output.out)["questions"]["new"]["correct"] == 0


def test_whom_the_recipe_names_judges_unless_the_command_line_says_otherwise(ask, capsys):
    of_recipe = Judge(url="http://127.0.0.1:1/v1", model="wise", timeout=5)
    assert judge_named(of_recipe, None, None) == of_recipe
    assert judge_named(of_recipe, None, "other").model == "other"
    assert judge_named(of_recipe, "http://localhost:2/v1/", None).url == "http://localhost:2/v1"
    assert judge_named(of_recipe, "off", None) is None
    assert judge_named(Judge(), None, None) is None
    for words, why in (
        (("--judge", "localhost"), "is not an address"),
        (("--judge", "http://localhost:2/v1"), "name it in --judge-model"),
        (("--judge-model", "wise"), "there is no server to ask"),
        (("--judge", "off", "--judge-model", "wise"), "Leave one of them out"),
    ):
        code, output = ask(("a?", "b"), words=words)
        assert code == 2
        assert why in output.err
    assert main(["eval", "./folder", "--suite", "editing", "--judge", "off"]) == 2
    assert "for questions with an answer" in capsys.readouterr().err
