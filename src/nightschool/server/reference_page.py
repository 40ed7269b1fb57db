"""The HTTP reference as Markdown and as a page, made from the OpenAPI document."""

from __future__ import annotations

import html
import json
import math
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import HTMLResponse

router = APIRouter(tags=["Operations"])

_HEAD = """# HTTP reference

<!-- Made from the OpenAPI document by `python -m nightschool.server.reference`. Do not edit. -->

`nightschool serve` listens on `http://127.0.0.1:8001`. `/openapi.json` has the same facts for programs.

- Every answer has `x-request-id`; an answer of a model also has `x-model-version`, the `name@version` that gave it, and
  `x-memory-revision` where a memory was read.
- Where there are API keys, send `Authorization: Bearer KEY` or `x-api-key: KEY`; `/healthz`, `/readyz` and `/health` are open.
- Errors are `{"error": {"message", "type", "param", "code"}}` under `/v1`, `application/problem+json` under `/api`, JSON-RPC's under
  `/mcp`, and `{"detail": …}` elsewhere, `/api/v1` included. An unknown field is an error that names the nearest known one.
"""


@router.get("/docs", response_class=HTMLResponse)
async def docs(request: Request) -> HTMLResponse:
    """The HTTP reference, without a network."""
    text = html.escape(render(request.app.openapi()))
    head = '<!doctype html><meta charset="utf-8"><title>nightschool: HTTP reference</title>'
    style = "<style>pre{white-space:pre-wrap;max-width:100ch;margin:2em auto;font-size:15px}</style>"
    return HTMLResponse(f"{head}{style}<pre>{text}</pre>")


def render(document: dict[str, Any]) -> str:
    """The document as Markdown: one section per family, one part per operation."""
    schemas = document["components"]["schemas"]
    families: dict[str, list[str]] = {}
    for path, operations in document["paths"].items():
        for method, operation in operations.items():
            family = operation.get("tags", ["Other"])[0]
            families.setdefault(family, []).append(_operation(path, method, operation, schemas))
    parts = [_HEAD]
    for family, texts in families.items():
        parts += [f"## {family}\n", *texts]
    return "\n".join(parts).rstrip() + "\n"


def _operation(path: str, method: str, operation: dict[str, Any], schemas: dict[str, Any]) -> str:
    lines = [f"### {method.upper()} {path}", "", operation.get("description", ""), ""]
    asked = {one["name"]: one["schema"] | one for one in operation.get("parameters", []) if one["in"] == "query"}
    if asked:
        required = [name for name, one in asked.items() if one.get("required")]
        lines += ["Query:", "", *_table({"properties": asked, "required": required}, schemas), ""]
    for media_type, body in operation.get("requestBody", {}).get("content", {}).items():
        kind = "" if media_type == "application/json" else f" ({media_type})"
        lines += [f"Body{kind}:", "", *_table(_resolved(body["schema"], schemas), schemas), ""]
    errors = []
    for status, answer in sorted(operation["responses"].items()):
        schema = answer.get("content", {}).get("application/json", {}).get("schema")
        kind = "" if status == "200" else f" ({status})"
        if status >= "400":
            errors.append(f"- {status}: {answer['description']}")
        elif schema:
            lines += [f"Answer{kind}:", "", *_table(_resolved(schema, schemas), schemas), ""]
        elif kind:
            lines += [f"Answer{kind}: {answer['description']}.".replace("..", "."), ""]
    return "\n".join(lines + (["Errors:", "", *errors, ""] if errors else []))


def _table(schema: dict[str, Any], schemas: dict[str, Any]) -> list[str]:
    required = schema.get("required", [])
    rows = ["| field | type | default | meaning |", "| --- | --- | --- | --- |"]
    for name, field in schema.get("properties", {}).items():
        default = "required" if name in required else f"`{_value(field.get('default'))}`"
        meaning = field.get("description", "").replace("|", "\\|")
        rows.append(f"| `{name}` | {_type(field, schemas)} | {default} | {meaning} |")
    return rows


def _resolved(schema: dict[str, Any], schemas: dict[str, Any]) -> dict[str, Any]:
    reference = schema.get("$ref")
    found: dict[str, Any] = schemas[reference.rsplit("/", 1)[1]] if reference else schema
    return found


def _value(value: Any) -> str:
    return value if isinstance(value, str) and value else json.dumps(value)


def _type(schema: dict[str, Any], schemas: dict[str, Any]) -> str:
    """`integer 1…8`, `"good" or "bad"`, `list of {role, content}`."""
    if "$ref" in schema:
        fields = _resolved(schema, schemas).get("properties", {})
        return "{" + ", ".join(fields) + "}"
    if options := schema.get("anyOf") or schema.get("oneOf"):
        return " or ".join(dict.fromkeys(_type(option, schemas) for option in options))
    if "const" in schema:
        return f"`{schema['const']}`"
    if "enum" in schema:
        return " or ".join(f"`{_value(value)}`" for value in schema["enum"])
    if schema.get("type") == "array":
        return f"list of {_type(schema.get('items', {}), schemas)}"
    return str(schema.get("type", "any")) + _range(schema)


def _range(schema: dict[str, Any]) -> str:
    low = schema.get("minimum", schema.get("exclusiveMinimum"))
    if low is None:
        return ""
    above = "above " if "exclusiveMinimum" in schema else ""
    high = schema.get("maximum")
    return f" {above}{_short(low)}…{'' if high is None else _short(high)}"


def _short(number: float) -> str:
    """`8192`, `0.5`, `2^63`."""
    power = round(math.log2(abs(number) + 1))
    if power > 50:
        return f"{'-' if number < 0 else ''}2^{power}"
    return f"{number:.10g}"
