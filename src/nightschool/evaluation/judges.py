"""How the answer to a question of a data set is judged: by its last number, or by the tests of the task.

A judge is one entry in `JUDGES`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation
from typing import Any, Literal

Measure = Literal["exact_match", "pass_at_1"]

_NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?|-?\.\d+")
_MARK = "####"
_FENCE = re.compile(r"```[^\n`]*\n(.*?)(?:```|\Z)", re.DOTALL)
_AFTER_A_FUNCTION = re.compile(r"^(?:def |class |if __name__|print\(|#|```|@)", re.MULTILINE)


def final_number(text: str) -> Decimal | None:
    """The number after the first `####`, else the last number of a text; None if there is none."""
    _, mark, after = text.partition(_MARK)
    found = _NUMBER.findall(after) if mark else []
    number = found[0] if found else next(reversed(_NUMBER.findall(text)), None)
    try:
        return None if number is None else Decimal(number.replace(",", ""))
    except InvalidOperation:
        return None


def code_in(answer: str) -> str:
    """The first block of code in an answer, else all of it."""
    fenced = _FENCE.search(answer)
    return (fenced[1] if fenced else answer).replace("\r\n", "\n").strip("\n")


def same_number(fields: Mapping[str, Any], answer: str) -> bool:
    """Whether the answer ends in the number that the row's own answer ends in."""
    expected = final_number(str(fields["answer"]))
    return expected is not None and final_number(answer) == expected


def program_of_mbpp(fields: Mapping[str, Any], answer: str) -> str:
    """The answer's code, what the task sets up, and the task's assertions."""
    tests = fields["test_list"]
    return "\n".join([code_in(answer), str(fields.get("test_setup_code") or ""), *map(str, tests)])


def program_of_humaneval(fields: Mapping[str, Any], answer: str) -> str:
    """The answer's function, or the task's beginning of one that the answer completes, and the task's check of it."""
    prompt, entry_point, code = str(fields["prompt"]), str(fields["entry_point"]), code_in(answer)
    begins = re.search(rf"^def {re.escape(entry_point)}\(", prompt, re.MULTILINE)
    if re.search(rf"^def {re.escape(entry_point)}\(", code, re.MULTILINE):
        # What the task imports and defines before its function is there for the answer too.
        whole = prompt[: begins.start()] + "\n" + code if begins else code
    else:
        body_ends = _AFTER_A_FUNCTION.search(code)
        whole = prompt + (code[: body_ends.start()] if body_ends else code)
    return f"{whole}\n{fields['test']}\ncheck({entry_point})\n"


@dataclass(frozen=True)
class Judge:
    """`right` judges an answer by itself, `program` makes what is to be run of it; a judge has one of the two."""

    measure: Measure
    right: Callable[[Mapping[str, Any], str], bool] | None = None
    program: Callable[[Mapping[str, Any], str], str] | None = None


JUDGES: Mapping[str, Judge] = {
    "gsm8k": Judge("exact_match", right=same_number),
    "mbpp": Judge("pass_at_1", program=program_of_mbpp),
    "humaneval": Judge("pass_at_1", program=program_of_humaneval),
}
"""By the name of the data set; of the others only loss and accuracy are taken."""
