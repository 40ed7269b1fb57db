"""From a file, variables and overrides to one recipe, with who set what.

Order: defaults < recipe < environment < overrides. All problems of all sources are reported together, each as
`file:line: key: message`, or with the variable or the override in the place of the file.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path as FilePath
from typing import Any

from pydantic import ValidationError

from nightschool.config.assignments import (
    Assignment,
    EmptyList,
    Origin,
    Source,
    read_environment,
    read_overrides,
    read_yaml,
)
from nightschool.config.data_source import OF_SOME_SOURCES, SOURCE_KINDS
from nightschool.config.messages import explain
from nightschool.config.recipe import DEFAULTS_OF_METHODS, Recipe
from nightschool.config.resolve_keys import name_settings
from nightschool.config.schema import Path, dotted, find
from nightschool.config.write import to_yaml
from nightschool.errors import NotFound, Problem, RecipeError

__all__ = ["LoadedRecipe", "load_recipe", "parse_recipe", "to_yaml"]

# A recipe is some kilobytes. What is larger is a data file that was taken for one.
MAX_RECIPE_BYTES = 1_000_000

_RANKS = {"default": 0, "recipe": 1, "environment": 2, "override": 3}


@dataclass(frozen=True)
class LoadedRecipe:
    """A recipe, who set each of its settings (by dotted key), and which names were translated."""

    recipe: Recipe
    origins: Mapping[str, Origin]
    notes: tuple[str, ...] = ()


def load_recipe(
    path: FilePath | None,
    overrides: Sequence[str] = (),
    *,
    env: Mapping[str, str] | None = None,
    base_values: Mapping[str, Any] | None = None,
) -> LoadedRecipe:
    """Load a recipe.

    Args:
        path: A YAML or JSON file; None if overrides say everything.
        overrides: Texts such as `train.epochs=3`, `lr=1e-5` or `data.0.path=train.json`.
        env: Variables such as NIGHTSCHOOL_TRAIN__EPOCHS. None stands for those of this process, `{}` for none.
        base_values: Nested defaults in place of those of the schema.

    Raises:
        NotFound: If there is no such file.
        RecipeError: With every problem of every source.
    """
    file = "recipe" if path is None else str(path)
    text = "" if path is None else _read(path)
    return parse_recipe(text, overrides, file=file, env=env, base_values=base_values)


def parse_recipe(
    text: str,
    overrides: Sequence[str] = (),
    *,
    file: str = "recipe",
    env: Mapping[str, str] | None = None,
    base_values: Mapping[str, Any] | None = None,
) -> LoadedRecipe:
    """As `load_recipe`, from the text of a recipe. `file` names it in messages."""
    written = read_yaml(text, file)
    unreadable = bool(written.problems and not written.assignments)
    layers = [
        (name_settings(written), "recipe"),
        (name_settings(read_environment(os.environ if env is None else env)), "environment"),
        (name_settings(read_overrides(overrides)), "override"),
    ]
    if base_values:
        layers.insert(0, (name_settings(Source("recipe", list(_flat(base_values, ())), [])), "default"))
    tree = _Tree()
    problems: list[Problem] = []
    for named, kind in layers:
        problems += named.problems
        for assignment in named.assignments:
            problem = tree.put(assignment, kind)
            if problem is not None:
                problems.append(problem)
    tree.settle_rhythm()
    tree.settle_sources()
    recipe, found = _validate(tree, file, text)
    # What is missing because a file or a key could not be understood would bury the reason.
    bad_keys = [problem.key for problem in problems]
    problems += [
        problem
        for problem in ([] if unreadable else found)
        if not any(key.startswith(f"{problem.key}.") for key in bad_keys)
    ]
    if recipe is None or problems:
        raise RecipeError(_in_order(problems, file))
    notes = tuple(note for named, _ in layers for note in named.notes)
    return LoadedRecipe(recipe, _origins(recipe, tree), notes)


def _read(path: FilePath) -> str:
    try:
        if path.exists() and not (path.is_file() or path.is_dir()):
            message = "is no regular file, but a pipe, a socket or a device; copy what it gives into a file"
            raise RecipeError([Problem(str(path), "", message)])
        with path.open("rb") as stream:
            content = stream.read(MAX_RECIPE_BYTES + 1)
    except FileNotFoundError:
        raise NotFound(f"The recipe {path} does not exist. Check the path; recipes/ has some to begin with.") from None
    except IsADirectoryError:
        raise RecipeError([Problem(str(path), "", "is a folder; name a YAML file in it")]) from None
    except OSError as error:
        raise RecipeError(
            [Problem(str(path), "", f"cannot be read: {error.strerror}; check its permissions")]
        ) from None
    if len(content) > MAX_RECIPE_BYTES:
        message = f"is larger than {MAX_RECIPE_BYTES} bytes, so it is not a recipe; name data with data.0.path={path}"
        raise RecipeError([Problem(str(path), "", message)])
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        message = f"the byte 0x{content[error.start]:02x} is no UTF-8; save the file as UTF-8"
        raise RecipeError([Problem(f"{path}:{line}", "", message)]) from None


def _flat(value: Any, path: Path) -> Iterator[Assignment]:
    if isinstance(value, Mapping):
        for key, below in value.items():
            yield from _flat(below, (*path, str(key)))
    elif isinstance(value, list | tuple):
        yield Assignment(path, EmptyList(), "given", dotted(path))
        for index, element in enumerate(value):
            yield from _flat(element, (*path, index))
    else:
        yield Assignment(path, value, "given", dotted(path))


class _Tree:
    """Nested plain values that grow by assignments; remembers the last origin of every path."""

    def __init__(self) -> None:
        self.root: dict[str, Any] = {}
        self.origins: dict[Path, Origin] = {}

    def put(self, assignment: Assignment, kind: Any) -> Problem | None:
        """Set one value; a problem if an index lies beyond the end of its list."""
        path, value = assignment.path, assignment.value
        setting = find(path)
        if value is None and setting is not None and setting.section is not None:
            return None  # `train:` with nothing below it, as when all of it is commented out
        node: Any = self.root
        for depth, part in enumerate(path[:-1]):
            node = self._step(node, part, path[depth + 1])
            if node is None:
                return self._beyond(assignment, depth)
        last = path[-1]
        if isinstance(value, EmptyList):
            value = []
            self.origins = {p: origin for p, origin in self.origins.items() if p[: len(path)] != path}
        if isinstance(last, int):
            if not isinstance(node, list) or last > len(node):
                return self._beyond(assignment, len(path) - 1)
            node[last : last + 1] = [value]
        else:
            node[last] = value
        self.origins[path] = Origin(kind, assignment.where)
        return None

    @staticmethod
    def _step(node: Any, part: str | int, below: str | int) -> Any:
        """The container at `part`, made if it is not there; None beyond the end of a list."""
        empty: Any = [] if isinstance(below, int) else {}
        if isinstance(part, int):
            if not isinstance(node, list) or part > len(node):
                return None
            if part == len(node):
                node.append(empty)
        elif part not in node:
            node[part] = empty
        if not isinstance(node[part], list if isinstance(below, int) else dict):
            node[part] = empty
        return node[part]

    def _beyond(self, assignment: Assignment, depth: int) -> Problem:
        lists = self.root
        for part in assignment.path[:depth]:
            lists = lists[part]  # type: ignore[index]
        key = dotted(assignment.path[:depth])
        return Problem(
            assignment.where,
            dotted(assignment.path),
            f"lies beyond the end: {key} has {len(lists)} {'entry' if len(lists) == 1 else 'entries'}; the next one is {key}.{len(lists)}",
        )

    def settle_rhythm(self) -> None:
        """Let a `cron` replace the `every` of a lower layer, and the other way round."""
        every, cron = self.origins.get(("schedule", "every")), self.origins.get(("schedule", "cron"))
        if every is None or cron is None or self.root["schedule"]["cron"] is None:
            return
        if _RANKS[every.kind] != _RANKS[cron.kind]:
            loser = "every" if _RANKS[every.kind] < _RANKS[cron.kind] else "cron"
            del self.root["schedule"][loser]
            del self.origins["schedule", loser]

    def settle_sources(self) -> None:
        """Let `path`, `dataset` or `from` of a data source replace what a lower layer has in its place."""
        sources = self.root.get("data")
        for index, source in enumerate(sources if isinstance(sources, list) else ()):
            ranks = {name: self._rank(("data", index, name)) for name in source} if isinstance(source, dict) else {}
            kinds = sorted((name for name in SOURCE_KINDS if name in ranks), key=lambda name: ranks[name])
            if len(kinds) < 2 or ranks[kinds[-2]] == ranks[kinds[-1]]:
                continue
            wins = kinds.pop()
            foreign = [name for name, (belongs_to, _) in OF_SOME_SOURCES.items() if wins not in belongs_to]
            for name in {*kinds, *foreign} & set(ranks):
                if ranks[name] < ranks[wins]:
                    del source[name]
                    self.origins = {p: o for p, o in self.origins.items() if p[:3] != ("data", index, name)}

    def _rank(self, path: Path) -> int:
        """That of the highest layer which says something at or below a path."""
        return max((_RANKS[o.kind] for p, o in self.origins.items() if p[: len(path)] == path), default=0)

    def where(self, path: Path, file: str) -> str:
        """The place that a message about `path` names: its own, or the nearest above or below it."""
        for end in range(len(path), 0, -1):
            prefix = path[:end]
            near = [o.where for p, o in self.origins.items() if p[:end] == prefix or p == prefix]
            if near:
                return min(near, key=_line_of)
        return file


def _validate(tree: _Tree, file: str, text: str) -> tuple[Recipe | None, list[Problem]]:
    try:
        return Recipe.model_validate(tree.root), []
    except ValidationError as error:
        problems: dict[str, Problem] = {}
        for details in error.errors(include_url=False):
            path = _known(details["loc"])
            where = tree.where(path, f"{file}:1" if text else file)
            problem = Problem(where, dotted(path), explain(details, find(path)))
            problems.setdefault(f"{problem.where} {problem.key}", problem)
        return None, list(problems.values())


def _known(location: tuple[str | int, ...]) -> Path:
    """The part of pydantic's location that is a path in a recipe; branches of unions are left out."""
    path: Path = ()
    for part in location:
        longer = (*path, part)
        setting = find(longer)
        parent = find(path) if path else None
        if setting is None and not (isinstance(part, int) and parent is not None and parent.is_list):
            break
        path = longer
    return path


def _origins(recipe: Recipe, tree: _Tree) -> dict[str, Origin]:
    origins: dict[str, Origin] = {}

    def visit(value: Any, path: Path) -> None:
        setting = find(path) if path else None
        if isinstance(value, dict):
            for key, below in value.items():
                visit(below, (*path, key))
        elif setting is not None and setting.section is not None:
            for index, below in enumerate(value):
                visit(below, (*path, index))
        else:
            own = [origin for p, origin in tree.origins.items() if p[: len(path)] == path]
            origins[dotted(path)] = max(own, key=lambda o: _RANKS[o.kind]) if own else Origin("default")

    visit(recipe.as_plain(), ())
    for key in {key for defaults in DEFAULTS_OF_METHODS.values() for key in defaults}:
        if origins[key].kind == "default":
            origins[key] = Origin("default", f"method: {recipe.method}")
    return origins


def _line_of(where: str) -> int:
    match = re.search(r":(\d+)$", where)
    return int(match[1]) if match else 0


def _in_order(problems: list[Problem], file: str) -> list[Problem]:
    """Those of the file by line, then the others as they came."""
    return sorted(dict.fromkeys(problems), key=lambda p: (not p.where.startswith(file), _line_of(p.where)))
