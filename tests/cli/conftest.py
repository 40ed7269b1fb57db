"""How tests of the command line run the verbs of a memory."""

import json

import pytest

from nightschool.cli.main import main


@pytest.fixture
def ask(capsys):
    """Run a verb of `nightschool memory`; what it prints, as JSON."""

    def run(*words, code=0):
        capsys.readouterr()
        assert main(["--json", "memory", *words]) == code
        return json.loads(capsys.readouterr().out)

    return run


@pytest.fixture
def say(capsys):
    """Run a verb of `nightschool memory`; what it prints for people, and what it says beside it."""

    def run(*words, code=0):
        capsys.readouterr()
        assert main(["memory", *words]) == code
        printed = capsys.readouterr()
        return printed.out + printed.err

    return run
