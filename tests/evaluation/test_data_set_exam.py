"""A model on data sets: figures of tokens that carry loss, answers judged, and nothing flattered."""

from __future__ import annotations

import json
import math
from types import SimpleNamespace

import pytest
import torch

from nightschool.cli.main import main
from nightschool.data.chat.render import render_example
from nightschool.data.sources.data_sets import NamedRows
from nightschool.data.sources.problems import Problems
from nightschool.data.sources.rows import Row
from nightschool.errors import DataError, NightschoolError, PromptTooLong
from nightschool.evaluation.data_set_exam import examine_data_set, summary
from nightschool.evaluation.programs import sandbox
from nightschool.evaluation.programs.sandbox import why_not_confined
from nightschool.models.export import save_version_folder
from nightschool.models.load import load_base
from nightschool.store.home import Home
from tests.support.engine_setups import lively_model
from tests.support.tokenizers_for_tests import byte_tokenizer

confined = pytest.mark.skipif(why_not_confined() is not None, reason=f"programs cannot be held: {why_not_confined()}")
GSM8K = [{"question": f"{n} + 1?", "answer": f"It is {n + 1}.\n#### {n + 1}"} for n in range(6)]
MBPP = [
    {"text": f"Return {n}.", "code": f"def f():\n    return {n}", "task_id": n, "test_list": [f"assert f() == {n}"]}
    for n in (1, 11, 12, 601)
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    place = tmp_path_factory.mktemp("exam")
    model = lively_model("tiny-llama")
    model.config.max_position_embeddings = 512
    save_version_folder(model, byte_tokenizer(), place / "model")
    for name, rows in (("gsm8k_test", GSM8K), ("mbpp", MBPP)):
        (place / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return place


@pytest.fixture(scope="module")
def loaded(folder):
    return load_base(str(folder / "model"), Home(folder / "home"))


def rows_of(name, fields):
    return NamedRows(name, [], [(f"{name}/{number}", Row(row, "f", number)) for number, row in enumerate(fields)])


class Says:
    """Says to each question what it is told to."""

    ref = "bot"

    def __init__(self, loaded, says):
        self.loaded, self.says, self.asked = loaded, says, []

    def ask_greedily(self, request_id, messages, max_new_tokens):
        self.asked.append(request_id)
        said = self.says(messages[-1].content)
        if isinstance(said, Exception):
            raise said
        fails = said is None
        return SimpleNamespace(
            result=lambda: SimpleNamespace(
                text=said or "", finish_reason="error" if fails else "stop", error="nan" if fails else None
            )
        )


def test_loss_and_accuracy_are_those_of_the_tokens_of_answers(loaded):
    rows = rows_of("gsm8k", GSM8K)
    model = Says(loaded, lambda _: "5")
    figures = examine_data_set(model, rows, max_seq_len=400, num_questions=3, max_new_tokens=8).tokens
    total, correct, tokens = 0.0, 0, 0
    for example in rows.examples(rows.held_out, "plain", Problems()):
        rendered = render_example(loaded.tokenizer, example, 400)
        with torch.no_grad():
            logits = loaded.model(torch.tensor([rendered.input_ids])).logits[0].double()
        for place, weight in enumerate(rendered.weights):
            if weight:
                label = rendered.input_ids[place]
                total -= float(torch.log_softmax(logits[place - 1], -1)[label])
                correct += int(logits[place - 1].argmax()) == label
                tokens += 1
    assert figures.tokens == tokens
    assert figures.samples == len(GSM8K)
    assert figures.correct == correct
    assert figures.loss == pytest.approx(total / tokens, abs=1e-4)
    assert figures.perplexity_uncapped == pytest.approx(math.exp(figures.loss))
    cut = examine_data_set(model, rows, max_seq_len=40, num_questions=1, max_new_tokens=8).tokens
    assert cut.cut_tokens == tokens - cut.tokens > 0


def test_answers_are_counted_by_their_last_number(loaded):
    def says(question):
        number = int(question.split()[0])
        return [f"So #### {number + 1}", "I think 2 it is", "", "17", PromptTooLong(999, 1, 512), "6.0"][number]

    figures = examine_data_set(
        Says(loaded, says), rows_of("gsm8k", GSM8K), max_seq_len=400, num_questions=None, max_new_tokens=8
    )
    assert [one.correct for one in figures.answers] == [True, True, False, False, False, True]
    assert figures.answers[4].why.startswith("not asked: its 999 tokens")
    assert figures.to_json()["exact_match"] == figures.share.to_json()
    assert (figures.share.count, figures.share.asked) == (3, 6)


@confined
def test_programs_are_counted_by_their_tests(loaded, tmp_path):
    escape = tmp_path / "escaped"
    says = {
        "Return 11.": "```python\ndef f():\n    return 11\n```",
        "Return 12.": f"```python\nopen({str(escape)!r}, 'w')\ndef f():\n    return 12\n```",
        "Return 601.": "while True: pass",
        "Return 1.": "import os\nos._exit(0)",
    }
    model = Says(loaded, lambda question: says[question.split("\n")[0]])
    figures = examine_data_set(model, rows_of("mbpp", MBPP[:3]), max_seq_len=400, num_questions=None, max_new_tokens=8)
    found = {one.question.split("\n")[0]: (one.correct, one.why) for one in figures.answers}
    assert found["Return 11."] == (True, "")
    assert found["Return 12."][0] is False
    assert "PermissionError" in found["Return 12."][1]
    assert found["Return 1."] == (False, "ended: it ended itself, with 0, before its last line")
    assert not escape.exists()
    assert figures.to_json()["pass_at_1"]["share"] == pytest.approx(1 / 3)


def test_without_programs_none_is_asked(loaded):
    model = Says(loaded, lambda _: "x")
    figures = examine_data_set(
        model, rows_of("mbpp", MBPP), max_seq_len=400, num_questions=None, max_new_tokens=8, confinement=None
    )
    assert (model.asked, figures.answers) == ([], [])
    assert "pass_at_1" not in figures.to_json()
    assert figures.tokens.samples == 4


def test_what_could_not_be_counted_is_an_error(loaded):
    with pytest.raises(NightschoolError, match="failed at the question '0 \\+ 1\\?': nan"):
        examine_data_set(
            Says(loaded, lambda _: None), rows_of("gsm8k", GSM8K), max_seq_len=400, num_questions=1, max_new_tokens=8
        )
    with pytest.raises(DataError, match="'answer' is missing or blank"):
        examine_data_set(
            Says(loaded, lambda _: ""),
            rows_of("gsm8k", [{"question": "1?"}]),
            max_seq_len=9,
            num_questions=1,
            max_new_tokens=8,
        )
    assert summary([]) == {}


# --- the command ---


@pytest.fixture
def evaluate(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("NIGHTSCHOOL_HOME", str(tmp_path / "home"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)

    def run(*words):
        code = main(["eval", str(folder / "model"), "--data-dir", str(folder), "--max-new-tokens", "4", *words])
        return code, capsys.readouterr()

    return run


@confined
def test_the_file_of_figures_has_what_pragnosias_has(evaluate, folder, tmp_path):
    words = ["--dataset", "gsm8k,mbpp", "--max-samples", "3", "--sample", "2", "--show-examples", "2"]
    code, output = evaluate(*words, "--output-file", "r.json", "--json")
    assert code == 0, output.err
    data = json.loads((tmp_path / "r.json").read_text())
    assert data == json.loads(output.out)
    assert data["checkpoint"] == str(folder / "model")
    assert set(data["results"]) == {"gsm8k", "mbpp"}
    for figures in data["results"].values():
        assert figures["perplexity"] == pytest.approx(math.exp(min(figures["loss"], 20)))
        assert figures["perplexity_uncapped"] == pytest.approx(math.exp(figures["loss"]))
        assert figures["token_accuracy"] == pytest.approx(figures["correct_tokens"] / figures["total_tokens"])
    assert [figures["total_samples"] for figures in data["results"].values()] == [3, 2]
    assert [one["id"] for one in data["examples"]] == ["gsm8k/test/0", "gsm8k/test/1", "mbpp/11", "mbpp/12"]
    assert data["results"]["gsm8k"]["exact_match"]["asked"] == data["results"]["mbpp"]["pass_at_1"]["asked"] == 2
    means = data["summary"]
    assert means["avg_loss"] == pytest.approx(sum(one["loss"] for one in data["results"].values()) / 2)
    assert set(means) == {"avg_loss", "avg_perplexity", "avg_token_accuracy"}


def test_what_is_missing_is_said_before_a_model_is_loaded(evaluate):
    code, output = evaluate("--dataset", "all", "--programs", "off")
    assert code == 4
    assert "the data set alpaca is not in" in output.err
    assert "put alpaca.jsonl into" in output.err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--dataset", "chta"], "did you mean chat?"),
        (["--dataset", "gsm8k", "--suite", "new"], "--suite, --dataset and --tasks each say what is asked"),
        (["--dataset", "gsm8k", "--max-samples", "0"], "--max-samples is 0; it must be 1 or more"),
        (["--suite", "general"], "belong to --dataset"),
    ],
)
def test_what_makes_no_sense(evaluate, words, said):
    code, output = evaluate(*words)
    assert code == 2
    assert said in output.err


def test_programs_are_refused_where_nothing_holds_them(evaluate, monkeypatch):
    monkeypatch.setattr(sandbox, "why_not_confined", lambda: "the kernel has no seccomp")
    code, output = evaluate("--dataset", "mbpp")
    assert code == 2
    assert "the kernel has no seccomp" in output.err
    code, output = evaluate("--dataset", "mbpp", "--programs", "off", "--json")
    assert code == 0
    assert "pass_at_1" not in json.loads(output.out)["results"]["mbpp"]
