"""No name ever leaves the home, and references mean one thing."""

from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nightschool.errors import NameRefused
from nightschool.store.home import Home
from nightschool.store.names import (
    Ref,
    check_alias,
    check_name,
    check_version_id,
    is_stamp,
    moment_of,
    next_free_stamp,
    parse_ref,
    stamp_of,
    version_path,
)

HOME = Home(Path("/somewhere/.nightschool"))
NAMES = st.from_regex(r"[a-z0-9][a-z0-9._-]{0,63}", fullmatch=True)
HOSTILE = st.one_of(
    st.text(max_size=80),
    st.lists(st.sampled_from(["..", "/", "\\", "a", ".", "\0", "~", "@", "%2e", "\n", "A"]), max_size=8).map("".join),
)


@settings(deadline=None)
@given(HOSTILE | NAMES, HOSTILE | st.from_regex(r"[0-9]{8}_[0-9]{6}", fullmatch=True))
def test_whatever_the_name_the_path_is_a_grandchild_of_the_models(name, version):
    try:
        path = version_path(HOME, name, version)
    except NameRefused:
        return
    assert path.parent.parent == HOME.models
    assert path.resolve() == path
    assert path.parts[-2:] == (name, version)


@pytest.mark.parametrize(
    "name",
    [
        "",
        ".",
        "..",
        "a..b",
        "../a",
        "/a",
        "a/b",
        "A",
        "-a",
        "_a",
        ".a",
        "a\n",
        "ä",
        "a b",
        "a\0",
        "a" * 65,
        "a.partial",
        "a.lock",
    ],
)
def test_names_that_could_be_something_else_are_refused(name):
    with pytest.raises(NameRefused, match="refused"):
        check_name(name)


@pytest.mark.parametrize("name", ["a", "0", "support-bot", "qwen3_4b.v2", "a" * 64])
def test_plain_names_pass(name):
    assert check_name(name) == name


@pytest.mark.parametrize(
    "version",
    ["20261341_000000", "2026112_000000", "20261121-000000", "20261121_000000\n", "latest", "２0261121_000000"],
)
def test_version_ids_are_moments(version):
    with pytest.raises(NameRefused, match="looks like 20261121_023000"):
        check_version_id(version)


def test_references():
    assert parse_ref("bot") == Ref("bot", alias="champion")
    assert parse_ref("bot@20261121_023000") == Ref("bot", version="20261121_023000")
    assert parse_ref("bot@latest") == Ref("bot", alias="latest")
    assert str(parse_ref("bot@20261121_023000")) == "bot@20261121_023000"
    for text in ("bot@", "@latest", "bot@a@b", "bot@../x", "bot@20269999_000000", "Qwen/Qwen3", ""):
        with pytest.raises(NameRefused):
            parse_ref(text)
    with pytest.raises(NameRefused, match="reads like a version id"):
        check_alias("20261121_023000")


@settings(deadline=None)
@given(st.datetimes(timezones=st.just(UTC), max_value=datetime(9000, 1, 1)))  # noqa: DTZ001
def test_stamps_name_moments_to_the_second(moment):
    stamp = stamp_of(moment)
    assert is_stamp(stamp)
    assert timedelta(0) <= moment - moment_of(stamp) < timedelta(seconds=1)


def test_a_taken_stamp_moves_on_by_a_second():
    moment = datetime(2026, 12, 31, 23, 59, 59, tzinfo=UTC)
    taken = {"20261231_235959", "20270101_000000"}
    assert next_free_stamp(moment, taken.__contains__) == "20270101_000001"


def test_the_home_is_found_in_the_environment_then_beside(tmp_path, monkeypatch):
    monkeypatch.delenv("NIGHTSCHOOL_HOME", raising=False)
    assert Home.find(tmp_path).path == tmp_path / ".nightschool"
    monkeypatch.chdir(tmp_path)
    assert Home.find().path == tmp_path / ".nightschool"
    monkeypatch.setenv("NIGHTSCHOOL_HOME", "elsewhere")
    assert Home.find(Path("/other")).path == tmp_path / "elsewhere"


def test_ensure_makes_the_folders(tmp_path):
    home = Home(tmp_path / "deep" / "home").ensure().ensure()
    assert all(folder.is_dir() for folder in (home.runs, home.models, home.cache, home.locks))
    assert home.state_db == home.path / "state.db"
