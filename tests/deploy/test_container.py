"""The container image and its compose file: linted, and the entrypoint tried out without a container engine."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from ruamel.yaml import YAML

from nightschool.cli.main import main

ROOT = Path(__file__).parents[2]
ENTRYPOINT = ROOT / "deploy/entrypoint.sh"
TOOLS = str(Path(sys.executable).parent)


def tool(name):
    found = shutil.which(name, path=TOOLS)
    if found is None:
        pytest.skip(f"{name} is not installed: make install-ci")
    return found


def compose():
    return YAML(typ="safe").load((ROOT / "compose.yaml").read_text())


def test_the_dockerfile_passes_its_linter():
    subprocess.run([tool("hadolint"), ROOT / "Dockerfile"], check=True)


def test_the_compose_file_follows_its_schema():
    command = [tool("check-jsonschema"), "--builtin-schema", "vendor.compose-spec", ROOT / "compose.yaml"]
    subprocess.run(command, check=True)


def test_whatever_the_image_copies_is_let_through_to_its_build():
    copied = re.findall(r"^COPY (?!--from)(?:--\S+ )*(.+) \S+$", (ROOT / "Dockerfile").read_text(), re.MULTILINE)
    let_through = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    assert {path for line in copied for path in line.split()} == let_through
    assert all((ROOT / path).exists() for path in let_through)


def test_each_profile_has_a_server_a_worker_and_the_database():
    services = compose()["services"]
    for profile, suffix in (("cpu", ""), ("gpu", "-gpu")):
        names = {name for name, service in services.items() if profile in service["profiles"]}
        assert names == {"db", f"server{suffix}", f"worker{suffix}"}
    for name, service in services.items():
        if name != "db":
            assert service["user"] == "10001:10001"
            assert service["cap_drop"] == ["ALL"]
            assert service["environment"]["DATABASE_URL"].startswith("postgresql://")


def test_what_containers_run_are_commands_of_nightschool(capsys):
    commands = [service["command"] for name, service in compose()["services"].items() if name != "db"]
    [default] = re.findall(r"^CMD \[(.*)\]$", (ROOT / "Dockerfile").read_text(), re.MULTILINE)
    for command in [*commands, [word.strip(' "') for word in default.split(",")]]:
        assert main([command[0], "--help"]) == 0
        shown = capsys.readouterr().out
        for option in (word for word in command[1:] if word.startswith("--")):
            assert option in shown


@pytest.fixture
def container(tmp_path):
    """Runs the entrypoint with a stand-in for nightschool, which notes who calls it and how."""
    folder = tmp_path / "bin"
    folder.mkdir()
    called = tmp_path / "called"
    called.touch(mode=0o666)
    called.chmod(0o666)
    stand_in = folder / "nightschool"
    stand_in.write_text(
        f'#!/bin/sh\necho "$(id -u) $*" >> {called}\n[ "$1 $2" = "keys ls" ] && echo "${{KEYS:-[]}}"\nexit 0\n'
    )
    stand_in.chmod(0o755)
    for parent in [tmp_path, *tmp_path.parents]:
        if parent.stat().st_uid == os.getuid() and parent != Path("/tmp"):
            parent.chmod(parent.stat().st_mode | 0o055)
    data = tmp_path / "models"
    data.mkdir()

    def run(*arguments, uid=10001, **environment):
        variables = {
            "PATH": f"{folder}:/usr/bin:/bin:/usr/sbin",
            "NIGHTSCHOOL_HOME": str(data / "home"),
            "HF_HOME": str(data / "cache"),
            "NIGHTSCHOOL_UID": str(uid),
        }
        done = subprocess.run(
            ["sh", str(ENTRYPOINT), *arguments], env=variables | environment, capture_output=True, text=True
        )
        return done, called.read_text().splitlines(), data

    return run


@pytest.mark.skipif(os.getuid() != 0, reason="needs root, as a container that hands a mounted folder over does")
def test_started_as_root_it_hands_the_folder_over_and_goes_on_as_nobody_special(container):
    done, called, data = container("worker")
    assert (done.returncode, called) == (0, ["10001 worker"])
    assert {path.stat().st_uid for path in (data, data / "home", data / "cache")} == {10001}


def test_the_first_start_of_a_server_makes_a_key_and_later_ones_do_not(container):
    user = str(os.getuid() or 10001)
    _, called, _ = container("serve", "--port", "8300")
    assert called == [f"{user} keys ls --json", f"{user} keys create --label first start", f"{user} serve --port 8300"]
    _, called, _ = container("serve", KEYS='[{"id": "k1"}]')
    assert called[3:] == [f"{user} keys ls --json", f"{user} serve"]


def test_a_key_from_the_environment_is_enough(container):
    _, called, _ = container("serve", NIGHTSCHOOL_API_KEY="a-key-of-ours")
    assert [line.split(maxsplit=1)[1] for line in called] == ["serve"]


@pytest.mark.skipif(os.getuid() != 0, reason="needs root, to start as somebody else")
def test_a_folder_that_cannot_be_written_is_said_before_anything_runs(container, tmp_path):
    (tmp_path / "models").chmod(0o755)
    command = ["setpriv", "--reuid=10002", "--regid=10002", "--clear-groups", "sh", str(ENTRYPOINT), "serve"]
    variables = {"PATH": "/usr/bin:/bin", "NIGHTSCHOOL_HOME": str(tmp_path / "models/home"), "HF_HOME": "/nowhere"}
    done = subprocess.run(command, env=variables, capture_output=True, text=True)
    assert done.returncode == 1
    assert "cannot be written by user 10002" in done.stderr
