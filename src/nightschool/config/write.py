"""A recipe as YAML: complete, commented with each setting's own description, and loaded back to an equal recipe."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from nightschool.config.assignments import Origin
from nightschool.config.recipe import Recipe
from nightschool.config.schema import Path, dotted, find
from nightschool.units import format_seconds, parse_seconds

# Texts that YAML 1.2 reads as themselves without quotes, whatever program reads them.
_PLAIN = re.compile(r"(?:[A-Za-z][A-Za-z0-9_/.@-]*(?::[A-Za-z][A-Za-z0-9_/.@-]*)?|\./[A-Za-z0-9_/.@-]+)")
# Controls, line separators, surrogates and non-characters, which JSON leaves as they are.
_NOT_IN_YAML = re.compile("[\x7f-\x9f\u2028\u2029\ufeff\ufffe\uffff\ud800-\udfff]")
_WORDS_WITH_A_TYPE = frozenset(["true", "false", "null", "yes", "no", "on", "off", "y", "n"])


def to_yaml(recipe: Recipe, origins: Mapping[str, Origin] | None = None) -> str:
    """Every setting with its value and its description as a comment.

    Args:
        recipe: The recipe.
        origins: If given, each comment says who set the setting in the place of what it is.
    """
    lines: list[str] = []
    _mapping(recipe.as_plain(), (), 0, lines, origins)
    return "\n".join(lines) + "\n"


def _mapping(
    plain: Mapping[str, Any], path: Path, indent: int, lines: list[str], origins: Mapping[str, Origin] | None
) -> None:
    pad = "  " * indent
    for key, value in plain.items():
        here = (*path, key)
        setting = find(here)
        if setting is None or setting.section is None:
            comment = _comment(here, origins, setting.description if setting else "")
            lines.append(f"{pad}{key}: {_value(here, value)}{comment}")
            continue
        if not path:
            lines.append("")
        description = f"  # {setting.description}" if setting.description and origins is None else ""
        if not setting.is_list:
            lines.append(f"{pad}{key}:{description}")
            _mapping(value, here, indent + 1, lines, origins)
            continue
        lines.append(f"{pad}{key}:{description}" if value else f"{pad}{key}: []{description}")
        for index, element in enumerate(value):
            entry: list[str] = []
            _mapping(element, (*here, index), indent + 2, entry, origins)
            entry[0] = f"{pad}  - {entry[0].lstrip()}"
            lines += entry


def _comment(path: Path, origins: Mapping[str, Origin] | None, description: str) -> str:
    if origins is None:
        return f"  # {description}" if description else ""
    origin = origins.get(dotted(path))
    shown = "".join(character if character.isprintable() else " " for character in str(origin))
    return f"  # {shown}" if origin is not None else ""


def _value(path: Path, value: Any) -> str:
    setting = find(path)
    if isinstance(value, list):
        return "[" + ", ".join(_scalar(element) for element in value) + "]"
    return duration(value) if setting is not None and setting.is_duration else _scalar(value)


def duration(seconds: float) -> str:
    """With its unit, unless that would round it."""
    text = format_seconds(seconds)
    return text if parse_seconds(text) == seconds else repr(seconds)


def _scalar(value: Any) -> str:
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int | float):
        return repr(value)
    text = str(value)
    if _PLAIN.fullmatch(text) and text.lower() not in _WORDS_WITH_A_TYPE:
        return text
    return quoted(text)


def quoted(text: str) -> str:
    """A double-quoted YAML scalar: a JSON string in which what YAML does not allow is escaped, too."""
    return _NOT_IN_YAML.sub(lambda found: f"\\u{ord(found[0]):04x}", json.dumps(text, ensure_ascii=False))
