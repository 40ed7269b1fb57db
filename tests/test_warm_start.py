"""Stand-ins of programs are what they stand for: input, output, exit codes, signals, and their end."""

import json
import os
import signal
import subprocess
import sys

import psutil
import pytest

from tests.support.job_setups import lives
from tests.support.live_server import eventually

SHOW = """
import json, os, sys
print(json.dumps([sys.argv, os.getcwd(), os.environ.get("COLOUR"), sys.stdin.read(), "torch" in sys.modules, os.getpid()]))
sys.exit(int(sys.argv[1]))
"""
WAIT = """
import os, signal, sys, time
signal.signal(signal.SIGTERM, lambda *_: sys.exit(75))
print(os.getpid(), flush=True)
time.sleep(60)
"""


def test_it_gets_what_a_process_gets_and_says_what_it_says(warm_start, tmp_path):
    (tmp_path / "show.py").write_text(SHOW)
    told = {
        "input": "hello",
        "capture_output": True,
        "text": True,
        "cwd": tmp_path,
        "env": os.environ | {"COLOUR": "a=b"},
    }
    done = subprocess.run([warm_start.python, "show.py", "3", ""], check=False, **told)
    assert done.returncode == 3, done.stderr
    *said, pid = json.loads(done.stdout)
    assert said == [["show.py", "3", ""], str(tmp_path), "a=b", "hello", True]
    assert not psutil.pid_exists(pid)

    done = subprocess.run([warm_start.nightschool, "runs", "fly"], check=False, **told)
    real = subprocess.run([sys.executable, "-m", "nightschool.cli", "runs", "fly"], check=False, **told)
    assert (done.returncode, done.stdout, done.stderr) == (real.returncode, real.stdout, real.stderr)
    assert done.returncode == 2

    # What is not known as warm is the real program.
    done = subprocess.run([warm_start.python, "-c", "import sys; print(sys.executable)"], check=True, **told)
    assert done.stdout.strip() == sys.executable


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 75), (signal.SIGKILL, -signal.SIGKILL)])
def test_a_signal_reaches_the_fork(warm_start, tmp_path, number, code):
    (tmp_path / "wait.py").write_text(WAIT)
    with subprocess.Popen([warm_start.python, "wait.py"], stdout=subprocess.PIPE, text=True, cwd=tmp_path) as process:
        fork = psutil.Process(int(process.stdout.readline()))
        process.send_signal(number)
        assert process.wait() == code
        eventually(lambda: not lives(fork))


def test_a_fork_that_is_killed_is_reported_as_killed(warm_start, tmp_path):
    (tmp_path / "wait.py").write_text(WAIT)
    with subprocess.Popen([warm_start.python, "wait.py"], stdout=subprocess.PIPE, text=True, cwd=tmp_path) as process:
        os.kill(int(process.stdout.readline()), signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
