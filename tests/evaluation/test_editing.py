"""Cases of knowledge editing, the intervals of shares, and what is measured of a model whose memory is edited."""

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nightschool.errors import DataError, NotFound
from nightschool.evaluation.editing import Said, measure, says
from nightschool.evaluation.editing_cases import Edit, EditingCase, read_cases
from nightschool.evaluation.intervals import Share
from nightschool.memory.facts.statements import as_fact
from nightschool.memory.store import MemoryStore

OURS = {
    "subject": "Ada", "prompt": "Ada lives in", "new": "Oslo", "paraphrases": ["Where does Ada live?"], "locality": ["Bob lives in"],
    "two_hop": [{"prompt": "The country where Ada lives is", "answer": "Norway"}], "absent": ["Zoe lives in"], "old": "Rome",
}  # fmt: skip
COUNTERFACT = {
    "requested_rewrite": {"prompt": "{} works as", "target_new": {"str": "cook"}, "target_true": {"str": "nurse"}, "subject": "Ada"},
    "paraphrase_prompts": ["The job of Ada is"],
    "neighborhood_prompts": ["Bob works as"],
}  # fmt: skip
EASYEDIT = {"subject": "Ada", "prompt": "Ada works as", "target_new": "cook", "ground_truth": "nurse",
            "rephrase_prompt": "The job of Ada is", "locality_prompt": "Bob works as"}  # fmt: skip
ZSRE = {"subject": "Ada", "src": "What is the job of Ada?", "alt": "cook", "pred": "nurse", "rephrase": "What does Ada do?",
        "loc": "nq question: who is bob", "loc_ans": "Bob"}  # fmt: skip
MQUAKE = {
    "requested_rewrite": [
        {"prompt": "{} is married to", "target_new": {"str": "Bob"}, "subject": "Ada", "question": "Who is married to Ada?"},
        {"prompt": "{} lives in", "target_new": {"str": "Oslo"}, "subject": "Bob", "question": "Where does Bob live?"},
    ],
    "questions": ["Where does the husband of Ada live?"],
    "new_answer": "Oslo",
    "new_single_hops": [],
}  # fmt: skip


def file_of(folder, *rows, as_list=False):
    path = folder / "cases.jsonl"
    path.write_text(json.dumps(list(rows)) if as_list else "\n".join(json.dumps(row) for row in rows) + "\n")
    return path


@pytest.mark.parametrize("as_list", [False, True])
def test_every_form_of_cases_is_read(tmp_path, as_list):
    blank = ZSRE | {"alt": " "}
    cases, left_out = read_cases(file_of(tmp_path, OURS, COUNTERFACT, EASYEDIT, ZSRE, MQUAKE, blank, as_list=as_list))
    assert len(left_out) == 1
    assert left_out[0].endswith("6")
    ours, counterfact, easyedit, zsre, mquake = cases
    assert ours.edits == (Edit("Ada", "Ada lives in", "Oslo"),)
    assert ours.portability == (("The country where Ada lives is", "Norway"),)
    assert (ours.absent, ours.old) == (("Zoe lives in",), "Rome")
    assert counterfact.edits == easyedit.edits == (Edit("Ada", "Ada works as", "cook"),)
    assert (counterfact.old, counterfact.locality) == (easyedit.old, easyedit.locality) == ("nurse", ("Bob works as",))
    assert (zsre.paraphrases, zsre.locality) == (("What does Ada do?",), ("who is bob",))
    assert [edit.new for edit in mquake.edits] == ["Bob", "Oslo"]
    assert mquake.portability == (("Where does the husband of Ada live?", "Oslo"),)
    assert len({case.where for case in cases}) == 5


@pytest.mark.parametrize(
    ("prompt", "statement"),
    [
        ("Ada lives in", "Ada lives in Oslo."),
        ("The mother tongue of Ada is", "The mother tongue of Ada is Oslo."),
        ("What is the job of Ada?", "The job of Ada is Oslo."),
    ],
)
def test_an_edit_becomes_a_statement_of_its_subject(prompt, statement):
    fact = as_fact(Edit("Ada", prompt, "Oslo").entry)
    assert (fact.text, fact.subject, fact.value) == (statement, "Ada", "Oslo")


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ('{"subject": "Ada"}', "no case of editing: subject"),
        ('{"new": "Oslo", "prompt": "Ada lives in"}', "lacks 'subject'"),
        ('{"subject": "Ada", "prompt": " ", "new": "Oslo"}', "has no case"),
        ('{"subject": "Ada", "prompt": 3, "new": "Oslo"}', "no text"),
        ("[1]", "a JSON object"),
        ("{", "no JSON"),
        ("", "has no case"),
    ],
)
def test_a_row_that_is_no_case_is_refused_with_its_place(tmp_path, text, told):
    path = tmp_path / "cases.jsonl"
    path.write_text(text)
    with pytest.raises(DataError, match=told):
        read_cases(path)
    with pytest.raises(NotFound):
        read_cases(tmp_path / "other")


@given(st.integers(0, 400), st.integers(1, 400))
def test_an_interval_holds_its_share_and_narrows(count, asked):
    count = min(count, asked)
    low, high = Share(count, asked).interval
    assert 0 <= low <= count / asked <= high <= 1
    wide_low, wide_high = Share(0, 0).interval
    assert wide_low <= low
    assert high <= wide_high
    more_low, more_high = Share(count * 10, asked * 10).interval
    assert more_high - more_low < high - low


def test_an_interval_is_that_of_wilson():
    assert Share(80, 100).interval == pytest.approx((0.7112, 0.8666), abs=1e-4)
    assert Share(0, 300).interval == pytest.approx((0.0, 0.01264), abs=1e-5)


@pytest.mark.parametrize(
    ("answer", "prompt", "is_right"),
    [
        (" Oslo. Ada was born", "Ada lives in", True),
        ("oslo, in Norway", "Ada lives in", True),
        (" Oslo Fjord.", "Ada lives in", False),
        (" Bergen or Oslo.", "Ada lives in", False),
        ("Ada lives in Oslo.", "Where does Ada live?", True),
        ("Ada lives in Oslo.", "Ada lives in", False),
        ("", "Ada lives in", False),
    ],
)
def test_an_answer_is_the_value_word_for_word(answer, prompt, is_right):
    assert says(answer, prompt, "Oslo") is is_right


class Parrot:
    """Says the values of all entries that name the subject with which a prompt begins, and else `nothing`."""

    def __init__(self, store, *, leaks=False):
        self.store, self.leaks, self.seen = store, leaks, {}

    def say(self, prompts, *, reads):
        out = []
        for prompt in prompts:
            found = [one.value for one in self.store.entries() if prompt.startswith(one.subject)] if reads else []
            if found:
                self.seen[prompt] = found[0]
            elif reads and self.leaks and prompt in self.seen:
                found = [self.seen[prompt]]
            out.append(Said(found[0] if found else "nothing", bool(found)))
        return out


@pytest.mark.parametrize("leaks", [False, True])
def test_all_columns_are_counted_and_the_memory_is_empty_again(tmp_path, leaks):
    store = MemoryStore.create(Path(tmp_path) / "edits")
    cases = [
        EditingCase(
            (Edit("Ada", "Ada lives in", "Oslo"),), ("Ada dwells in", "Where is Ada?"), ("Bob lives in",), (("Ada eats", "fish"),), ("Zoe lives in", "Ada's sister lives in")
        ),
        EditingCase((Edit("Cid", "Cid lives in", "nothing"),)),
    ]  # fmt: skip
    sheet = measure(Parrot(store, leaks=leaks), cases, store)
    told = {name: (share.count, share.asked) for name, share in sheet.shares.items()}
    assert told == {
        "efficacy": (2, 2), "paraphrase": (1, 2), "locality": (1, 1), "portability": (0, 1), "abstention": (1, 2), "false_answers": (1, 2),
        "deletion_leak": (int(leaks), 1),
    }  # fmt: skip
    assert (sheet.before.count, sheet.before.asked) == (1, 2)
    assert {one.prompt for one in sheet.wrong} >= {"Where is Ada?", "Ada eats", "Ada's sister lives in"}
    assert store.count() == 0


def test_without_a_memory_only_the_base_is_asked(tmp_path):
    store = MemoryStore.create(Path(tmp_path) / "edits")
    case = EditingCase((Edit("Ada", "Ada lives in", "nothing"),), ("Ada dwells in",), ("Bob lives in",))
    sheet = measure(Parrot(store), [case], None)
    assert {name: share.share for name, share in sheet.shares.items()} == {"efficacy": 1.0, "paraphrase": 1.0}
