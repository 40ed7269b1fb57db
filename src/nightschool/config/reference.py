"""The reference page of the recipe, made from the schema: `python -m nightschool.config.reference > docs/recipes.md`."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from typing import Any

from nightschool.config.aliases import ALIASES, AMBIGUOUS, REFUSED
from nightschool.config.schema import Setting, adapter, settings
from nightschool.config.write import duration

_INTRODUCTION = """\
# Recipes

A recipe is the YAML file that says what is wanted of a run. `nightschool config validate RECIPE` checks one,
`nightschool config show RECIPE --origin` says who set what, and `nightschool config schema` prints the JSON schema for
your editor. The resolved recipe is stored with every run, and `nightschool train` of that file repeats the run.

```yaml
name: support-bot
base: Qwen/Qwen3-0.6B
method: lora
data:
  - path: data/*.jsonl
train: {learning_rate: 2e-4, epochs: 3}
gate: {forgetting: "<= 2%"}
```

Ready ones to begin with lie in `recipes/`.

## Who wins

Defaults < recipe < environment < overrides.

- Overrides stand behind the recipe on the command line: `train.epochs=3`, `data.0.path=train.json`,
  `lora.target_modules=[q_proj, v_proj]`. An index that is one beyond the end adds an entry.
- Variables begin with `NIGHTSCHOOL_`, and two underscores stand for a dot: `NIGHTSCHOOL_TRAIN__EPOCHS=3`.
- `schedule.every` and `schedule.cron` replace each other: the one that is set later in this order holds. In the same
  place, both together are refused. So do `path`, `dataset` and `from` of a data source, so that `dataset=chat,code` on the command
  line takes the place of the first path of a recipe.

Every problem of a recipe is reported at once, with file and line, and with the name that was probably meant.

## Units

Durations are written `90s`, `10m`, `24h`, `7d`; counts of tokens `2048` or `16k tokens`; shares `5%` or `0.05`;
rhythms `500 steps`, `2 epochs` or `10m`.

## Settings
"""

_RULES = """\

## Rules of the gate

`operator limit`: the operator is `<=`, `<`, `>=` or `>`; the limit is a number, or `champion`, or `champion` plus or
minus a number. In `forgetting` and `new_facts` a percentage is a share of the questions, so `>= champion - 5%` means
five percentage points below the champion. In `holdout_loss`, `<= champion + 2%` means two percent above the champion's
loss. The other rules compare with the champion anyway, and take no `champion`. A rule that asks for a worse model is refused. `null` or `off` turns a rule off. More in [the gate](gate.md).
"""


def reference() -> str:
    """The whole page, as Markdown."""
    return _INTRODUCTION + "".join(_settings()) + _RULES + "".join(_other_names())


def _settings() -> Iterator[str]:
    yield _table(setting for setting in settings().values() if "." not in setting.key and setting.section is None)
    for section in (setting for setting in settings().values() if setting.section is not None):
        prefix = f"{section.key}.*." if section.is_list else f"{section.key}."
        yield f"\n### `{section.key}`{' (a list)' if section.is_list else ''}\n\n{section.description}\n"
        own = [s for s in settings().values() if s.key.startswith(prefix) and "." not in s.key[len(prefix) :]]
        yield _table(setting for setting in own if setting.section is None)


def _table(rows: Iterator[Setting]) -> str:
    lines = ["", "| key | default | what it is | values |", "|---|---|---|---|"]
    for setting in rows:
        default = "required" if setting.field.is_required() else f"`{_shown(setting)}`"
        values = _values(adapter(setting.field).json_schema())
        cells = (f"`{setting.key}`", default, setting.description, values)
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines) + "\n"


def _shown(setting: Setting) -> str:
    value = setting.default
    if setting.is_duration:
        return duration(value)
    return value if isinstance(value, str) else json.dumps(value)


def _values(schema: dict[str, Any]) -> str:
    """What may be written, in words."""
    if "examples" in schema:
        return "such as " + ", ".join(f"`{example}`" for example in schema["examples"])
    if "anyOf" in schema:
        return " or ".join(_values(part) for part in schema["anyOf"])
    if "enum" in schema:
        return ", ".join(f"`{value}`" for value in schema["enum"])
    if "const" in schema:
        return f"`{schema['const']}`"
    names = {"integer": "whole number", "boolean": "`true` or `false`", "string": "text", "array": "list of texts"}
    kind = names.get(schema.get("type", ""), schema.get("type", ""))
    bounds = [
        f"{sign} {schema[word]:g}"
        for word, sign in (("minimum", "≥"), ("exclusiveMinimum", ">"), ("maximum", "≤"), ("exclusiveMaximum", "<"))
        if word in schema
    ]
    return " ".join([f"`{kind}`" if kind == "null" else kind, ", ".join(bounds)]).strip()


def _other_names() -> Iterator[str]:
    yield (
        "\n## Other names\n\nNames that other programs use are accepted in a file, as overrides and as variables, and "
        "what was translated is shown.\n\n| written | read as |\n|---|---|\n"
    )
    remarks = {"interval_hours": " (hours)", "fp16": " = fp16", "bf16": " = bf16"}
    for name, alias in ALIASES.items():
        yield f"| `{name}` | `{alias.key}`{remarks.get(name, '')} |\n"
    yield "\nThese could mean more than one setting, so that they are refused with their meanings:\n\n"
    for name, keys in AMBIGUOUS.items():
        yield f"- `{name}`: {' or '.join(f'`{key}`' for key in keys)}\n"
    yield "\nAnd these are not settings of a recipe:\n\n"
    for message in dict.fromkeys(REFUSED.values()):
        names = [f"`{name}`" for name, said in REFUSED.items() if said == message]
        yield f"- {', '.join(names)}: {message}.\n"


if __name__ == "__main__":
    sys.stdout.write(reference())
