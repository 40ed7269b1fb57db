"""Parquet within bounds: what a few bytes may stand for, and which columns are read."""

import os

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from nightschool.cli.main import main
from nightschool.data.sources import load, parquet_rows
from nightschool.data.sources.load import read_file
from nightschool.data.sources.rows import read_rows
from nightschool.errors import DataError


def write(path, rows, **options):
    pq.write_table(pa.Table.from_pylist(rows), path, compression="zstd", **options)
    return path


@pytest.mark.parametrize("nested", [False, True])
def test_a_text_that_many_rows_name_is_refused_before_it_is_made_many_times(tmp_path, monkeypatch, nested):
    cell = "a" * 3_000_000
    row = (
        {"messages": [{"role": "user", "content": "?"}, {"role": "assistant", "content": cell}]}
        if nested
        else {"text": cell}
    )
    path = write(tmp_path / "a.parquet", [row] * 40)
    assert path.stat().st_size < 10_000
    monkeypatch.setattr(parquet_rows, "BATCH_BYTES", 8_000_000)
    decoded = []
    original = pq.ParquetFile.iter_batches

    def noted(file, **options):
        for batch in original(file, **options):
            decoded.append(batch.num_rows)
            yield batch

    monkeypatch.setattr(pq.ParquetFile, "iter_batches", noted)
    with pytest.raises(DataError, match=r"a\.parquet:\d+: the file unpacks to more than 1000 times its size"):
        list(read_rows(path, source="a.parquet"))
    assert max(decoded) <= 2, "few rows are decoded at a time where a cell may be large"
    assert sum(decoded) < 12


def test_a_row_that_is_too_long_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(parquet_rows, "LINE_LIMIT_BYTES", 1_000_000)
    path = write(tmp_path / "a.parquet", [{"text": "short"}, {"text": "a" * 2_000_000}])
    with pytest.raises(DataError, match=r"a\.parquet:2: the row is longer than the limit"):
        list(read_rows(path, source="a.parquet"))


def test_a_row_group_that_is_too_large_is_refused_before_it_is_decoded(tmp_path, monkeypatch):
    path = write(tmp_path / "a.parquet", [{"text": "a" * 2_000_000}])
    monkeypatch.setattr(parquet_rows, "ROW_GROUP_LIMIT_BYTES", 1_000_000)
    with pytest.raises(DataError, match=r"a column of one row group takes .* smaller row groups"):
        list(read_rows(path))


def test_too_many_rows_are_refused_at_once_and_tokenizing_reads_them(tmp_path, monkeypatch):
    path = write(tmp_path / "a.parquet", [{"text": str(number)} for number in range(20)])
    lines = tmp_path / "a.jsonl"
    lines.write_text('{"text": "a"}\n' * 20)
    monkeypatch.setattr(load, "MOST_EXAMPLES", 19)
    with pytest.raises(DataError, match=r"has 20 rows, and 19 are read at most.*nightschool data tokenize"):
        read_file(path)
    with pytest.raises(DataError, match="has more rows, and 19 are read at most"):
        read_file(lines)
    assert len(list(read_rows(path))) == 20


def test_columns_that_no_format_reads_are_not_decoded(tmp_path):
    path = write(tmp_path / "a.parquet", [{"text": "a", "picture": b"x" * 1000, "id": 7, "url": "u"}] * 3)
    assert [row.fields for row in read_rows(path)] == [{"text": "a", "id": 7}] * 3
    other = write(tmp_path / "b.parquet", [{"picture": b"x", "url": "u"}] * 3)
    with pytest.raises(DataError, match="the fields picture, url fit no format"):
        read_file(other)


def test_what_is_no_regular_file_is_refused_and_not_waited_for(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    os.mkfifo("pipe.jsonl")
    for data in ("pipe.jsonl", "/dev/zero"):
        assert main(["data", "check", data]) == 1
        assert f"{data} is no regular file, but a pipe, a socket or a device" in capsys.readouterr().err
    (tmp_path / "r.yaml").write_text("name: bot\nbase: new:tiny\ndata: [{path: pipe.jsonl}]\n")
    for verb in ("plan", "train"):
        assert main([verb, "r.yaml"]) == 1
        assert "pipe.jsonl is no regular file" in capsys.readouterr().err
