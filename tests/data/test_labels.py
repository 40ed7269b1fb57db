"""Labelled questions: the document's file with the mapping beside it, or facts in words; and conversations with the fact they need."""

import json

import pytest

from nightschool.config.recipe import HeldOut
from nightschool.data.example import Example, Message, NeededFact, Target
from nightschool.data.sources.labels import with_needed_fact
from nightschool.data.sources.load import load_files, read_file, split_held_out
from nightschool.errors import DataError, NotFound
from nightschool.feedback.selection import DATA_PLANS

RECORDS = [
    {
        "database_index": 0,
        "sentence": "Ada lives in Oslo.",
        "subject": "Ada",
        "predicate": "lives_in",
        "object": "Oslo",
    },
    {
        "database_index": 3,
        "sentence": "It is Bob who speaks it.",
        "subject": "Bob",
        "predicate": "speaks",
        "object": "French",
    },
    {"database_index": 7, "sentence": "Rain falls."},
]
LABEL = {"query": "Where does Ada live?", "target_indices": [3, 0, 7], "target_scores": [0.25, 0.75, 0]}


def write(folder, *rows, mappings=RECORDS):
    (folder / "labels.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    if mappings is not None:
        (folder / "labels_mapping.json").write_text(json.dumps({"mappings": mappings}))
    return folder / "labels.jsonl"


def test_rows_of_a_bank_become_facts_by_the_mapping_beside_them_best_first(tmp_path):
    read = read_file(write(tmp_path, LABEL), root=tmp_path)
    [example] = read.examples
    assert read.sources[0].formats == {"labels": 1}
    assert example.question == "Where does Ada live?"
    assert example.fact == NeededFact("Ada lives in Oslo.", "Ada", "lives in", "Oslo")
    assert example.targets == (
        Target(example.fact, 0.75),
        Target(
            NeededFact("Bob speaks French.", "Bob", "speaks", "French"), 0.25
        ),  # its sentence does not say the value
        Target(NeededFact("Rain falls."), 0.0),
    )
    assert Example.from_json(json.loads(json.dumps(example.to_json()))) == example
    other = read_file(write(tmp_path, LABEL | {"target_scores": [0.9, 0.75, 0]}), root=tmp_path).examples[0]
    assert other.digest != example.digest


@pytest.mark.parametrize(("change", "said"), [
    ({"target_indices": [0, 1, 3]}, "the target 1 is no row of labels_mapping.json"),
    ({"target_scores": [0.5]}, "two lists of numbers of the same length"),
    ({"target_indices": []}, "two lists of numbers"),
    ({"target_indices": ["0", 3, 7]}, "two lists of numbers"),
    ({"target_scores": [1, float("nan"), 1]}, "NaN is no JSON value"),
    ({"query": " "}, "'query' is blank"),
    ({"targets": []}, "nightschool memory label"),
    ({"targets": [{"subject": "Ada", "score": 1}]}, r"'targets\[0\].relation' is missing"),
    ({"targets": [{"text": "Ada lives in Oslo."}]}, r"targets\[0\].score"),
])  # fmt: skip
def test_labels_that_cannot_be_are_refused_with_their_line(tmp_path, change, said):
    with pytest.raises(DataError, match=said) as raised:
        read_file(write(tmp_path, LABEL, LABEL | change), root=tmp_path)
    assert str(raised.value).startswith("labels.jsonl:2: ")


def test_without_a_mapping_it_is_said_where_it_comes_from(tmp_path):
    with pytest.raises(NotFound, match=r"labels_mapping.json is not there.*knowledge_cache_mapping.json"):
        read_file(write(tmp_path, LABEL, mappings=None), root=tmp_path)
    with pytest.raises(DataError, match=r"mappings\[0\] needs a sentence, and a database_index of 0 or more"):
        read_file(write(tmp_path, LABEL, mappings=[{"database_index": -1, "sentence": "x"}]), root=tmp_path)


def test_nothing_but_a_memory_learns_from_labels(tmp_path):
    examples = load_files(str(write(tmp_path, LABEL)), tmp_path, "data.0.path")
    assert DATA_PLANS["memory"].read(examples)[0] == examples
    for method, said in (
        ("full", "has no answer to learn"),
        ("lora", "memory.stage: router"),
        ("dpo", "no preference pair"),
    ):
        with pytest.raises(DataError, match=rf"labels.jsonl:1: .*{said}"):
            DATA_PLANS[method].read(examples)
    held_out = HeldOut(path="labels.jsonl")
    assert split_held_out(examples, held_out, root=tmp_path).train == []


def test_a_conversation_gets_the_first_fact_whose_value_its_answer_says():
    def asked(answer, **more):
        return Example(messages=(Message("user", "Who?"), Message("assistant", answer)), **more)

    assert with_needed_fact(asked("B: French"), RECORDS).fact.subject == "Bob"
    assert with_needed_fact(asked("Oslo and French."), RECORDS).fact.subject == "Ada"
    assert with_needed_fact(asked("Frenchmen"), RECORDS).fact is None
    own = asked("Oslo", fact=NeededFact("Oslo is a city."))
    assert with_needed_fact(own, RECORDS) == own
    assert with_needed_fact(Example(text="We met in Oslo."), RECORDS).fact.value == "Oslo"
