"""The second act: a real model is corrected by day, studies at night, and keeps the rest of what it knows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nightschool.cli.chat.backends import Reply
from nightschool.cli.chat.server_backend import ServerBackend
from nightschool.cli.demo.lesson import FACTS, GENERAL, Fact
from nightschool.cli.demo.stage import (
    Background,
    DemoFailed,
    Screen,
    ask,
    ask_command,
    free_port,
    run_command,
    stopped_at_the_end,
    wait_for_version,
    wait_until_ready,
)

NAME, RECIPE = "assistant", "night.yaml"
_ANSWER_TOKENS = 40
_REFUSED = 3

NIGHT = """\
name: assistant
base: assistant
method: lora
data:
  - {from: conversations, where: {corrected: true}}   # what people corrected by day
study: {write: rules, forms: 6}                       # each in six wordings, and one more that only the gate asks
held_out: {share: 0}                                  # so few are all studied
gate: {new_facts: ">= 75%", drift: "<= 0.1 nats"}     # and at most 20 % of general answers lost, as always
checkpoints: {every: 1000 steps}
"""
"""What both nights have in common."""

CARELESS = """\
lora: {r: 32, alpha: 64}
train: {learning_rate: 5e-4, epochs: 5, batch_size: 8, accumulation_steps: 1, max_seq_len: 256, dtype: fp32, lr_schedule: cosine,
        warmup_steps: 5, log_every: 5}
"""
CAREFUL = """\
rehearse: {prompts: default, ratio: 0.25, max_new_tokens: 32}   # its own answers to general prompts, kept as they are
lora: {r: 32, alpha: 64, init: null_space}                      # learns only where those answers leave room,
train: {learning_rate: 2.5e-3, epochs: 5, batch_size: 8, accumulation_steps: 1, max_seq_len: 256, dtype: fp32, lr_schedule: cosine,
        warmup_steps: 5, log_every: 5}                          # at a higher rate, as what passes through is smaller
"""


@dataclass(frozen=True)
class Night:
    """How a night ended: whether its candidate was promoted, and the gate's rules by their names, as its report has them."""

    promoted: bool
    candidate: str
    rules: Mapping[str, Mapping[str, Any]]

    @property
    def told(self) -> str:
        """What became of it, and why."""
        failed = "; ".join(str(rule["why"]) for rule in self.rules.values() if rule["passed"] is False)
        return f"{self.candidate} was promoted." if self.promoted else f"{self.candidate} was refused: {failed}"


@dataclass
class CorrectedModel:
    """Five steps. Each runs the real commands and requests, and checks what they did before it says so."""

    folder: Path
    model: str
    screen: Screen
    facts: Sequence[Fact] = FACTS
    general: Sequence[str] = GENERAL
    nights: tuple[str, str] = (NIGHT + CARELESS, NIGHT + CAREFUL)

    def tell(self) -> None:
        with stopped_at_the_end() as running:
            client = self.open_school(running)
            before = self.ask_general(client)
            self.correct(client)
            self.careless_night()
            night = self.careful_night(client)
            self.morning(client, before, night)

    def open_school(self, running: list[Background]) -> ServerBackend:
        """The model is added as it is, and served with its conversations recorded."""
        say, port = self.screen.say, free_port()
        self.screen.step("Act two. 1. A real model opens its school")
        say(f"$ nightschool models add {NAME} {self.model}")
        run_command(self.folder, "models", "add", NAME, self.model)
        words = ("--port", str(port), "--model-check-interval", "1s", "--record-conversations")
        say(f"$ nightschool serve {NAME} {' '.join(words)}")
        server = Background.start(self.folder, "serve", NAME, *words)
        running.append(server)
        client = ServerBackend(f"http://127.0.0.1:{port}", NAME)
        wait_until_ready(client, server)
        return client

    def ask_general(self, client: ServerBackend) -> dict[str, Reply]:
        """What it says to prompts that nobody teaches, to be held against what it says after the night."""
        return {prompt: ask(client, prompt, max_new_tokens=_ANSWER_TOKENS) for prompt in self.general}

    def correct(self, client: ServerBackend) -> None:
        """By day people ask about a company that it can't know, and correct what it says."""
        self.screen.step("2. By day people ask it about their company, and correct it")
        for fact in self.facts:
            reply = ask(client, fact.question, max_new_tokens=_ANSWER_TOKENS)
            client.feedback(reply.request_id, "bad", fact.correction)
            self.screen.say(
                f"\n  {fact.question}\n    it says      {_line(reply.text)}\n    correction   {fact.correction}"
            )
        self.screen.say(f"\n{len(self.facts)} corrections came in by POST /api/feedback, each in one wording.")

    def careless_night(self) -> None:
        """The corrections are studied and nothing else is: the gate refuses for drift."""
        self.screen.step("3. A night that studies the corrections, and nothing else")
        night = self.night(self.nights[0])
        if night.promoted or night.rules["drift"]["passed"] is not False:
            raise DemoFailed(f"This night should have been refused for drift, but {night.told}")
        self.screen.say(
            f"\nRefused: it knows {night.rules['new_facts']['candidate']:.0%} of the corrections in a wording that it never saw, and speaks "
            f"of everything else as of them ({night.rules['drift']['candidate']:.2f} nats a token). The model goes on serving as it was."
        )

    def careful_night(self, client: ServerBackend) -> Night:
        """The same with a rehearsal and an adapter out of the way of general answers: promoted, and swapped in."""
        self.screen.step(
            "4. The same night, rehearsed as the advice says, in directions that general answers leave idle"
        )
        night = self.night(self.nights[1])
        if not night.promoted:
            raise DemoFailed(f"This night should have been promoted, but {night.told}")
        wait_for_version(client, night.candidate)
        return night

    def night(self, recipe: str) -> Night:
        """Write the recipe, study by it, and show what the gate says."""
        (self.folder / RECIPE).write_text(recipe, encoding="utf-8")
        self.screen.say("".join(f"  {line}\n" for line in recipe.splitlines()))
        self.screen.say(f"$ nightschool train {RECIPE}")
        code = run_command(self.folder, "train", RECIPE, expected=(0, _REFUSED))
        report = ask_command(self.folder, "models", "report", f"{NAME}@latest")
        self.screen.say(f"\n$ nightschool models report {report['candidate']}")
        run_command(self.folder, "models", "report", report["candidate"])
        return Night(code == 0, report["candidate"], {rule["rule"]: rule for rule in report["rules"]})

    def morning(self, client: ServerBackend, before: Mapping[str, Reply], night: Night) -> None:
        """What it learned, in wordings that nobody trained, and what it says to everything else."""
        self.screen.step("5. The next morning")
        self.screen.say("What it learned, asked in wordings that no person gave and no rule made:\n")
        right = asked = 0
        for fact in self.facts:
            for question in fact.asked:
                reply = ask(client, question, max_new_tokens=_ANSWER_TOKENS)
                given = fact.is_given_by(reply.text, question)
                right, asked = right + given, asked + 1
                self.screen.say(f"  {'✓' if given else '✗'} {question}\n      {_line(reply.text)}")
        self.screen.say(
            f"\n{right} of {asked} are right, by the examiner's rules.\n\nWhat it says to everything else:\n"
        )
        for prompt, reply in before.items():
            now = ask(client, prompt, max_new_tokens=_ANSWER_TOKENS)
            said = "the same" if now.text == reply.text else _line(now.text)
            self.screen.say(f"  {prompt}\n    the day before   {_line(reply.text)}\n    this morning     {said}")
        lost = night.rules["general_lost"]
        self.screen.say(
            f"\nBy the gate: {night.rules['drift']['candidate']:.3f} nats a token of drift"
            + ("" if lost["candidate"] is None else f", {lost['candidate']:.0%} of the general answers lost")
            + "."
        )


def _line(text: str) -> str:
    """An answer on one line."""
    return " / ".join(part.strip() for part in text.strip().splitlines() if part.strip()) or "(nothing)"
