"""Data sets that have a name: where each lies, how its rows become question and answer, and what of it is never trained.

A data set is one entry in `DATA_SETS`. In a template, `{field}` stands for a field of the row (a list becomes lines), and what lies
between `[[` and `]]` is left out where one of its fields is blank.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

Task = Literal["chat", "code", "reasoning"]
PromptStyle = Literal["plain", "headings"]


@dataclass(frozen=True)
class LastShare:
    """The last rows of the files are held out."""

    share: float


@dataclass(frozen=True)
class OwnFiles:
    """What is held out lies in files of its own. `trained` and `held_out` begin their names; None: no row is there to be trained."""

    trained: str | None
    held_out: str


@dataclass(frozen=True)
class Numbered:
    """A field of the row is a number that says on which side it is; rows of neither range are left out."""

    field: str
    trained: range
    held_out: range


@dataclass(frozen=True)
class DataSet:
    """`hub` is the repository of the Hugging Face Hub, `files` are what is read of it.

    `prompt` is what a person would ask, `headings` the same under the headings of Pragnosia's scripts.
    """

    task: Task
    hub: str
    files: tuple[str, ...]
    split: LastShare | OwnFiles | Numbered
    prompt: str
    headings: str
    answer: str
    judged_by: tuple[str, ...] = ()
    """Further fields, by which what a model answers is judged."""

    @property
    def columns(self) -> frozenset[str]:
        """Fields that are read of a row beside those of the templates."""
        return frozenset((*self.judged_by, *((self.split.field,) if isinstance(self.split, Numbered) else ())))

    def prompt_in(self, style: PromptStyle) -> str:
        """The template of the question."""
        return self.prompt if style == "plain" else self.headings


DATA_SETS: Mapping[str, DataSet] = {
    "alpaca": DataSet(
        task="chat",
        hub="tatsu-lab/alpaca",
        files=("data/*.parquet",),
        split=LastShare(0.05),
        prompt="{instruction}[[\n\n{input}]]",
        headings="### Instruction:\n{instruction}\n\n[[### Input:\n{input}\n\n]]### Response:\n",
        answer="{output}",
    ),
    "codealpaca": DataSet(
        task="code",
        hub="sahil2801/CodeAlpaca-20k",
        files=("*.json",),
        split=LastShare(0.05),
        prompt="{instruction}[[\n\n{input}]]",
        headings="### Code Task:\n{instruction}[[\n\n{input}]]\n\n### Solution:\n",
        answer="{output}",
    ),
    # 11 to 510 are its test, 601 to 974 its training; 1 to 10 are meant for prompts, and 511 to 600 for choosing settings.
    "mbpp": DataSet(
        task="code",
        hub="google-research-datasets/mbpp",
        files=("full/*.parquet",),
        split=Numbered("task_id", trained=range(601, 975), held_out=range(11, 511)),
        prompt="{text}\n\nYour code should pass these tests:\n\n{test_list}",
        headings="### Code Task:\n{text}\n\nYour code should pass these tests:\n\n{test_list}\n\n### Solution:\n",
        answer="```python\n{code}\n```",
        judged_by=("test_list", "test_setup_code"),
    ),
    "gsm8k": DataSet(
        task="reasoning",
        hub="openai/gsm8k",
        files=("main/*.parquet",),
        split=OwnFiles("train", "test"),
        prompt="{question}",
        headings="### Problem:\n{question}\n\n### Solution:\n",
        answer="{answer}",
    ),
    "math": DataSet(
        task="reasoning",
        hub="EleutherAI/hendrycks_math",
        files=("*/*.parquet",),
        split=OwnFiles("train", "test"),
        prompt="{problem}",
        headings="### Problem:\n{problem}\n\n### Solution:\n",
        answer="{solution}",
    ),
    "humaneval": DataSet(
        task="code",
        hub="openai/openai_humaneval",
        files=("openai_humaneval/*.parquet",),
        split=OwnFiles(None, "test"),
        prompt="Complete this function:\n\n```python\n{prompt}```",
        headings="### Code Task:\nComplete this function:\n\n{prompt}\n\n### Solution:\n",
        # The body alone: a question that is repeated would be learned and predicted for nothing.
        answer="```python\n{canonical_solution}```",
        judged_by=("test", "entry_point"),
    ),
}
"""By the name that `data.*.dataset` and `nightschool eval --dataset` take."""

ALL = "all"
TASKS: tuple[Task, ...] = ("chat", "code", "reasoning")


def is_trainable(name: str) -> bool:
    """Whether any of its rows is there to be trained."""
    split = DATA_SETS[name].split
    return not isinstance(split, OwnFiles) or split.trained is not None


def data_sets_named(names: Iterable[str], *, trained: bool) -> list[str]:
    """The data sets that names, tasks and `all` mean, each once.

    Args:
        names: Such as `chat` and `mbpp`.
        trained: Whether they are to be trained; a task then means only those of which rows are.

    Raises:
        ValueError: If a name is none, or means a data set of which nothing may be trained.
    """
    found: dict[str, None] = {}
    for name in (name.lower() for name in names):
        if name == ALL or name in TASKS:
            of_task = [key for key, one in DATA_SETS.items() if name in (ALL, one.task)]
            found |= dict.fromkeys(key for key in of_task if not trained or is_trainable(key))
        elif name not in DATA_SETS:
            raise ValueError(_unknown(name))
        elif trained and not is_trainable(name):
            raise ValueError(f"{name} is there to be asked, and is never trained; write another data set")
        else:
            found[name] = None
    return list(found)


def _unknown(name: str) -> str:
    known = [ALL, *TASKS, *DATA_SETS]
    near = difflib.get_close_matches(name, known, n=1)
    meant = f"; did you mean {near[0]}?" if near else "."
    return f"{name!r} is no data set{meant} There are {', '.join(known)}; a file of your own is named by `path`"
