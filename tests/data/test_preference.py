"""Rows with two answers: read from every spelling, checked, and rendered after the same turns."""

import pytest

from nightschool.data.chat.render import render_pieces, render_prompt
from nightschool.data.example import Example, Message
from nightschool.data.pairs import PairBatches
from nightschool.data.sources.formats import detect, to_examples
from nightschool.data.sources.rows import Row
from nightschool.errors import DataError, NothingToTrain
from tests.support.tokenizers_for_tests import byte_tokenizer

USER, BETTER, WORSE = (
    {"role": "user", "content": "Hm?"},
    *({"role": "assistant", "content": c} for c in ("Yes.", "No.")),
)
SPELLINGS = [
    {"prompt": "Hm?", "chosen": "Yes.", "rejected": "No."},
    {"question": "Hm?", "chosen": "Yes.", "rejected": "No."},
    {"prompt": [USER], "chosen": [BETTER], "rejected": [WORSE]},
    {"messages": [USER], "chosen": "Yes.", "rejected": [WORSE]},
    {"chosen": [USER, BETTER], "rejected": [USER, WORSE]},
    {"input": {"messages": [USER]}, "preferred_output": [BETTER], "non_preferred_output": [WORSE]},
]


def read(fields):
    return to_examples(Row(fields, "pairs.jsonl", 3))


@pytest.mark.parametrize("row", SPELLINGS)
def test_each_spelling_is_the_same_pair(row):
    assert detect(row) == "preference"
    (example,) = read(row)
    assert example == Example(
        (Message("user", "Hm?"), Message("assistant", "Yes.")), source="pairs.jsonl", line=3, rejected="No."
    )
    assert Example.from_json(example.to_json()) == example


def test_earlier_answers_are_context_and_a_system_text_goes_first():
    (example,) = read({"system": "Be brief.", "messages": [USER, WORSE, USER], "chosen": "Yes.", "rejected": "No."})
    assert [(m.role, m.weight) for m in example.messages] == [
        ("system", 1.0), ("user", 1.0), ("assistant", 0.0), ("user", 1.0), ("assistant", 1.0)
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"prompt": "Hm?", "chosen": "Yes.", "rejected": "Yes. "}, "are the same answer"),
        ({"prompt": "Hm?", "chosen": "Yes.", "rejected": " "}, "'rejected' is blank"),
        ({"prompt": "Hm?", "chosen": "Yes.", "rejected": None}, "'rejected' is missing"),
        ({"prompt": "Hm?", "chosen": [USER, BETTER], "rejected": "No."}, "one answer each where there is a prompt"),
        ({"chosen": [USER, BETTER], "rejected": [BETTER, WORSE]}, "not the same conversation up to the last answer"),
        ({"chosen": [USER, USER], "rejected": [USER, WORSE]}, "End with the assistant's answer"),
        ({"chosen": "Yes.", "rejected": "No."}, "has no turn of the user"),
        ({"messages": [WORSE], "chosen": "Yes.", "rejected": "No."}, "has no turn of the user"),
    ],
)
def test_what_is_no_pair_is_refused_with_its_place(row, said):
    with pytest.raises(DataError, match=said) as error:
        read(row)
    assert str(error.value).startswith("pairs.jsonl:3: ")


def test_the_rejected_answer_is_part_of_what_a_pair_is():
    pair, other = read(SPELLINGS[0])[0], read(SPELLINGS[0] | {"rejected": "Never."})[0]
    assert len({pair.digest, other.digest, pair.chosen.digest}) == 3
    assert pair.chosen.digest == read({"prompt": "Hm?", "completion": "Yes."})[0].digest


def test_a_correction_is_a_pair_and_a_plain_answer_is_none():
    turns = (Message("user", "Hm?"), Message("assistant", "Yes."))
    assert Example(turns, corrects="No.").as_pair().rejected == "No."
    assert Example(turns).as_pair() is None
    assert Example(turns, corrects="Yes. ").as_pair() is None


def long_pair(answer, rejected):
    turns = [
        Message(role, f"{role} {n} " * 4, 0.0 if role == "assistant" else 1.0)
        for n in range(4)
        for role in ("user", "assistant")
    ]
    return Example((*turns, Message("user", "now?"), Message("assistant", answer)), rejected=rejected)


@pytest.mark.parametrize(("chosen", "rejected"), [("short", "long " * 20), ("long " * 20, "short"), ("a", "b")])
def test_both_answers_follow_the_same_turns_however_much_is_cut(chosen, rejected):
    tokenizer = byte_tokenizer()
    whole = render_pieces(tokenizer, long_pair(chosen, rejected), 4096)
    limit = max(len(document.input_ids) for document in whole) - 30
    cut = render_pieces(tokenizer, long_pair(chosen, rejected), limit)
    for documents in (whole, cut):
        prompts = [document.input_ids[: document.weights.index(1.0)] for document in documents]
        assert prompts[0] == prompts[1]
        assert len(documents[0].input_ids) <= 4096
    assert all(len(document.input_ids) <= limit for document in cut)
    assert cut[0].input_ids[
        : len(render_prompt(tokenizer, long_pair(chosen, rejected).messages[2:-1]))
    ] == render_prompt(tokenizer, long_pair(chosen, rejected).messages[2:-1])


def rendered(*pairs, limit=64):
    tokenizer = byte_tokenizer()
    examples = [Example((Message("user", "q?"), Message("assistant", a)), rejected=b) for a, b in pairs]
    return [document for example in examples for document in render_pieces(tokenizer, example, limit)]


def test_pairs_stay_together_and_know_their_reference():
    batches = PairBatches(rendered(("a", "bb"), ("cc", "d"), ("e", "ff"), ("gg", "h")), batch_size=3, seed=1)
    batches.reference = batches.reference + 10 * (1 + torch_arange(4))[:, None]
    seen = []
    for index in range(batches.num_batches(0)):
        batch, numbers = batches.get(0, index), batches.examples_of(0, index)
        assert len(batch.cu_seqlens) - 1 == 2 * len(numbers) == 2 * batch.loss_units
        assert batch.reference[:, 0].tolist() == [10 * (1 + number) for number in numbers]
        assert batch.without_loss().loss_units == 0
        seen += numbers
    assert sorted(seen) == [0, 1, 2, 3]


def torch_arange(count):
    import torch

    return torch.arange(count)


def test_a_pair_of_which_one_answer_does_not_fit_is_left_out():
    documents = rendered(("a", "b"), ("c", "d"))
    documents[2] = type(documents[2])(documents[2].input_ids, [0.0] * len(documents[2].weights), documents[2].roles)
    batches = PairBatches(documents, batch_size=4, seed=1)
    assert (batches.kept, batches.num_left_out) == ([0], 1)
    with pytest.raises(NothingToTrain):
        PairBatches(documents[2:], batch_size=4, seed=1)
