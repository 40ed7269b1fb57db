"""How answers to data sets are judged."""

from __future__ import annotations

from decimal import Decimal
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nightschool.data.sources.data_sets import find_files, read_data_set
from nightschool.data.sources.problems import Problems
from nightschool.evaluation.judges import JUDGES, code_in, final_number, program_of_humaneval, program_of_mbpp
from nightschool.evaluation.programs.sandbox import run_program, why_not_confined

DATA = Path(__file__).parents[3] / "shared" / "data"
confined = pytest.mark.skipif(why_not_confined() is not None, reason=f"programs cannot be held: {why_not_confined()}")


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("48/2 = 24, so 48+24 = <<48+24=72>>72.\n#### 72", 72),
        ("It is 3. #### 1,234 dollars and 9 cents", 1234),
        ("#### The answer is -7.50", Decimal("-7.5")),
        ("First 3, then 4 apples.", 4),
        ("She pays $1,000.", 1000),
        ("####", None),
        ("I do not know.", None),
        ("####\nnone, but 5 was said", 5),
    ],
)
def test_the_final_number(text: str, number: object) -> None:
    assert final_number(text) == number


@given(st.text())
def test_any_answer_has_a_number_or_none(text: str) -> None:
    assert final_number(text) is None or final_number(text) == final_number(text)


@pytest.mark.parametrize(
    ("answer", "code"),
    [
        ("Sure:\n```python\ndef f():\n    pass\n```\nand\n```\nother\n```", "def f():\n    pass"),
        ("```\nx = 1", "x = 1"),
        ("x = 1\r\n", "x = 1"),
        ("", ""),
    ],
)
def test_the_code_of_an_answer(answer: str, code: str) -> None:
    assert code_in(answer) == code


TASK = {
    "prompt": 'import math\n\ndef helper(n):\n    return n\n\ndef root(n):\n    """The root."""\n',
    "entry_point": "root",
    "test": "def check(candidate):\n    assert candidate(9) == 3",
}


@confined
@pytest.mark.parametrize(
    ("answer", "passes"),
    [
        ("```python\ndef root(n):\n    return math.isqrt(helper(n))\n```", True),
        ("    return math.isqrt(n)\n\n\ndef other():\n    (", True),
        ("    return n\n", False),
        ("I cannot.", False),
        ("def root(n):\n    return 3\nimport sys\nsys.exit(0)", False),
        ("", False),
    ],
)
def test_a_function_or_its_body_is_an_answer(answer: str, passes: bool) -> None:
    assert run_program(program_of_humaneval(TASK, answer)).passed is passes


@confined
def test_a_task_with_a_set_up() -> None:
    fields = {"test_list": ["assert f() == LIMIT"], "test_setup_code": "LIMIT = 3"}
    assert run_program(program_of_mbpp(fields, "def f():\n    return 3")).passed
    assert not run_program(program_of_mbpp(fields, "def f():\n    return 4")).passed


@confined
@pytest.mark.skipif(not DATA.is_dir(), reason="the real data is not here")
@pytest.mark.parametrize("name", ["humaneval", "mbpp", "gsm8k"])
def test_the_answers_of_the_makers_are_right_and_others_wrong(name: str) -> None:
    files = find_files(name, [DATA], trained=False)
    rows = read_data_set(name, files, root=DATA, problems=Problems(), max_samples=10, trained=False)
    judge = JUDGES[name]
    for example, (_, row) in zip(rows.examples(rows.held_out, "plain", Problems()), rows.held_out, strict=True):
        for answer, expected in ((example.answer, True), ("I do not know.", False)):
            if judge.program is not None:
                assert run_program(judge.program(row.fields, answer or "")).passed is expected
            elif judge.right is not None:
                assert judge.right(row.fields, answer or "") is expected
