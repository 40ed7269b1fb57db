"""From the key that was typed to the setting that is meant, or to a message that says which could have been meant."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import dataclass, replace

from pydantic import ValidationError

from nightschool.config.aliases import ALIASES, AMBIGUOUS, GROUPS, OF_REFUSED, REFUSED, SHORTHANDS, SaysNothing
from nightschool.config.assignments import Assignment, EmptyList, Source
from nightschool.config.schema import Path, Setting, children, dotted, find, settings
from nightschool.errors import Problem


@dataclass
class Named:
    """The assignments of one source under canonical names, what was translated, and what was not understood."""

    assignments: list[Assignment]
    notes: list[str]
    problems: list[Problem]


class _Unknown(Exception):
    """`prefix` is the part of the path that was understood, with the part that was not."""

    def __init__(self, prefix: Path, message: str) -> None:
        self.prefix = prefix
        super().__init__(message)


def name_settings(source: Source) -> Named:
    """Give every assignment of a source its canonical path and the type that its setting takes."""
    named = Named([], [], list(source.problems))
    dead: list[tuple[Path, str]] = []
    for assignment in source.assignments:
        if any(assignment.path[: len(prefix)] == prefix and where == assignment.where for prefix, where in dead):
            continue
        try:
            understood = _understand(assignment)
        except _Unknown as unknown:
            dead += _places_below(source, unknown.prefix)
            where = source.sections.get(unknown.prefix, assignment.where)
            named.problems.append(Problem(where, dotted(unknown.prefix), str(unknown)))
            continue
        if understood is None:
            named.notes.append(f"{assignment.spelling} ({assignment.where}) changes nothing")
            continue
        if isinstance(assignment.value, EmptyList) and not _takes_elements(understood):
            dead += _places_below(source, assignment.path)
        is_element = isinstance(assignment.path[-1], int)
        if understood.path != assignment.path and assignment.path not in SHORTHANDS and not is_element:
            named.notes.append(_note(assignment, understood))
        named.assignments.append(understood)
    _refuse_two_spellings(named)
    return named


def _places_below(source: Source, prefix: Path) -> list[tuple[Path, str]]:
    """What lies below a bad key, which is as bad but need not be said. In YAML it has lines of its own."""
    wheres = {a.where for a in source.assignments if a.path[: len(prefix)] == prefix}
    return [(prefix, where) for where in wheres]


def _takes_elements(assignment: Assignment) -> bool:
    setting = find(assignment.path)
    return isinstance(assignment.value, EmptyList) and setting is not None and setting.is_list


def _note(assignment: Assignment, understood: Assignment) -> str:
    at = f" ({assignment.where})" if assignment.where.partition("=")[0] != assignment.spelling else ""
    changed = understood.value != assignment.value and not isinstance(assignment.value, EmptyList)
    became = f" = {understood.value}" if changed and understood.raw != assignment.raw else ""
    return f"{assignment.spelling}{at} is read as {dotted(understood.path)}{became}"


def _understand(assignment: Assignment) -> Assignment | None:
    """The assignment under its canonical path; None if it says nothing."""
    path = assignment.path
    for end in range(1, len(path) + 1):
        if find(path[:end]) is not None or _is_element(path[:end]):
            continue
        part = str(path[end - 1]).replace("-", "_")
        prefix = path[: end - 1]
        if part in GROUPS and end == 1 and len(path) > 1 and isinstance(path[1], str):
            return _of_a_group(assignment)
        if part != path[end - 1] and find((*prefix, part)) is not None:
            return _understand(replace(assignment, path=(*prefix, part, *path[end:])))
        alias = ALIASES.get(part)
        if alias is not None and alias.path[: len(prefix)] == prefix:
            return _translate(assignment, part, end)
        raise _Unknown(path[:end], _what_was_meant(prefix, path[end - 1], assignment.value))
    setting = find(path)
    if path in SHORTHANDS and (assignment.value is None or isinstance(assignment.value, str)):
        return _understand(replace(assignment, path=SHORTHANDS[path]))
    return assignment if setting is None else replace(assignment, value=_as_wanted(assignment, setting))


def _of_a_group(assignment: Assignment) -> Assignment | None:
    """What lies in a section of another program."""
    group = assignment.path[0]
    try:
        return _understand(replace(assignment, path=assignment.path[1:]))
    except _Unknown as unknown:
        raise _Unknown((group, *unknown.prefix), str(unknown)) from None


def _is_element(path: Path) -> bool:
    """Whether a path is an element of a list of plain values, such as lora.target_modules.0."""
    parent = find(path[:-1])
    return isinstance(path[-1], int) and parent is not None and parent.is_list


def _translate(assignment: Assignment, name: str, end: int) -> Assignment | None:
    alias = ALIASES[name]
    rest = assignment.path[end:]
    translated = replace(assignment, path=(*alias.path, *rest))
    if alias.convert is None:
        return _understand(translated)
    try:
        return replace(translated, value=alias.convert(assignment.value), raw=None)
    except SaysNothing:
        return None
    except ValueError as error:
        raise _Unknown(assignment.path, str(error)) from None


def _as_wanted(assignment: Assignment, setting: Setting) -> object:
    """A setting that is a text takes the text that was typed, whatever number or list YAML would make of it."""
    is_list = isinstance(assignment.value, EmptyList)
    if setting.takes_text and assignment.raw is not None and not (is_list and setting.is_list):
        return assignment.raw
    return assignment.value


def _what_was_meant(prefix: Path, part: str | int, value: object) -> str:
    """Why a key below `prefix` with this value is not understood, and what to write in its place."""
    name = str(part)
    parent = find(prefix) if prefix else None
    if parent is not None and parent.is_list and parent.section is not None:
        return f"is not a setting: {parent.key} is a list; write {dotted(prefix)}.0.{name}, or a list with dashes"
    if parent is not None and parent.section is None:
        return f"is not a setting: {parent.key} takes a value and has no keys below it"
    if isinstance(part, int):
        return (
            f"is not a setting: {dotted(prefix) or 'a recipe'} is not a list; write its keys: {_some(children(prefix))}"
        )
    if name in REFUSED:
        return REFUSED[name] + OF_REFUSED.get(name, lambda _: "")(value)
    elsewhere = [s for s in settings().values() if s.name == name]
    if name in AMBIGUOUS:
        elsewhere = [settings()[key] for key in AMBIGUOUS[name]]
    if len(elsewhere) > 1:
        meanings = " or ".join(f"{s.key} ({_first_clause(s.description)})" for s in elsewhere)
        return f"could mean {meanings}; write the one that is meant"
    if elsewhere:
        return f"is not a setting here: this key belongs at {elsewhere[0].key}"
    if name in ALIASES:
        return f"is not a setting here: it is read as {ALIASES[name].key}, which is in another section; write it there"
    if "." in name and find(tuple(name.split("."))) is not None:
        *sections, leaf = name.split(".")
        nested = "".join(f"{section}: {{" for section in sections) + f"{leaf}: …" + "}" * len(sections)
        return f"is not a setting: in a file, sections are nested; write {nested}"
    siblings = children(prefix)
    near = _nearest(name, [*siblings, *(() if prefix else ALIASES)])
    if near is not None:
        return f"is not a setting; did you mean {dotted((*prefix, near))}?"
    near = _nearest(name, [s.name for s in settings().values()])
    if near is not None:
        meant = next(s.key for s in settings().values() if s.name == near)
        return f"is not a setting; did you mean {meant}?"
    return f"is not a setting; {dotted(prefix) if prefix else 'a recipe'} knows {_some(siblings)}"


def _first_clause(description: str) -> str:
    return description.split(":")[0].split(";")[0].split(". ")[0].rstrip(".").lower()


def _nearest(name: str, names: Sequence[str]) -> str | None:
    matches = difflib.get_close_matches(name.lower(), names, n=1, cutoff=0.65)
    return matches[0] if matches else None


def _some(names: Sequence[str]) -> str:
    return ", ".join(names)


def _refuse_two_spellings(named: Named) -> None:
    """Refuse two spellings of one setting in one source, unless they say the same."""
    first: dict[Path, Assignment] = {}
    kept: list[Assignment] = []
    for assignment in named.assignments:
        other = first.setdefault(assignment.path, assignment)
        if other is assignment or other.spelling == assignment.spelling or _same(other, assignment):
            kept.append(assignment)
            continue
        named.problems.append(
            Problem(
                assignment.where,
                dotted(assignment.path),
                f"is set twice: {_said(other)} and {_said(assignment)}; keep one",
            )
        )
    named.assignments = kept


def _said(assignment: Assignment) -> str:
    if "=" in assignment.where:
        return assignment.where
    shown = assignment.raw if assignment.raw is not None else assignment.value
    return f"{assignment.spelling}: {shown} ({assignment.where})"


def _same(one: Assignment, other: Assignment) -> bool:
    if isinstance(one.value, EmptyList) or isinstance(other.value, EmptyList):
        return True
    setting = find(one.path)
    if setting is None or one.value == other.value:
        return bool(one.value == other.value)
    try:
        return bool(setting.parsed(one.value) == setting.parsed(other.value))
    except ValidationError:
        return False
