"""What pydantic finds wrong with a value, said with the value and the remedy."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Mapping
from typing import Any

from pydantic_core import ErrorDetails

from nightschool.config.schema import Setting

_Say = Callable[[str, dict[str, Any]], str]

_SAY: Mapping[str, _Say] = {
    "int_parsing": lambda shown, _: f"{shown} is not a whole number",
    "int_type": lambda shown, _: f"{shown} is not a whole number",
    "int_from_float": lambda shown, _: f"{shown} is not a whole number",
    "int_parsing_size": lambda shown, _: f"{shown} is too large",
    "float_parsing": lambda shown, _: f"{shown} is not a number; write for example 0.5 or 1e-5",
    "float_type": lambda shown, _: f"{shown} is not a number; write for example 0.5 or 1e-5",
    "finite_number": lambda shown, _: f"{shown} is not finite; write an ordinary number",
    "bool_parsing": lambda shown, _: f"{shown} is neither true nor false",
    "bool_type": lambda shown, _: f"{shown} is neither true nor false",
    "string_type": lambda shown, _: f"{shown} is not text; put it in quotes if it is meant as one",
    "list_type": lambda shown, _: f"{shown} is not a list; write its entries with dashes",
    "greater_than": lambda shown, limits: f"{shown} is too small; it must be above {limits['gt']:g}",
    "greater_than_equal": lambda shown, limits: f"{shown} is too small; it is at least {limits['ge']:g}",
    "less_than": lambda shown, limits: f"{shown} is too large; it must be below {limits['lt']:g}",
    "less_than_equal": lambda shown, limits: f"{shown} is too large; it is at most {limits['le']:g}",
    "string_pattern_mismatch": lambda shown, _: (
        f"{shown} is not a name; write up to 64 of a-z, 0-9, '.', '_' and '-', beginning with a letter or digit"
    ),
}


def explain(details: ErrorDetails, setting: Setting | None) -> str:
    """One sentence of fact with the value, and one of remedy."""
    kind, value = details["type"], details["input"]
    shown = _shown(value)
    if kind == "missing":
        return f"is missing: {_lower(setting.description)}" if setting else "is missing"
    if kind == "value_error":
        message = details["msg"].removeprefix("Value error, ")
        return message if not message.startswith("is ") else f"{shown} {message}"
    if kind == "literal_error":
        return _one_of(shown, value, re.findall(r"'([^']*)'", details["ctx"]["expected"]))
    if kind in ("model_type", "model_attributes_type", "dict_type"):
        return f"{shown} is not a section; write its settings below it, each as `key: value`"
    if kind == "list_type" and setting is not None and setting.key == "data":
        return f"{shown} is not a list; write data: [{{path: train.json}}]"
    say = _SAY.get(kind)
    return say(shown, details.get("ctx", {})) if say is not None else f"{shown}: {_lower(details['msg'])}"


def _one_of(shown: str, value: Any, allowed: list[str]) -> str:
    near = difflib.get_close_matches(str(value).lower(), allowed, n=1)
    choices = ", ".join(allowed)
    return f"{shown} is none of {choices}" + (f"; did you mean {near[0]}?" if near else "; write one of them")


def _shown(value: Any) -> str:
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, dict):
        return "a mapping"
    if isinstance(value, list):
        return "a list"
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:60]}… ({len(str(value))} characters)"


def _lower(text: str) -> str:
    return text[:1].lower() + text[1:]
