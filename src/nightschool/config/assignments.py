"""Where settings are written: YAML text, `a.b=value` overrides and environment variables, as a flat list.

Every source becomes a list of assignments, each with the place it was written at, so that all later steps can say
`recipe.yaml:12` or `train.epochs=many` about it. YAML is composed into nodes and never constructed into objects:
nodes know their lines, show duplicate keys, and cannot run anything.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from ruamel.yaml import YAML
from ruamel.yaml.error import MarkedYAMLError, YAMLError
from ruamel.yaml.events import CollectionEndEvent, CollectionStartEvent
from ruamel.yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode

from nightschool.config.schema import Path, dotted
from nightschool.errors import Problem

SourceKind = Literal["recipe", "environment", "override"]

# A recipe has some hundred nodes. Anchors that multiply ("billion laughs") end here.
MAX_NODES = 20_000
MAX_DEPTH = 32

_ENVIRONMENT_PREFIX = "NIGHTSCHOOL_"
# Variables that are not settings of a recipe.
RESERVED_VARIABLES = frozenset(
    {
        "NIGHTSCHOOL_HOME",
        "NIGHTSCHOOL_API_KEY",
        "NIGHTSCHOOL_JUDGE_KEY",
        "NIGHTSCHOOL_DEBUG",
    }
)
# Kubernetes sets the first in every container beside a service that is called nightschool; tests use the last.
_NO_SETTING = re.compile(r"NIGHTSCHOOL_(SERVICE_(HOST|PORT\w*)|PORT(_\w+)?|TEST_\w+)")


@dataclass(frozen=True)
class Origin:
    """Who set a setting. `where` is `file:line`, the name of a variable, or the override as typed; empty for a default."""

    kind: Literal["default", "recipe", "environment", "override"]
    where: str = ""

    def __str__(self) -> str:
        return f"{self.kind}: {self.where}" if self.where else self.kind


@dataclass(frozen=True)
class EmptyList:
    """The value of an assignment that starts a list anew; its elements follow as assignments of their own."""


@dataclass(frozen=True)
class Assignment:
    """One value for one place.

    `raw` is the scalar as it was typed, without the type that YAML gives it; None if it was quoted or is not a scalar.
    `spelling` is the key as the user typed it, for messages.
    """

    path: Path
    value: Any
    where: str
    spelling: str
    raw: str | None = None


@dataclass
class Source:
    """All that one source says, and what is wrong with how it says it."""

    kind: SourceKind
    assignments: list[Assignment]
    problems: list[Problem]
    sections: dict[Path, str] = field(default_factory=dict)
    """Where each key stands that has keys or entries below it."""


def read_yaml(text: str, file: str) -> Source:
    """Read a recipe. Problems of syntax end the reading; all others are collected."""
    source = Source("recipe", [], [])
    try:
        root = _compose(text)
    except YAMLError as error:
        source.problems.append(_syntax_problem(error, text, file))
        return source
    if root is None or (isinstance(root, ScalarNode) and str(root.tag).endswith(":null")):
        return source
    if not isinstance(root, MappingNode):
        source.problems.append(
            Problem(f"{file}:{_line(root)}", "", "is not a recipe; a recipe is made of `key: value`")
        )
        return source
    walk = _Walk(file, source)
    walk.node(root, ())
    return source


def read_overrides(overrides: Sequence[str]) -> Source:
    """Read `a.b=value` texts, as they stand behind a command."""
    source = Source("override", [], [])
    for text in overrides:
        key, equals, value = text.partition("=")
        key = key.strip()
        if not equals or not key:
            source.problems.append(
                Problem(text, "", "is not an override; write key=value, such as train.learning_rate=1e-5")
            )
            continue
        parts = key.lstrip("-").split(".")
        path: Path = tuple(int(part) if part.isascii() and part.isdecimal() else part for part in parts)
        _read_value(source, path, value, where=text, spelling=key)
    return source


def read_environment(env: Mapping[str, str]) -> Source:
    """Read `NIGHTSCHOOL_TRAIN__LEARNING_RATE=…`: two underscores stand for a dot, case does not matter."""
    source = Source("environment", [], [])
    for variable in sorted(env):
        name = variable.upper()
        if not name.startswith(_ENVIRONMENT_PREFIX) or name in RESERVED_VARIABLES or _NO_SETTING.fullmatch(name):
            continue
        parts = name.removeprefix(_ENVIRONMENT_PREFIX).lower().split("__")
        path: Path = tuple(int(part) if part.isascii() and part.isdecimal() else part for part in parts)
        _read_value(source, path, env[variable], where=variable, spelling=variable)
    return source


def _read_value(source: Source, path: Path, text: str, *, where: str, spelling: str) -> None:
    """Append what one text says about one place: a YAML scalar, list or mapping."""
    read = Source(source.kind, [], [])
    raw = Assignment(path, text.strip(), where, spelling, raw=text.strip())
    try:
        root = _compose(text)
        if root is None:
            read.assignments.append(Assignment(path, None, where, spelling))
        else:
            _Walk(where, read, lines=False).node(root, path)
    except YAMLError:
        # `>= 50%` opens a folded block in YAML. What takes text gets the text; what does not says so.
        read.assignments.append(raw)
    if any(problem.key for problem in read.problems):
        source.problems += read.problems
        return
    for assignment in read.assignments:
        whole = assignment.path == path
        below = assignment.path[len(path) :]
        source.assignments.append(
            replace(
                assignment,
                spelling=spelling if whole else f"{spelling}.{dotted(below)}",
                # Flow collections keep the text too: a path such as [ab].json is text, not a list.
                raw=text.strip()
                if whole and (assignment.raw is not None or not isinstance(root, ScalarNode))
                else None,
            )
        )


class _TooDeep(YAMLError):
    """Nested too deep to be read; `line` is the first such line."""

    def __init__(self, line: int) -> None:
        self.line = line
        super().__init__()


def _compose(text: str) -> Node | None:
    # Events come one by one, so that what nests too deep for the composer's stack is found before it gets there.
    depth = 0
    for event in YAML(typ="safe", pure=True).parse(text):
        depth += isinstance(event, CollectionStartEvent) - isinstance(event, CollectionEndEvent)
        if depth > MAX_DEPTH:
            raise _TooDeep(int(event.start_mark.line) + 1)
    node: Node | None = YAML(typ="safe", pure=True).compose(text)
    return node


def _line(node: Node) -> int:
    return int(node.start_mark.line) + 1


def _syntax_problem(error: YAMLError, text: str, file: str) -> Problem:
    if isinstance(error, _TooDeep):
        return Problem(f"{file}:{error.line}", "", f"is nested more than {MAX_DEPTH} levels deep; flatten it")
    if isinstance(error, MarkedYAMLError):
        mark = error.problem_mark or error.context_mark
        line = mark.line + 1 if mark is not None else 1
        return Problem(f"{file}:{line}", "", f"is no YAML: {error.problem or error.context}")
    position = getattr(error, "position", 0)
    line = text.count("\n", 0, position) + 1
    return Problem(f"{file}:{line}", "", f"is no YAML: it holds the character {getattr(error, 'character', '')!r}")


class _Walk:
    """Flattens a tree of nodes. `lines` is false where the place is one text and has no lines."""

    def __init__(self, file: str, source: Source, *, lines: bool = True) -> None:
        self.file = file
        self.source = source
        self.lines = lines
        self.num_nodes = 0

    def node(self, node: Node, path: Path, at: Node | None = None) -> None:
        """Append what `node` says about `path`; `at` is the node whose line is named, its key if it has one."""
        where = self._where(at or node)
        self.num_nodes += 1
        if self.num_nodes > MAX_NODES or len(path) > MAX_DEPTH:
            if not any("nodes" in problem.message for problem in self.source.problems):
                message = f"has more than {MAX_NODES} nodes or {MAX_DEPTH} levels; write it without nested anchors"
                self.source.problems.append(Problem(where, dotted(path), message))
            return
        if isinstance(node, MappingNode):
            self.source.sections.setdefault(path, where)
            for key, value_node, key_node in self._entries(node, path):
                self.node(value_node, (*path, key), at=key_node)
        elif isinstance(node, SequenceNode):
            self._append(path, EmptyList(), where)
            for index, element in enumerate(node.value):
                self.node(element, (*path, index))
        else:
            self._scalar(node, path, where)

    def _entries(self, node: MappingNode, path: Path, depth: int = 0) -> Iterator[tuple[str, Node, Node]]:
        """The entries of a mapping, with what it merges in (`<<: *defaults`) where it says nothing itself."""
        own: dict[str, Node] = {}
        merged: list[Node] = []
        for key_node, value_node in node.value:
            if not isinstance(key_node, ScalarNode):
                self._problem(key_node, path, "is a list or a mapping in the place of a key; write `key: value`")
            elif str(key_node.tag).endswith(":merge"):
                merged += value_node.value if isinstance(value_node, SequenceNode) else [value_node]
            elif key_node.value in own:
                first = _line(own[key_node.value])
                said = f"is written twice, first on line {first}" if self.lines else "is written twice"
                self._problem(key_node, (*path, key_node.value), f"{said}; remove one")
            else:
                own[key_node.value] = key_node
                yield key_node.value, value_node, key_node
        for source in merged:
            self.num_nodes += 1
            if not isinstance(source, MappingNode):
                self._problem(source, (*path, "<<"), "merges what is not a mapping; write <<: *anchor_of_a_mapping")
            elif depth >= MAX_DEPTH:
                self._problem(source, (*path, "<<"), "merges itself; merge another mapping")
            elif self.num_nodes <= MAX_NODES:
                for key, value_node, key_node in self._entries(source, path, depth + 1):
                    if key not in own:
                        own[key] = key_node
                        yield key, value_node, key_node

    def _scalar(self, node: Node, path: Path, where: str) -> None:
        try:
            value = _construct(node)
        except ValueError as error:
            self._problem(node, path, str(error))
            return
        plain = isinstance(node, ScalarNode) and node.style is None and value is not None
        self._append(path, value, where, raw=node.value if plain else None)

    def _append(self, path: Path, value: Any, where: str, raw: str | None = None) -> None:
        self.source.assignments.append(Assignment(path, value, where, dotted(path), raw))

    def _problem(self, node: Node, path: Path, message: str) -> None:
        self.source.problems.append(Problem(self._where(node), dotted(path), message))

    def _where(self, node: Node) -> str:
        return f"{self.file}:{_line(node)}" if self.lines else self.file


def _construct(node: Node) -> Any:
    """A scalar's value as YAML 1.2 reads it: text, number, truth or nothing. Times stay text."""
    kind = str(node.tag).removeprefix("tag:yaml.org,2002:")
    if kind in ("str", "timestamp"):
        return node.value
    if kind not in ("null", "bool", "int", "float"):
        raise ValueError(f"has the tag {node.tag!r}; a recipe holds plain values: remove the tag")
    try:
        return YAML(typ="safe", pure=True).constructor.construct_object(node)
    except ValueError:
        raise ValueError(f"{node.value!r} is not a number") from None
