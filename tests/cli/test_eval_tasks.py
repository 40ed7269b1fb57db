"""Tasks of lm-eval, asked by its own harness of a model that is loaded here, with data of one's own."""

import json
import sys

import pytest
import torch

from nightschool.cli.main import main
from nightschool.models.export import save_version_folder
from tests.support.engine_setups import lively_model
from tests.support.tokenizers_for_tests import byte_tokenizer

ROWS = [{"question": f"{a} plus {a}", "choices": [str(2 * a), "ab", "xyz"], "answer": a % 3} for a in range(1, 7)]
TASK = """task: sums
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{answer}}}}"
metric_list: [{{metric: acc}}]
metadata: {{version: 3}}
"""


@pytest.fixture
def ask(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("NIGHTSCHOOL_HOME", str(tmp_path / "home"))
    (tmp_path / "tasks").mkdir()
    (tmp_path / "sums.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    (tmp_path / "tasks" / "sums.yaml").write_text(TASK.format(data=tmp_path / "sums.jsonl"))
    model = lively_model("tiny-llama")
    save_version_folder(model, byte_tokenizer(), tmp_path / "folder")

    def run(*words):
        code = main(["eval", "./folder", *words])
        return code, capsys.readouterr()

    run.model = model
    return run


def likeliest(model, row):
    """Which of the choices the model gives most, by probabilities taken here."""
    ids = byte_tokenizer()(row["question"], add_special_tokens=False).input_ids
    sums = []
    for choice in row["choices"]:
        more = byte_tokenizer()(" " + choice, add_special_tokens=False).input_ids
        with torch.no_grad():
            scores = model(torch.tensor([ids + more])).logits[0].log_softmax(-1)
        sums.append(sum(float(scores[len(ids) - 1 + place, token]) for place, token in enumerate(more)))
    return sums.index(max(sums))


@pytest.mark.filterwarnings("ignore")
def test_a_task_with_data_of_ones_own_is_scored_as_its_choices_are_likely(ask, tmp_path):
    pytest.importorskip("lm_eval", reason="the extra `lm-eval` is not installed")
    code, output = ask("--tasks", "sums", "--task-dir", "tasks", "--output-file", "r.json", "--json")
    assert code == 0, output.err
    wanted = sum(likeliest(ask.model, row) == row["answer"] for row in ROWS) / len(ROWS)
    (figure,) = json.loads(output.out)["tasks"]
    assert (figure["task"], figure["metric"], figure["samples"]) == ("sums", "acc", len(ROWS))
    assert figure["value"] == pytest.approx(wanted)
    assert json.loads((tmp_path / "r.json").read_text())["versions"] == {"sums": 3}
    (tmp_path / "sums.jsonl").unlink()
    (tmp_path / "tasks" / "sums.yaml").write_text(TASK.format(data=tmp_path / "none.jsonl"))
    code, output = ask("--tasks", "sums", "--task-dir", "tasks")
    assert code != 0
    assert "lm-eval could not ask sums" in output.err


def test_what_is_missing_or_belongs_elsewhere_is_said(ask, monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    for words, said in (
        (("--tasks", "arc_easy"), "pip install 'nightschool[lm-eval]'"),
        (("--tasks", "arc_easy", "--task-dir", "nowhere"), "nowhere is no folder"),
        (("--tasks", ","), "names no task"),
        (("--tasks", "arc_easy", "--max-samples", "0"), "--max-samples is 0"),
        (("--tasks", "arc_easy", "--dataset", "gsm8k"), "Name one of them"),
        (("--tasks", "arc_easy", "--sample", "3"), "--sample does not belong to --tasks"),
        (("--num-fewshot", "3"), "belong to --tasks"),
    ):
        code, output = ask(*words)
        assert code != 0
        assert said in output.err.replace("\n", " "), words
