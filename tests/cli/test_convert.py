"""`nightschool data convert`: files of other programs become rows that a recipe studies, and bad ones are named by line."""

import json

import pytest

from nightschool.cli.main import main


def question(**changes):
    return {"question": "Who?", "options": "A:Ada,B:Bob", "correct_answer": "A:Ada", "uuid": "u1"} | changes


@pytest.fixture
def omcq(tmp_path, monkeypatch):
    """Write what an OMCQ file holds, one row a line."""
    monkeypatch.chdir(tmp_path)

    def write(*rows):
        path = tmp_path / "omcq.json"
        path.write_text("[\n" + ",\n".join(json.dumps(row) for row in rows) + "\n]\n", "utf-8")
        return ["data", "convert", str(path), "--from", "omcq", "--output", "sft.jsonl"]

    return write


def rows(folder):
    return [json.loads(line) for line in (folder / "sft.jsonl").read_text("utf-8").splitlines()]


def test_questions_become_conversations_that_a_recipe_reads(omcq, tmp_path, capsys):
    assert main(omcq({"target": [question(), question(question="Where?")]}, question(question="When?"))) == 0
    assert rows(tmp_path)[0] == {
        "conversations": [
            {"role": "user", "content": "Who?\nA:Ada,B:Bob\n请选择正确答案。"},
            {"role": "assistant", "content": "A:Ada"},
        ]
    }
    assert len(rows(tmp_path)) == 3
    capsys.readouterr()
    assert main(["--json", "data", "check", "sft.jsonl"]) == 0
    assert json.loads(capsys.readouterr().out)["examples"] == 3


def test_max_samples_ends_it(omcq, tmp_path):
    assert main([*omcq({"target": [question()] * 5}), "--max-samples", "2"]) == 0
    assert len(rows(tmp_path)) == 2


def test_bad_rows_are_named_by_line_and_nothing_is_written(omcq, tmp_path, capsys):
    words = omcq(question(), {"target": [question(options=""), question()]}, {"target": "x"}, question(question=3))
    assert main(words) == 1
    said = capsys.readouterr().err
    assert "omcq.json:3 (target 1): options must be there" in said
    assert "omcq.json:4: target holds str" in said
    assert "omcq.json:5: question must be there" in said
    assert not (tmp_path / "sft.jsonl").exists()
    assert main(["--json", *words, "--skip-bad"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["bad"] == 3
    assert "omcq.json:4" in printed["problems"][1]
    assert len(rows(tmp_path)) == 2


def test_what_is_there_is_kept_and_what_cannot_be_is_refused(omcq, tmp_path, capsys):
    words = omcq(question())
    (tmp_path / "sft.jsonl").write_text("mine")
    assert main(words) == 1
    assert (tmp_path / "sft.jsonl").read_text() == "mine"
    assert main([*words, "--force", "--max-samples", "0"]) == 2
    assert main([*words[:4], "omqc", *words[5:], "--force"]) == 2
    assert main([*omcq({"target": []}), "--force"]) == 1
    assert (tmp_path / "sft.jsonl").read_text() == "mine"
    assert "holds nothing" in capsys.readouterr().err
