"""Files of environment variables."""

import pytest

from nightschool.config.env_file import read_env_file
from nightschool.errors import NotFound, UsageError


def test_a_file_as_people_write_it(tmp_path):
    path = tmp_path / ".env"
    path.write_text(
        "# comment\n\nBATCH_SIZE=4\nexport LORA_R = 16\nNAME=\"a b # c\"\nOTHER='x'\nEMPTY=\n"
        "BASE=own/base # the small one\nNONE= # nothing\nURL=http://a/#b\nLAST=a=b"
    )
    assert read_env_file(path) == {
        "BATCH_SIZE": "4",
        "LORA_R": "16",
        "NAME": "a b # c",
        "OTHER": "x",
        "EMPTY": "",
        "BASE": "own/base",
        "NONE": "",
        "URL": "http://a/#b",
        "LAST": "a=b",
    }


@pytest.mark.parametrize("line", ["BATCH SIZE=4", "BATCH_SIZE", "=4", "4X=1"])
def test_a_line_that_is_no_variable_is_refused_with_its_number(tmp_path, line):
    (tmp_path / ".env").write_text(f"A=1\n{line}\n")
    with pytest.raises(UsageError, match=r"\.env:2: "):
        read_env_file(tmp_path / ".env")


def test_a_file_that_is_not_there_or_no_text(tmp_path):
    with pytest.raises(NotFound, match=r"\.env\.example"):
        read_env_file(tmp_path / ".env")
    (tmp_path / ".env").write_bytes(b"A=\xff")
    with pytest.raises(UsageError, match="UTF-8"):
        read_env_file(tmp_path / ".env")
