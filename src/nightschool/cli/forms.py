"""`nightschool data reject` and `rejected`: forms that are never made again."""

from __future__ import annotations

from typing import Any

from nightschool.cli.formatting import moment
from nightschool.cli.output import answer, answer_rows, note, who
from nightschool.data.study.forms import FORM_ID, form_id
from nightschool.errors import NotFound
from nightschool.feedback.rejected_forms import RejectedForm, RejectedForms
from nightschool.feedback.selection_files import read_forms
from nightschool.feedback.written_forms import forms_written
from nightschool.store.home import Home
from nightschool.store.names import split_name
from nightschool.store.runs import RunStore


def reject(form: str, /, *, name: str = "default", undo: bool = False) -> None:
    """Reject a form in which a new example is studied: it is never made again for this name.

    Args:
        form: Its question, as the plan shows it, or its id (`form`) in study.jsonl of a run's folder.
        name: The name whose examples it is a form of.
        undo: Let it be made again.
    """
    home, by = Home.find(), f"cli:{who()}"
    forms = RejectedForms(home.database)
    if undo:
        wanted = _id_of(form)
        forms.remove(name, wanted, by=by)
        answer({"restored": wanted, "name": name}, f"The form {wanted} may be made for {name} again.", quiet=wanted)
        return
    question, is_known = _find(home, name, form)
    made = forms.add(name, question, by=by)
    if not is_known:
        note(f"No run of {name} has had such a form yet.")
    text = f"Rejected for {name} as {made.form}: {made.question}"
    answer(_row(made) | {"name": name, "was_studied": is_known}, text, quiet=made.form)


def rejected(*, name: str = "default") -> None:
    """List the rejected forms of a name.

    Args:
        name: The name.
    """
    answer_rows(
        [_row(one) for one in RejectedForms(Home.find().database).ls(name)],
        {"FORM": "form", "QUESTION": "question", "WHEN": lambda row: moment(row["rejected_at"]), "BY": "rejected_by"},
        none=f"No form is rejected for {name}. Reject one with nightschool data reject FORM --name {name}.",
        quiet="form",
    )


def _find(home: Home, name: str, form: str) -> tuple[str, bool]:
    """The question of a form, from its id or itself, and whether a run of this name has it.

    Raises:
        NotFound: If it is an id that no run of this name lists.
    """
    wanted = _id_of(form)
    for run in reversed(RunStore(home).ls(split_name(name)[0])):
        if run.name == name:
            for one in [*read_forms(run.path), *forms_written(run.path)]:
                if one.id == wanted:
                    return one.example.question or "", True
    if wanted == form.strip().lower():
        raise NotFound(
            f"No run of {name!r} has a form {wanted}. Write its question, as the plan shows it, or another --name."
        )
    return form, False


def _id_of(form: str) -> str:
    given = form.strip().lower()
    return given if FORM_ID.fullmatch(given) else form_id(form)


def _row(one: RejectedForm) -> dict[str, Any]:
    return vars(one)
