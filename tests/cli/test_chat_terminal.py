"""chat as a person has it: the command in a terminal of its own, with editing, history and Ctrl-C, against a server."""

import os
import pty
import re
import select
import subprocess
import sys
import time

from tests.support.fake_slot import FakeSlot
from tests.support.live_server import live

PATIENCE_SECONDS = 60
CONTROL_C, UP, BACKSPACE, ENTER = "\x03", "\x1b[A", "\x7f", "\r"
# The terminal is made its own, so that Ctrl-C reaches it.
_COMMAND = """
import fcntl, signal, sys, termios
fcntl.ioctl(0, termios.TIOCSCTTY, 0)
# Tests that run in the background of a shell ignore Ctrl-C, and what they start would, too.
signal.signal(signal.SIGINT, signal.default_int_handler)
from nightschool.cli.main import main
sys.exit(main(sys.argv[1:]))
"""
_ESCAPES = re.compile(r"\x1b\[[0-9;?]*[a-zA-Z]|\x1b[=>]")


class Typist:
    """Types into a command on a terminal, and waits for what it shows."""

    def __init__(self, *words, cwd, env):
        self._terminal, inside = pty.openpty()
        self.process = subprocess.Popen(
            [sys.executable, "-c", _COMMAND, *words],
            stdin=inside, stdout=inside, stderr=inside, cwd=cwd, start_new_session=True,
            env=os.environ | {"TERM": "xterm", "PROMPT_TOOLKIT_NO_CPR": "1", "NO_COLOR": "1"} | env,
        )  # fmt: skip
        os.close(inside)
        self.shown = ""

    def type(self, *keys):
        os.write(self._terminal, "".join(keys).encode())

    def wait_for(self, text):
        """Read until the text has come after what was waited for before."""
        ends_at = time.monotonic() + PATIENCE_SECONDS
        while text not in self.shown:
            ready, _, _ = select.select([self._terminal], [], [], max(0, ends_at - time.monotonic()))
            assert ready, f"{text!r} did not come; there is {self.shown!r}"
            self.shown += _ESCAPES.sub("", os.read(self._terminal, 65536).decode(errors="replace"))
        self.shown = self.shown.partition(text)[2]

    def close(self):
        os.close(self._terminal)
        self.process.kill()
        self.process.wait()


def test_a_person_talks_edits_stops_an_answer_and_goes_on(tmp_path):
    def answer(prompt):
        return "On and on. " * 500 if "long" in prompt.rpartition("user")[2] else "Hello, wörld!"

    slot = FakeSlot(answer=answer, seconds_per_token=0.02)
    with live(slot) as server:
        typist = Typist("chat", "--url", server.url, cwd=tmp_path, env={"NIGHTSCHOOL_HOME": str(tmp_path / "home")})
        try:
            typist.wait_for("You:")
            typist.type("hi", ENTER)
            typist.wait_for("Assistant: Hello, wörld!")
            typist.wait_for("You:")
            typist.type("/temp 1.3", BACKSPACE, "2", ENTER)
            typist.wait_for("Temperature set to 1.2")
            typist.wait_for("You:")
            typist.type(UP, UP, ENTER)
            typist.wait_for("Assistant: Hello, wörld!")
            typist.wait_for("You:")
            typist.type("a long one", ENTER)
            typist.wait_for("Assistant: On and on.")
            typist.type(CONTROL_C)
            typist.wait_for("[stopped]")
            typist.wait_for("You:")
            typist.type("/code", ENTER)
            typist.wait_for("Switched to code mode")
            typist.wait_for("You (code):")
            typist.type("sort", ENTER)
            typist.wait_for("Assistant: Hello, wörld!")
            typist.wait_for("You (code):")
            typist.type("/exit", ENTER)
            assert typist.process.wait(PATIENCE_SECONDS) == 0
        finally:
            typist.close()
    prompts = [slot.current.engine.tokenizer.decode(one.request.prompt_ids) for one in slot.current.engine.handles]
    assert [one.request.params.temperature for one in slot.current.engine.handles] == [0.7, 1.2, 1.2, 1.2]
    assert prompts[1].count("hi<|im_end|>") == 2
    assert slot.current.engine.handles[2].cancelled
    assert "On and on." in prompts[3]
    assert "### Code Task:\nsort\n\n### Solution:" in prompts[3]
    assert "a long one" in (tmp_path / "home" / "chat_history").read_text()
