"""Reading files: every kind, every way in which they are broken, and the line in each message."""

from __future__ import annotations

import json
import resource
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from nightschool.data.sources import text_input
from nightschool.data.sources.problems import Problems
from nightschool.data.sources.rows import ENDINGS, expand, read_rows
from nightschool.errors import DataError, NotFound

ROWS = [{"id": 1, "query": "Where?", "retrieved": 'Ré\n\n"x" 😀'}, {"id": 2, "query": "b", "retrieved": "[{]"}]


def write(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def rows(path: Path) -> list[dict]:
    return [row.fields for row in read_rows(path, source=path.name)]


def problem(path: Path) -> str:
    with pytest.raises(DataError) as caught:
        rows(path)
    return str(caught.value)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path


# --- what is read ---


def test_every_kind_of_file_gives_the_same_rows(folder: Path) -> None:
    lines = "\n".join(json.dumps(row) for row in ROWS)
    pq.write_table(pa.Table.from_pylist(ROWS), folder / "a.parquet")
    kinds = {
        "array.json": json.dumps(ROWS),
        "pretty.json": json.dumps(ROWS, indent=2, ensure_ascii=False),
        "lines.jsonl": lines,
        "lines.json": lines + "\n\n",
        "bom.json": b"\xef\xbb\xbf" + json.dumps(ROWS).encode(),
        "bom.jsonl": b"\xef\xbb\xbf" + lines.encode(),
        "windows.jsonl": lines.replace("\n", "\r\n"),
        "array.jsonl": json.dumps(ROWS),
        "stream.json": "\n".join(json.dumps(row, indent=1) for row in ROWS),
        "no-ending": json.dumps(ROWS),
        "really-parquet.json": (folder / "a.parquet").read_bytes(),
    }
    assert rows(folder / "a.parquet") == ROWS
    for name, content in kinds.items():
        assert rows(write(folder / name, content)) == ROWS, name


def test_csv_and_tsv(folder: Path) -> None:
    path = write(folder / "a.csv", 'id,query,retrieved,paraphrases\n1,"a, ""b""\nc",d,"[""e""]"\n\n2,f,g,\n')
    found = list(read_rows(path, source="a.csv"))
    assert [row.fields for row in found] == [
        {"id": "1", "query": 'a, "b"\nc', "retrieved": "d", "paraphrases": ["e"]},
        {"id": "2", "query": "f", "retrieved": "g"},
    ]
    assert [row.line for row in found] == [2, 5]
    assert rows(write(folder / "a.tsv", "query\tretrieved\na,b\tc\n")) == [{"query": "a,b", "retrieved": "c"}]


def test_a_text_file_is_one_document(folder: Path) -> None:
    assert rows(write(folder / "a.txt", "[One]\r\n\r\ntwo\n")) == [{"text": "[One]\n\ntwo\n"}]


def test_rows_know_their_line(folder: Path) -> None:
    content = '[\n{"a": 1},\n\n{"a":\n 2}, {"a": 3}\n,{"a": 4}]'
    assert [row.line for row in read_rows(write(folder / "a.json", content))] == [2, 4, 5, 6]
    assert [row.where for row in read_rows(write(folder / "a.jsonl", '{"a": 1}\n\n{"a": 2}'), source="s")] == [
        "s:1",
        "s:3",
    ]


def test_an_array_longer_than_the_window_is_read_whole(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text_input, "CHUNK_BYTES", 7)
    assert rows(write(folder / "a.json", json.dumps(ROWS * 50, ensure_ascii=False, indent=1))) == ROWS * 50
    assert (
        rows(
            write(
                folder / "b.json",
                "[" + ",".join(['{"n": 123456.75e-10, "t": true, "u": "\\u00e9\\ud83d\\ude00"}'] * 30) + "]",
            )
        )
        == [{"n": 123456.75e-10, "t": True, "u": "é😀"}] * 30
    )


# --- what is refused ---


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.json", '[\n{"a": 1},\n{"a": 2,}\n]', "a.json:3: malformed JSON: "),
        ("a.json", '[{"a": 1}\n{"a": 2}]', "a.json:2: malformed JSON: after an element comes , or ]; found '{'"),
        ("a.json", '[{"a": 1},\n', "a.json:2: malformed JSON: a value is missing; found the end of the file"),
        ("a.json", '[{"a": 1}]\n\n[]', "a.json:3: malformed JSON: nothing may follow"),
        ("a.json", '[{"a": "one\ntwo"}]', "a.json:1: malformed JSON: Invalid control character"),
        ("a.json", '[{"a": NaN}]', "a.json:1: malformed JSON: NaN is no JSON value"),
        ("a.json", '[{"a": 1, "a": 2}]', "a.json:1: malformed JSON: the field 'a' is there twice"),
        ("a.json", "[" + "[" * 100_000, "a.json:1: malformed JSON: it is nested too deeply"),
        ("a.json", "[" + "9" * 5000 + "]", "a.json:1: malformed JSON: "),
        ("a.json", '[{"a": 1}, 3]', "a.json:1: a row is a JSON object, but this one is a number"),
        ("a.json", "[]", "a.json: the file holds no rows"),
        ("a.json", "", "a.json: the file is empty"),
        ("a.json", "  \n", "a.json: the file holds no rows"),
        ("a.json", "hello", "a.json:1: malformed JSON at column 1"),
        ("a.jsonl", '{"a": 1}\n{"a": 2\n', "a.jsonl:2: malformed JSON at column 8"),
        ("a.jsonl", '{"a": 1} {"a": 2}\n', "a.jsonl:1: malformed JSON at column 9: Extra data"),
        ("a.jsonl", '"text"\n', "a.jsonl:1: a row is a JSON object, but this one is a string"),
        ("a.jsonl", b'{"a": 1}\n{"a": "\xff"}', "a.jsonl:2: the byte 0xff is no UTF-8"),
        ("a.json", b'[{"a": 1},\n\n{"a": "\xc3"}]', "a.json:3: the byte 0xc3 is no UTF-8"),
        ("a.txt", b"one\ntwo\xe9\n", "a.txt:2: the byte 0xe9 is no UTF-8"),
        ("a.txt", b"one\ntwo\0\n", "a.txt:2: a zero byte"),
        ("a.jsonl", b'{"a": 1}\n\0\1\2', "a.jsonl:2: a zero byte"),
        ("a.json", b'[{"a": 1},\n\0', "a.json:2: a zero byte"),
        ("a.txt", " \n\t\n", "a.txt: the file holds no rows"),
        ("a.json", '{"a": 1}'.encode("utf-16"), "a.json:1: the file is UTF-16"),
        ("a.json", b"\x1f\x8b\x08\0", "a.json: the file is packed with gzip"),
        ("a.parquet", b"PAR1 and no more", "a.parquet: the Parquet file cannot be read"),
        ("a.parquet", b"[]", "a.parquet: the file does not begin with PAR1"),
        ("a.csv", "a,b\n1,2\n1\n", "a.csv:3: the row has 1 cells, but there are 2 columns"),
        ("a.csv", "a,a\n1,2\n", "a.csv:1: the first line names the columns"),
        ("a.csv", 'a,b\n1,"2\n', "a.csv:2: malformed CSV"),
        ("a.csv", "a,b\n", "a.csv: the file holds no rows"),
        ("a.csv", 'messages\n"[{]"\n', "a.csv:2: the column 'messages' holds JSON"),
        ("a.bin", b"hello", "a.bin: neither the content nor the ending .bin says what this is"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_said_with_its_line(folder: Path, name: str, content: str | bytes, message: str) -> None:
    assert problem(write(folder / name, content)).startswith(message)


@pytest.mark.parametrize(
    ("name", "before"), [("a.jsonl", b'{"a": 1}\n{"a": "'), ("a.json", b'[{"a": 1},\n{"a": "'), ("a.txt", b"one\n")]
)
def test_a_line_of_200_mb_is_refused_without_reading_it(folder: Path, name: str, before: bytes) -> None:
    path = folder / name
    with path.open("wb") as file:
        file.write(before)
        file.seek(200_000_000)  # a hole, as long as the line; its zeros are never reached
        file.write(b'"}')
    if name == "a.json":  # the array is checked as it is read: fill it with text
        with path.open("wb") as file:
            file.write(before)
            for _ in range(70):
                file.write(b"x" * 1_000_000)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert f"{name}:2: " in (said := problem(path))
    assert "is longer than the limit of 64 MB" in said
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak < 450_000  # kB


def test_malformed_lines_are_reported_together(folder: Path) -> None:
    path = write(folder / "a.jsonl", '{"a": 1}\nbad\n{"a": 2}\n[]\n{"a": 3}')
    problems = Problems()
    assert [row.fields["a"] for row in read_rows(path, source="a.jsonl", problems=problems)] == [1, 2, 3]
    assert [text.split(": ")[0] for text in problems.found] == ["a.jsonl:2", "a.jsonl:4"]
    with pytest.raises(DataError, match=r"a\.jsonl:2: .*\na\.jsonl:4: "):
        problems.check()


def test_no_more_than_twenty_problems_are_shown(folder: Path) -> None:
    path = write(folder / "a.jsonl", "bad\n" * 1000)
    with pytest.raises(DataError) as caught:
        list(read_rows(path, problems=Problems()))
    assert len(str(caught.value).splitlines()) == 21


def test_a_missing_file_names_its_key(folder: Path) -> None:
    with pytest.raises(NotFound, match=r"^data\.0\.path: there is no file train\.json"):
        expand("train.json", folder, "data.0.path")
    with pytest.raises(NotFound, match=r"^data\.1\.path: no file matches \*\.jsonl"):
        expand("*.jsonl", folder, "data.1.path")
    (folder / "empty").mkdir()
    with pytest.raises(NotFound, match="the folder empty holds no data file"):
        expand("empty", folder, "data.0.path")
    with pytest.raises(NotFound, match="There is no file"):
        list(read_rows(folder / "x.json"))


def test_folders_and_globs_are_sorted(folder: Path) -> None:
    for name in ("b.jsonl", "a.json", "sub/c.csv", ".hidden/d.json", "README.md"):
        (folder / name).parent.mkdir(exist_ok=True)
        write(folder / name, "{}")
    assert [p.name for p in expand(".", folder, "k")] == ["a.json", "b.jsonl", "c.csv"]
    assert [p.name for p in expand("*.json*", folder, "k")] == ["a.json", "b.jsonl"]
    assert [p.name for p in expand("**/*.csv", folder, "k")] == ["c.csv"]
    assert expand(str(folder / "a.json"), Path("/elsewhere"), "k") == [folder / "a.json"]


def test_a_name_with_brackets_is_a_name_if_it_exists(folder: Path) -> None:
    write(folder / "a[1].json", "{}")
    assert expand("a[1].json", folder, "k") == [folder / "a[1].json"]


# --- any bytes at all ---


@settings(max_examples=300, deadline=None)
@given(st.sampled_from([*ENDINGS, ".bin", ""]), st.binary(max_size=200))
@example(".json", b"[")
@example(".json", b'{"a": "\xf0\x9f')
@example(".csv", b'"')
@example(".csv", b"\n\r\r\n")
@example(".parquet", b"PAR1PAR1")
@example(".json", b'[{"a": 1}\xef\xbb\xbf]')
def test_arbitrary_bytes_give_rows_or_a_data_error(
    tmp_path_factory: pytest.TempPathFactory, ending: str, content: bytes
) -> None:
    path = write(tmp_path_factory.mktemp("bytes") / f"a{ending}", content)
    try:
        found = list(read_rows(path))
    except DataError:
        return
    assert all(isinstance(row.fields, dict) for row in found)


_json = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(10**30), 10**30)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.dictionaries(st.text(max_size=8), _json, max_size=4), min_size=1, max_size=5),
    st.sampled_from([None, 1]),
    st.booleans(),
    st.integers(1, 50),
)
def test_what_json_writes_is_read_back(tmp_path_factory, written, indent, ascii_only, chunk) -> None:
    folder = tmp_path_factory.mktemp("json")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(text_input, "CHUNK_BYTES", chunk)
        text = json.dumps(written, indent=indent, ensure_ascii=ascii_only)
        assume_writable(text)
        assert rows(write(folder / "a.json", text)) == written
        lines = "\n".join(json.dumps(row, ensure_ascii=ascii_only) for row in written)
        assert rows(write(folder / "a.jsonl", lines)) == written


def assume_writable(text: str) -> None:
    from hypothesis import assume

    assume("\0" not in text)
    try:
        text.encode()
    except UnicodeEncodeError:
        assume(condition=False)
