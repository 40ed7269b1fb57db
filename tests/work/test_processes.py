"""The table of processes is whole, and nobody starts a process past it."""

import ast
import importlib.util
import subprocess
from pathlib import Path

import pytest

import nightschool
from nightschool.work.processes import PROCESSES, command

SOURCE = Path(nightschool.__file__).parent
TABLE = SOURCE / "work" / "processes.py"


@pytest.mark.parametrize("module", PROCESSES.values())
def test_every_process_has_a_module_that_can_be_run(module):
    found = importlib.util.find_spec(module)
    assert found is not None
    assert found.origin is not None
    file = Path(found.origin)
    if file.name == "__init__.py":
        file = file.with_name("__main__.py")
    tree = ast.parse(file.read_text("utf-8"))
    names = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
    wanted = {"main"} if file.name == "__main__.py" else {"main", "__name__"}
    assert names >= wanted, f"python -m {module} would do nothing"


def test_a_command_starts_the_process():
    done = subprocess.run(command("cli", "--version"), capture_output=True, text=True, check=True)
    assert nightschool.__version__ in done.stdout


def starts_of_processes(source: str) -> list[str]:
    """What a file starts by itself: the flag -m in a command line, or the name of a module of the table."""
    return [
        node.value
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Constant) and node.value in {"-m", *PROCESSES.values()}
    ]


def test_the_search_finds_a_process_that_is_started_past_the_table():
    assert starts_of_processes('run([sys.executable, "-m", "nightschool.training.run"])') == [
        "-m",
        "nightschool.training.run",
    ]


def test_nobody_starts_a_process_past_the_table():
    # `-m` is also the short form of an option of `chat`.
    allowed = {SOURCE / "cli" / "chat" / "__init__.py": ["-m"]}
    files = [path for path in SOURCE.rglob("*.py") if path != TABLE]
    assert len(files) > 200
    past = {path: found for path in files if (found := starts_of_processes(path.read_text("utf-8")))}
    assert past == allowed
