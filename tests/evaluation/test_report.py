"""The report and the diff are read by people in a terminal."""

import io
from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from nightschool.config.recipe import Gate
from nightschool.evaluation.diff import answer_diff, word_diff
from nightschool.evaluation.gate import decide
from nightschool.evaluation.report import render
from nightschool.evaluation.scores import OpenPair, ProbeQuestion, ScoreSheet


def question(kind, number, expected):
    text = f"Question {number} of kind {kind}?"
    return ProbeQuestion(f"{kind}-{number}", kind, text, expected, [{"role": "user", "content": text}])


def sheets(num_old=7, answer="Bergen"):
    old = [question("old", number, "Oslo") for number in range(num_old)]
    new = question("new", 0, "Lima")
    champion = ScoreSheet("bot@1", 1.0, 50, (*(q.answered("Oslo.") for q in old), new.answered("I do not know.")))
    candidate = ScoreSheet("bot@2", 1.5, 50, (*(q.answered(answer) for q in old), new.answered("It is Lima.")))
    return candidate, champion


def printed(report, width=80, **more):
    stream = io.StringIO()
    render(report, Console(file=stream, width=width), **more)
    return stream.getvalue()


def test_a_refusal_shows_rules_figures_answers_and_what_to_do():
    candidate, champion = sheets()
    text = printed(decide(candidate, champion, Gate()))
    lines = [line.rstrip() for line in text.splitlines()]
    assert lines[0] == "REFUSED  bot@2"
    assert lines[1] == "compared with bot@1"
    assert "holdout_loss  <= champion + 0.02     1.5000    1.0000  FAILED" in lines
    assert "forgetting    <= 2%                    100%         -  FAILED" in lines
    assert "new_facts     >= 50%                   100%        0%  passed" in lines
    assert "Behind forgetting (7)" in lines
    assert "  candidate  ✗ Bergen" in lines
    assert "  and 2 more" in lines
    assert "Learned (1)" in lines
    assert "  candidate  ✓ It is Lima." in lines
    assert "replay.ratio" in text
    assert max(map(len, lines)) <= 80


def test_open_answers_stand_side_by_side_as_they_come_worst_first():
    candidate, champion = sheets()
    said = (OpenPair("A haiku?", "Frogs leap.", "In the foam, a lotus.", 2.5), OpenPair("Why?", "So.", "So.", 0.01))
    text = printed(decide(replace(candidate, drift=1.2, drift_tokens=9, open=said), champion, Gate()), max_examples=1)
    lines = [line.strip() for line in text.splitlines()]
    at = lines.index("Open answers, those first that drifted most (2)")
    shown = [
        "open       A haiku?",
        "champion   Frogs leap.",
        "candidate  In the foam, a lotus.",
        "drift      2.5000 nats a token",
    ]
    assert lines[at + 1 : at + 5] == shown
    assert "and 1 more" in lines[at:]
    assert "the same" in printed(decide(replace(candidate, drift=1.2, drift_tokens=9, open=said), champion, Gate()))


def test_what_was_shown_once_is_not_shown_again():
    candidate, champion = sheets(num_old=3)
    text = printed(decide(candidate, champion, Gate()))
    assert text.count("Question 1 of kind old?") == 1
    assert "Lost" not in text
    candidate, champion = sheets(num_old=3)
    free = printed(decide(candidate, champion, Gate(forgetting=None)))
    assert "Lost (3)" in free


def test_a_first_version_says_that_nothing_could_be_compared():
    text = printed(decide(ScoreSheet("bot@1"), None, Gate()))
    assert text.startswith("PASSED  bot@1\nthere is no champion yet\n")
    assert "Nothing could be compared" in text
    assert "not judged" in text


def test_answers_cannot_steer_the_terminal_or_the_markup():
    candidate, champion = sheets(answer="\x1b[2J\x07[bold red]pwned[/]\r\n" + "x" * 5000)
    text = printed(decide(candidate, champion, Gate()))
    assert "\x1b" not in text
    assert "\x07" not in text
    assert "[bold red]pwned[/]" in text
    assert text.count("x") < 5000


def test_narrow_terminals_lose_no_verdict():
    candidate, champion = sheets()
    assert printed(decide(candidate, champion, Gate()), width=60).count("FAILED") == 2


def test_a_diff_lists_lost_before_learned_before_reworded():
    candidate, champion = sheets(num_old=2)
    extra = question("old", 9, "Rome")
    champion = ScoreSheet("bot@1", answers=(*champion.answers, extra.answered("Rome")))
    candidate = ScoreSheet("bot@2", answers=(*candidate.answers, extra.answered("It is Rome.")))
    diffs = answer_diff(champion, candidate)
    assert [(diff.verdict, diff.id) for diff in diffs] == [
        ("lost", "old-0"),
        ("lost", "old-1"),
        ("learned", "new-0"),
        ("reworded", "old-9"),
    ]
    assert diffs[0].as_text() == "[-Oslo.-]{+Bergen+}"
    assert answer_diff(champion, champion) == []
    assert diffs[0].to_json()["words"] == [["removed", "Oslo."], ["added", "Bergen"]]


def test_a_diff_leaves_common_words_alone():
    assert list(word_diff("She lives in Oslo now", "She lives in Lima now")) == [
        ("same", "She lives in "),
        ("removed", "Oslo"),
        ("added", "Lima"),
        ("same", " now"),
    ]


@given(st.text(max_size=40), st.text(max_size=40))
def test_both_texts_can_be_read_off_a_diff(before, after):
    parts = list(word_diff(before, after))
    assert "".join(text for change, text in parts if change != "added") == before
    assert "".join(text for change, text in parts if change != "removed") == after
