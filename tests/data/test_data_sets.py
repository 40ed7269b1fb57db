"""Data sets by name and by recipe: what is trained, what never is, and what is said where one cannot be had."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nightschool.config.data_sets import DATA_SETS, data_sets_named, is_trainable
from nightschool.config.recipe import DataSource, Recipe
from nightschool.data.example import Example, Message
from nightschool.data.sources.data_sets import find_files, last_rows_begin, read_data_set
from nightschool.data.sources.load import Loaded
from nightschool.data.sources.mixing import mixed
from nightschool.data.sources.problems import Problems
from nightschool.data.sources.row_templates import RowTemplate
from nightschool.data.sources.rows import Row
from nightschool.errors import DataError, NotFound
from nightschool.feedback.selection import select
from nightschool.feedback.training_data import load_sources
from nightschool.store.home import Home

ROWS = {
    "alpaca": lambda n: {"instruction": f"Say {n}.", "input": "aloud" if n % 2 else "", "output": f"{n}!", "text": "x"},
    "codealpaca": lambda n: {"instruction": f"Print {n}.", "input": "", "output": f"print({n})"},
    "gsm8k": lambda n: {"question": f"What is {n} + 1?", "answer": f"{n} + 1 = {n + 1}\n#### {n + 1}"},
    "math": lambda n: {"problem": f"Find ${n}$.", "level": "Level 1", "solution": f"It is \\boxed{{{n}}}."},
    "mbpp": lambda n: {
        "text": f"Return {n}.",
        "code": f"def f():\r\n    return {n}",
        "task_id": n,
        "test_setup_code": "",
        "test_list": [f"assert f() == {n}", "assert f() is not None"],
    },
}


def lines(path: Path, rows: list[dict]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def named(folder: Path, **more: object) -> DataSource:
    return DataSource.model_validate({"folder": str(folder), **more})


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """All data sets, small, each as it may lie there."""
    place = tmp_path / "sets"
    lines(place / "alpaca.jsonl", [ROWS["alpaca"](n) for n in range(100)])
    lines(place / "code" / "codealpaca.json", [ROWS["codealpaca"](n) for n in range(40)])
    lines(place / "gsm8k_train.jsonl", [ROWS["gsm8k"](n) for n in range(30)])
    lines(place / "gsm8k_test.jsonl", [ROWS["gsm8k"](n) for n in range(100, 110)])
    lines(place / "mbpp.jsonl", [ROWS["mbpp"](n) for n in (1, 11, 12, 510, 511, 600, 601, 974)])
    for side, first in (("train", 0), ("test", 50)):
        table = pa.Table.from_pylist([ROWS["math"](n) for n in range(first, first + 5)])
        (place / "math" / "algebra").mkdir(parents=True, exist_ok=True)
        pq.write_table(table, place / "math" / "algebra" / f"{side}-00000-of-00001.parquet")
    return place


def test_a_task_is_its_data_sets_each_parted_as_its_makers_part_it(folder: Path) -> None:
    loaded = load_sources([named(folder, dataset="all")], root=folder)
    by_set: dict[str, tuple[list[str], list[str]]] = {name: ([], []) for name in ROWS}
    for side, examples in enumerate((loaded.examples, loaded.held_out)):
        for one in examples:
            by_set[one.id.split("/")[0]][side].append(one.id)
    assert {name: (len(trained), len(held_out)) for name, (trained, held_out) in by_set.items()} == {
        "alpaca": (95, 5),
        "codealpaca": (38, 2),
        "gsm8k": (30, 10),
        "math": (5, 5),
        "mbpp": (2, 3),
    }
    assert by_set["alpaca"][1] == [f"alpaca/{n}" for n in range(95, 100)]
    assert by_set["mbpp"] == (["mbpp/601", "mbpp/974"], ["mbpp/11", "mbpp/12", "mbpp/510"])


def test_no_held_out_row_is_ever_trained(folder: Path, tmp_path: Path) -> None:
    """By ids and by contents, with a cap, in another style, and when the same rows come in by another way."""
    recipe = Recipe.model_validate(
        {
            "base": "new:tiny",
            "data": [
                {"dataset": ["chat", "gsm8k", "mbpp"], "folder": str(folder), "max_samples": 4},
                {"dataset": "gsm8k, chat", "folder": str(folder), "prompt_style": "headings", "max_samples": 7},
                {"path": str(folder / "gsm8k_test.jsonl")},
            ],
            "held_out": {"share": 0.5, "min_examples": 0},
        }
    )
    selection = select(recipe, Home(tmp_path / "home"), tmp_path)
    trained, held_out = ({one.id for one in side if one.id} for side in (selection.train, selection.held_out))
    assert not trained & held_out
    assert held_out >= {f"gsm8k/test/{n}" for n in range(4)} | {f"alpaca/{n}" for n in range(95, 99)}
    assert trained <= {f"gsm8k/train/{n}" for n in range(30)} | {f"alpaca/{n}" for n in range(95)} | {
        "mbpp/601",
        "mbpp/974",
    }
    questions = {row["question"] for row in map(json.loads, (folder / "gsm8k_test.jsonl").read_text().splitlines()[:7])}
    assert not any(one.question in questions for one in selection.train)


def test_the_split_is_of_the_whole_set_whatever_the_cap(folder: Path) -> None:
    few = load_sources([named(folder, dataset="alpaca", max_samples=3)], root=folder)
    assert [one.id for one in few.examples] == ["alpaca/0", "alpaca/1", "alpaca/2"]
    assert [one.id for one in few.held_out] == ["alpaca/95", "alpaca/96", "alpaca/97"]


@pytest.mark.parametrize(
    ("name", "style", "question", "answer"),
    [
        ("alpaca", "plain", "Say 1.\n\naloud", "1!"),
        ("alpaca", "headings", "### Instruction:\nSay 1.\n\n### Input:\naloud\n\n### Response:", "1!"),
        ("codealpaca", "headings", "### Code Task:\nPrint 1.\n\n### Solution:", "print(1)"),
        ("gsm8k", "headings", "### Problem:\nWhat is 1 + 1?\n\n### Solution:", "1 + 1 = 2\n#### 2"),
        ("mbpp", "plain", "Return 601.\n\nYour code should pass these tests:\n\nassert f() == 601\nassert f() is not None",
         "```python\ndef f():\n    return 601\n```"),
    ],
)  # fmt: skip
def test_how_a_row_is_asked(folder: Path, name: str, style: str, question: str, answer: str) -> None:
    loaded = load_sources([named(folder, dataset=name, prompt_style=style)], root=folder)
    (one,) = [one for one in loaded.examples if one.id in (f"{name}/1", f"{name}/train/1", f"{name}/601")]
    assert (one.question, one.answer) == (question, answer)


def test_a_blank_input_leaves_no_heading(folder: Path) -> None:
    first, *_ = load_sources([named(folder, dataset="alpaca", prompt_style="headings")], root=folder).examples
    assert first.question == "### Instruction:\nSay 0.\n\n### Response:"


def test_what_is_not_there_is_an_error_that_says_what_to_do(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    (folder / "gsm8k_test.jsonl").unlink()
    with pytest.raises(
        NotFound, match=r"data\.0\.dataset: the data set gsm8k is not in .*HF_HUB_OFFLINE is set"
    ) as caught:
        load_sources([named(folder, dataset="mbpp, gsm8k")], root=folder)
    assert "put gsm8k_train.jsonl and gsm8k_test.jsonl into" in str(caught.value)
    assert str(caught.value).endswith("\nOf the 2 data sets, these are there: mbpp.")
    with pytest.raises(NotFound, match=r"data\.0\.path: the data set a/b is not in the Hub's cache"):
        load_sources([DataSource(path="hf://datasets/a/b/*.json")], root=folder)
    with pytest.raises(NotFound, match=r"names no files. Write hf://datasets/OWNER/NAME/"):
        load_sources([DataSource(path="hf://datasets/a/b")], root=folder)


def test_files_of_the_hub_are_read_from_its_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = tmp_path / "hub"
    for repository, file in (("openai--gsm8k", "main/{}-0.jsonl"), ("me--mine", "rows/{}.jsonl")):
        place = cache / f"datasets--{repository}"
        for side, numbers in (("train", range(5)), ("test", range(5, 8))):
            lines(place / "snapshots" / "abc" / file.format(side), [ROWS["gsm8k"](n) for n in numbers])
        lines(place / "snapshots" / "abc" / "socratic" / "train-0.jsonl", [{"bad": 1}])
        (place / "refs").mkdir(parents=True)
        (place / "refs" / "main").write_text("abc")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache))
    monkeypatch.setitem(DATA_SETS, "gsm8k", replace(DATA_SETS["gsm8k"], files=("main/*.jsonl",)))
    loaded = load_sources([DataSource.model_validate({"dataset": "gsm8k"})], root=tmp_path)
    assert (len(loaded.examples), len(loaded.held_out)) == (5, 3)
    own = load_sources([DataSource(path="hf://datasets/me/mine/rows/*.jsonl", held_out=0.25)], root=tmp_path)
    assert (len(own.examples), len(own.held_out)) == (6, 2)


def test_held_out_rows_can_be_read_without_those_that_are_trained(folder: Path) -> None:
    (folder / "gsm8k_train.jsonl").unlink()
    files = find_files("gsm8k", [folder], trained=False)
    rows = read_data_set("gsm8k", files, root=folder, problems=Problems(), trained=False)
    assert (len(rows.trained), len(rows.held_out)) == (0, 10)
    with pytest.raises(NotFound):
        find_files("gsm8k", [folder])


def test_a_set_of_ones_own_is_an_entry_of_the_recipe(tmp_path: Path) -> None:
    lines(tmp_path / "poems.jsonl", [{"title": f"T{n}", "poet": "", "lines": ["a", f"b{n}"]} for n in range(10)])
    source = DataSource.model_validate(
        {
            "path": "poems.jsonl",
            "prompt": "### Task:\nWrite {title}[[ by {poet}]] {like this}.\n\n### Answer:\n",
            "answer": "{lines}",
            "held_out": "20%",
        }
    )
    loaded = load_sources([source], root=tmp_path)
    assert (loaded.examples[0].question, loaded.examples[0].answer) == (
        "### Task:\nWrite T0 {like this}.\n\n### Answer:",
        "a\nb0",
    )
    assert [one.answer for one in loaded.held_out] == ["a\nb8", "a\nb9"]
    assert loaded.sources[0].formats == {"template": 10}


def test_a_row_without_a_field_of_the_template_is_named(tmp_path: Path) -> None:
    lines(tmp_path / "a.jsonl", [{"q": "1", "a": "2"}, {"q": "1", "other": "{q}"}, {"q": {"x": 1}, "a": "2"}])
    source = DataSource.model_validate({"path": "a.jsonl", "prompt": "{q}", "answer": "{a}"})
    with pytest.raises(DataError) as caught:
        load_sources([source], root=tmp_path)
    assert str(caught.value).splitlines() == [
        "a.jsonl:2: 'a' is missing or blank, and the template asks for it. The row has: q, other.",
        "a.jsonl:3: 'q' is dict, and a text, a number or a list of texts is expected.",
    ]


@given(st.text(alphabet="ab{}[]q \n", min_size=1).filter(str.strip))
def test_what_a_row_holds_is_never_read_as_a_template(text: str) -> None:
    made = RowTemplate("{q}[[ and {q}]]", "{q}").example(Row({"q": text}, "f", 1))
    assert made.question == f"{text} and {text}".strip()
    assert made.answer == text.strip()


@given(st.integers(0, 500), st.floats(0, 1))
def test_both_sides_have_a_row_where_there_are_two(count: int, share: float) -> None:
    border = last_rows_begin(count, share)
    assert 0 <= border <= count
    if count > 1 and share > 0:
        assert 0 < border < count


def many(name: str, count: int, repeat: int = 1) -> Loaded:
    turns = [(Message("user", f"{name}{n}"), Message("assistant", "yes")) for n in range(count)]
    return Loaded([Example(messages=turn, repeat=repeat) for turn in turns])


def test_weights_say_how_much_of_an_epoch_a_source_is() -> None:
    chat, code, facts = many("chat", 900), many("code", 100, repeat=2), many("facts", 300)
    left, right, other = mixed([chat, code, facts], [3, 1, None])
    assert (len(left.examples), len(right.examples), len(other.examples)) == (600, 100, 300)
    more, _ = mixed([chat, many("code", 120, repeat=2)], [3, 1])
    assert {one.digest for one in left.examples} < {one.digest for one in more.examples}


def test_weights_of_a_recipe_say_how_much_is_studied(folder: Path) -> None:
    sources = [named(folder, dataset="alpaca", weight=2), named(folder, dataset="gsm8k", weight=1)]
    loaded = load_sources(sources, root=folder)
    sets = [one.id.split("/")[0] for one in loaded.examples]
    assert (sets.count("alpaca"), sets.count("gsm8k")) == (60, 30)


def test_names_mean_data_sets() -> None:
    assert data_sets_named(["chat", "code"], trained=True) == ["alpaca", "codealpaca", "mbpp"]
    assert data_sets_named(["code"], trained=False) == ["codealpaca", "mbpp", "humaneval"]
    assert data_sets_named(["all", "gsm8k"], trained=True) == [name for name in DATA_SETS if is_trainable(name)]
    assert not is_trainable("humaneval")
    with pytest.raises(ValueError, match="never trained"):
        data_sets_named(["humaneval"], trained=True)
    with pytest.raises(ValueError, match=r"'chta' is no data set; did you mean chat\?"):
        data_sets_named(["chta"], trained=True)
