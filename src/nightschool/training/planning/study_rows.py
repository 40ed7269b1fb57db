"""What a plan says of the forms of new examples, and of what contradicts in them."""

from __future__ import annotations

import shlex

from nightschool.config.recipe import Study
from nightschool.feedback.contradictions import what_to_do
from nightschool.feedback.selection import Selection
from nightschool.feedback.tonight import said_of_waiting
from nightschool.feedback.written_forms import WrittenForms
from nightschool.training.planning.plan_row import PlanRow
from nightschool.training.self_distillation import Lessons, Teacher

SHOWN_FORMS = 6
SHOWN_CONTRADICTIONS = 5


def study_rows(selection: Selection, study: Study, written: WrittenForms | None) -> list[PlanRow]:
    """Contradictions, then forms: how many, and some of them; nothing where there are none."""
    rows = [*_contradictions(selection), *_forms(selection)]
    waiting = said_of_waiting(selection.num_waiting, study.facts_per_night)
    if waiting:
        rows.append(PlanRow("waiting", waiting, {"facts_waiting": selection.num_waiting}))
    if written is not None:
        rows.append(PlanRow("written", written.text, {"forms_written": written.counts}))
    elif study.write in ("self", "both"):
        text = f"by the champion before step 1, in {study.write_for:g} s at most; those above are what rules make in their place"
        rows.append(PlanRow("written", text, {"write_for_seconds": study.write_for}))
    return rows


def objective_rows(lessons: Lessons | None, teacher: Teacher | None) -> list[PlanRow]:
    """What is learned of forms where it is not their words. Before the run begins, nobody has asked the teacher."""
    if lessons is None:
        return []
    asked = len(lessons.lessons)
    facts = {"lessons": asked, "lessons_taught": len(teacher.lessons) if teacher else None}
    text = f"distill: {asked} forms, by what the model says with the fact before its eyes, asked before step 1"
    return [PlanRow("objective", teacher.text(asked) if teacher else text, facts)]


def study_notes(selection: Selection, name: str) -> list[str]:
    """How a person rejects a form, and chooses between what contradicts."""
    advice = what_to_do(selection.contradictions, name)
    if not selection.forms:
        return [advice] if advice else []
    question = shlex.quote(selection.forms[0].example.question or "")
    how = f"A form that is wrong is never made again after nightschool data reject {question} --name {name}."
    return [how, *([advice] if advice else [])]


def _contradictions(selection: Selection) -> list[PlanRow]:
    found = selection.contradictions
    if not found:
        return []
    untrained = sum(one.num_untrained for one in found)
    text = f"{len(found)} questions have different answers, and {untrained} examples are not trained"
    facts = {
        "num_contradictions": len(found),
        "examples_contradicting": untrained,
        "contradictions": [one.to_json() for one in found[:SHOWN_CONTRADICTIONS]],
    }
    shown = [PlanRow(" ", one.text, {}) for one in found[:SHOWN_CONTRADICTIONS]]
    return [PlanRow("contradict", text, facts), *shown]


def _forms(selection: Selection) -> list[PlanRow]:
    forms = selection.forms
    if not forms:
        return []
    aside = sum(form.kept_aside for form in forms)
    studied = len({form.of for form in forms})
    shown = [
        {
            "form": form.id,
            "origin": form.origin,
            "kept_aside": form.kept_aside,
            "question": form.example.question,
            "answer": form.example.answer,
        }
        for form in forms[:SHOWN_FORMS]
    ]
    facts = {
        "forms_trained": len(forms) - aside,
        "forms_kept_aside": aside,
        "examples_in_forms": studied,
        "forms": shown,
    }
    text = "{forms_trained} more of {examples_in_forms} new examples, and {forms_kept_aside} that only the gate asks".format(
        **facts
    )
    lines = [PlanRow("forms", text, facts)]
    for one in shown:
        place = "kept for the gate" if one["kept_aside"] else one["origin"]
        lines.append(PlanRow(" ", f"{one['question']} → {one['answer']} ({place})", {}))
    return lines
