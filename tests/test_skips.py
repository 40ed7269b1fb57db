"""Under NIGHTSCHOOL_TEST_NO_SKIPS nothing goes unproven unnoticed."""

import os
import subprocess
import sys
from pathlib import Path

from tests.support.no_skips import ALLOWED

FILES = {
    "test_body.py": 'import pytest\n\ndef test_body():\n    pytest.skip("no database here")\n',
    "test_module.py": 'import pytest\n\npytest.importorskip("no_such_module", reason="no templates here")\n',
    "test_fixture.py": """import pytest

@pytest.fixture
def service():
    pytest.skip("no service here")

def test_fixture(service):
    pass
""",
    "test_fine.py": f"""import pytest

@pytest.mark.parametrize("reason", {list(ALLOWED)!r})
def test_allowed(reason):
    pytest.skip(reason)

@pytest.mark.xfail(reason="known")
def test_known():
    raise AssertionError
""",
}


def outcome(folder, **environment):
    """What pytest says of those files in an environment."""
    for name, source in FILES.items():
        (folder / name).write_text(source)
    command = [sys.executable, "-m", "pytest", "-rA", "--continue-on-collection-errors", "-p", "tests.support.no_skips"]
    inherited = {key: value for key, value in os.environ.items() if key != "NIGHTSCHOOL_TEST_NO_SKIPS"}
    environment = inherited | {"PYTHONPATH": str(Path(__file__).parents[1])} | environment
    command += ["-p", "no:cacheprovider", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=folder, check=False)
    return done.returncode, done.stdout


def test_a_skip_fails_where_skips_are_refused_and_says_why(tmp_path):
    code, output = outcome(tmp_path, NIGHTSCHOOL_TEST_NO_SKIPS="1")
    assert code == 1
    assert f"1 failed, {len(ALLOWED)} skipped, 1 xfailed, 2 errors" in output
    for reason in ("no database here", "no templates here", "no service here"):
        assert f"{reason}\nNIGHTSCHOOL_TEST_NO_SKIPS is set, so what this test needs must be installed." in output


def test_elsewhere_it_is_a_skip(tmp_path):
    code, output = outcome(tmp_path)
    assert code == 0
    assert f"{len(ALLOWED) + 3} skipped, 1 xfailed" in output


def test_each_reason_that_is_allowed_is_given_by_a_test():
    tests = Path(__file__).parent
    sources = "".join(path.read_text() for path in tests.rglob("test_*.py") if path != Path(__file__))
    assert [reason for reason in ALLOWED if f'"{reason}"' not in sources] == []
