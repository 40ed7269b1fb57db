"""docs/data.md says what is so: its rows are read, its code runs, and every format is in it."""

from __future__ import annotations

import json
import re
from pathlib import Path

from nightschool.data.sources.formats import FORMATS, detect, to_examples
from nightschool.data.sources.rows import ENDINGS, Row

PAGE = (Path(__file__).parents[2] / "docs" / "data.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", PAGE, flags=re.DOTALL | re.MULTILINE)


def test_every_row_in_the_page_is_read_as_it_says() -> None:
    found = []
    for block in blocks("json"):
        row = json.loads(block)
        assert to_examples(Row(row, "data.md", 1))
        found.append(detect(row))
    assert set(found) == set(FORMATS)
    assert found[: len(FORMATS)] == list(FORMATS)
    for name in (*FORMATS, ".txt", ".csv", ".tsv"):
        assert f"`{name}`" in PAGE
    assert {".txt", ".csv", ".tsv"} <= set(ENDINGS)


def test_the_code_in_the_page_runs() -> None:
    names: dict[str, object] = {}
    for block in blocks("python"):
        exec(block, names)
    assert "split" in names
