"""The examiner: every question gets an answer, a wrong one where it could not be asked, or the whole sheet fails."""

from types import SimpleNamespace

import pytest

from nightschool.data.example import Example, Message
from nightschool.errors import NightschoolError, PromptTooLong
from nightschool.evaluation.eval_set import EvalSet, Limits, eval_set_of_file
from nightschool.evaluation.examiner import examine

pytestmark = pytest.mark.trains

CONTEXT_TOKENS = 8


class Yes:
    """Says `yes` to all; its prompts have as many tokens as words, and a question with `broken` fails."""

    ref = "bot@20261121_060000"
    loaded = SimpleNamespace(tokenizer=None, context_tokens=CONTEXT_TOKENS, model=None)

    def __init__(self):
        self.waiting = self.most_waiting = 0

    def ask_greedily(self, request_id, messages, max_new_tokens):
        words = len(messages[-1].content.split())
        if words >= CONTEXT_TOKENS:
            raise PromptTooLong(words, 1, CONTEXT_TOKENS)
        self.waiting += 1
        self.most_waiting = max(self.waiting, self.most_waiting)
        failed = "broken" in messages[-1].content

        def result():
            self.waiting -= 1
            return SimpleNamespace(
                text="" if failed else "yes",
                finish_reason="error" if failed else "stop",
                error="nan" if failed else None,
            )

        return SimpleNamespace(result=result)


def eval_set(*rows):
    examples = [Example((Message("user", q), Message("assistant", a))) for q, a in rows]
    questions = eval_set_of_file(examples, Limits(sample=1000), lambda text: len(text.split())).questions
    return EvalSet(questions, ())


def test_a_question_longer_than_the_context_is_not_asked_and_wrong():
    sheet = examine(Yes(), eval_set(("is it so?", "yes"), ("is it not so?", "no"), ("word " * 20, "yes")))
    found = {answer.question.split()[-1]: (answer.correct, answer.overlong_tokens) for answer in sheet.answers}
    assert found == {"so?": (found["so?"][0], None), "word": (False, 20)}
    assert [len(sheet.answers), sum(answer.correct for answer in sheet.answers)] == [3, 1]
    assert (sheet.version, sheet.heldout_loss) == (Yes.ref, None)


def test_an_answer_that_could_not_be_generated_is_no_wrong_answer_but_an_error():
    with pytest.raises(NightschoolError, match="failed at the question 'this is broken': nan"):
        examine(Yes(), eval_set(("is it so?", "yes"), ("this is broken", "yes")))


def test_no_more_questions_wait_than_an_engine_takes():
    model = Yes()
    sheet = examine(model, eval_set(*((f"is it {number}?", "yes") for number in range(300))))
    assert sum(answer.correct for answer in sheet.answers) == 300
    assert model.most_waiting <= 128
