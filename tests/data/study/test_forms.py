"""The forms in which new examples are studied, and those that only the gate asks."""

from dataclasses import replace

from nightschool.data.example import Example, Message
from nightschool.data.study.forms import Form, make_forms, trained_forms, with_wordings_kept_aside
from nightschool.data.study.rewordings import rewordings, wording

QUESTION = "Where does Leon Dahl live?"


def qa(question=QUESTION, answer="Leon Dahl lives in Oslo.", **more):
    return Example((Message("user", question), Message("assistant", answer)), source="a.json", line=3, **more)


def asked(examples):
    return {wording(example.question) for example in examples}


def test_an_example_is_studied_in_as_many_forms_as_wanted_and_one_is_kept_aside():
    example = qa(id="x7")
    forms = make_forms([example], 6, 0)
    assert len(trained_forms(forms)) == 5
    (aside,) = [form for form in forms if form.kept_aside]
    assert wording(aside.example.question) not in asked([example, *trained_forms(forms)])
    assert {form.example.answer for form in forms} == {example.answer}
    assert {(form.of, form.example.id, form.example.source, form.example.line) for form in forms} == {
        (example.digest, "x7", "a.json", 3)
    }
    assert with_wordings_kept_aside([example], forms)[0].paraphrases == (aside.example.question,)
    assert [Form.from_json(form.to_json()) for form in forms] == forms
    assert make_forms([example], 1, 0) == []


def test_a_wording_that_is_held_out_is_never_trained_however_it_is_written():
    all_wordings = [one.question for one in rewordings(QUESTION, 0)]
    held, other = all_wordings[0], all_wordings[1]
    example = qa(paraphrases=(held.upper().replace("?", " ?!"),))
    forms = make_forms([example], 32, 0, never=[qa(f"  the {other}", "No.")])
    trained = asked(trained_forms(forms))
    assert trained
    assert not trained & {wording(one) for one in all_wordings[:2]}
    # A person's own wording is what the gate asks; nothing is kept aside besides.
    assert not any(form.kept_aside for form in forms)
    assert with_wordings_kept_aside([example], forms) == [example]


def test_no_form_asks_what_another_example_asks():
    first = qa()
    second = qa(rewordings(QUESTION, 0)[0].question, "In Rome.")
    forms = make_forms([first, second], 32, 0)
    wordings = [wording(form.example.question) for form in forms]
    assert len(set(wordings)) == len(wordings)
    assert not set(wordings) & asked([first, second])


def test_conversations_texts_and_pairs_stay_as_they_are_and_corrections_do_not():
    turns = (Message("user", "Hello"), Message("assistant", "Hi."), *qa().messages)
    untouched = [Example(text="Leon Dahl lives in Oslo."), Example(turns), qa(rejected="No."), qa(answer=" ")]
    assert make_forms(untouched, 6, 0) == []
    corrected = Example(turns, corrects="Leon Dahl lives in Rome.")
    forms = make_forms([corrected], 6, 0)
    assert len(trained_forms(forms)) == 5
    assert all(form.example.messages[:2] == turns[:2] and form.example.corrects for form in forms)


def test_forms_are_studied_as_often_as_their_example():
    assert len(trained_forms(make_forms([replace(qa(), repeat=3)], 4, 0))) == 9


def test_a_short_answer_is_studied_as_a_sentence_and_the_other_way_round_too():
    forms = make_forms([qa("What is the capital of Velmark?", "Orrin")], 6, 0)
    by_origin = {form.origin: form.example for form in forms}
    assert by_origin["statement"].answer == by_origin["reverse"].answer == "The capital of Velmark is Orrin."
    assert by_origin["reverse"].question == "Of what is Orrin the capital?"
