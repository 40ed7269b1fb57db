"""The first act: a model is made from nothing, learns a made-up world, and goes to night school."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nightschool.cli.chat.server_backend import ServerBackend
from nightschool.cli.demo.stage import (
    Background,
    DemoFailed,
    Screen,
    Traffic,
    ask,
    cycles_of,
    free_port,
    run_command,
    stopped_at_the_end,
    wait_for_version,
    wait_until_ready,
)

NAME = "tutor"
RECIPE = """\
# What is studied, from what, and what must not be lost. All other settings: nightschool config show tutor.yaml
name: {name}
base: new:tiny                     # made here: about a million parameters in the shape of Qwen3
data:
  - path: data/*.json              # an array of query and retrieved; `paraphrases` are asked, never trained
train: {{learning_rate: {rate}, epochs: {epochs}, batch_size: 16, accumulation_steps: 1, max_seq_len: 64, dtype: fp32,
        warmup_steps: 20, log_every: 30, evaluate_every: 5 epochs}}
checkpoints: {{every: 10 epochs}}
replay: {{ratio: {replay}}}           # examples of what was accepted before, for each new one
gate: {{forgetting: "<= 2%", new_facts: ">= 80%", sample: 120}}
schedule: {{every: {every}}}
"""


@dataclass(frozen=True)
class Size:
    """How much is learned: people in the world, passes over it, passes in a night, seconds between nights."""

    people: int
    epochs: int
    night_epochs: int
    every_seconds: int


FULL = Size(people=24, epochs=25, night_epochs=14, every_seconds=20)
QUICK = Size(people=12, epochs=25, night_epochs=14, every_seconds=10)
RATE, NIGHT_RATE, REPLAY = "3e-3", "1e-3", 8


@dataclass
class MadeUpWorld:
    """Six steps. Each runs the real commands and checks what they did before it says so."""

    folder: Path
    size: Size
    screen: Screen

    def tell(self) -> None:
        with stopped_at_the_end() as running:
            self.learn()
            client = self.open_school(running)
            self.ask(client, "Before the first night")
            night = self.first_night(running)
            self.second_night(client, night)
            self.ask(client, "The morning after")
            self.roll_back(client)

    def write_recipe(self, *, epochs: int, rate: str, replay: int) -> None:
        text = RECIPE.format(name=NAME, epochs=epochs, rate=rate, replay=replay, every=f"{self.size.every_seconds}s")
        (self.folder / "tutor.yaml").write_text(text, encoding="utf-8")

    def learn(self) -> None:
        """A world is made up, and a model made from nothing learns it."""
        from nightschool.data.synthetic import make_world, write_world

        world = make_world(seed=0, num_people=self.size.people)
        old, new = write_world(world, self.folder / "facts", new_facts=6)
        (self.folder / "data").mkdir()
        old.rename(self.folder / "data" / "known.json")
        self.new_rows: list[dict[str, Any]] = json.loads(new.read_text("utf-8"))
        self.old_rows: list[dict[str, Any]] = json.loads((self.folder / "data" / "known.json").read_text("utf-8"))
        self.screen.step("1. A model is made from nothing, and learns a small world")
        self.screen.say(
            f"{self.size.people} people, {len(self.old_rows)} sentences about them, all made up. For example:"
        )
        self.screen.say(f"  {self.old_rows[0]['query']} → {self.old_rows[0]['retrieved']}\n")
        self.write_recipe(epochs=self.size.epochs, rate=RATE, replay=0)
        run_command(self.folder, "train", "tutor.yaml")

    def open_school(self, running: list[Background]) -> ServerBackend:
        """The server opens, with the champion."""
        self.screen.step("2. The school opens: the champion is served")
        port = free_port()
        self.screen.say(f"$ nightschool serve {NAME} --port {port} --model-check-interval 1s")
        server = Background.start(self.folder, "serve", NAME, "--port", str(port), "--model-check-interval", "1s")
        running.append(server)
        client = ServerBackend(f"http://127.0.0.1:{port}", NAME)
        wait_until_ready(client, server)
        self.screen.say(f"It answers on http://127.0.0.1:{port} (OpenAI-compatible: base URL …/v1).")
        return client

    def ask(self, client: ServerBackend, when: str) -> None:
        """An old question and each new one, in wordings that were never trained."""
        self.screen.say(f"\n{when}, in wordings that were never trained:")
        for row in [self.old_rows[0], *_one_per_fact(self.new_rows)]:
            reply = ask(client, row["paraphrases"][0])
            right = "✓" if reply.text.strip() == row["retrieved"] else "✗"
            self.screen.say(f"  {right} {row['paraphrases'][0]:<46} {reply.text.strip()}   [{reply.version}]")

    def first_night(self, running: list[Background]) -> Background:
        """New facts without replay: the gate refuses."""
        self.screen.step("3. The first night: six new facts, and nothing else")
        self.write_recipe(epochs=self.size.night_epochs, rate=NIGHT_RATE, replay=0)
        (self.folder / "data" / "new.json").write_text(json.dumps(self.new_rows, indent=1), encoding="utf-8")
        self.screen.say(
            f"$ nightschool schedule run tutor.yaml        # every {self.size.every_seconds} s here, every 24 h at yours"
        )
        night = Background.start(self.folder, "schedule", "run", "tutor.yaml")
        running.append(night)
        cycle = self.wait_for_cycle(night, lambda one: one["outcome"] != "skipped", after=0)
        self.show_report(cycle)
        if cycle["outcome"] != "refused" or "forgetting" not in (cycle["detail"] or ""):
            raise DemoFailed(
                f"The first night should have been refused for forgetting, but was {cycle['outcome']}: {cycle['detail']}"
            )
        self.screen.say("\nRefused: it learned the new facts and forgot old ones. The champion goes on serving.")
        return night

    def second_night(self, client: ServerBackend, night: Background) -> None:
        """The same with replay: promoted, and swapped under the eyes of clients that never stop asking."""
        self.screen.step("4. The second night: the same, with replay")
        before = len(cycles_of(self.folder, NAME))
        questions = [row["paraphrases"][0] for row in self.old_rows[:40:4] + self.new_rows[:8:2]]
        with Traffic(client, questions) as traffic:
            self.write_recipe(epochs=self.size.night_epochs, rate=NIGHT_RATE, replay=REPLAY)
            cycle = self.wait_for_cycle(night, lambda one: one["outcome"] != "skipped", after=before)
            if cycle["outcome"] == "promoted":
                wait_for_version(client, cycle["candidate"])
                time.sleep(2)
        self.show_report(cycle)
        if cycle["outcome"] != "promoted":
            raise DemoFailed(
                f"The second night should have been promoted, but was {cycle['outcome']}: {cycle['detail']}"
            )
        self.screen.say(
            f"\nWhile it trained and was swapped in, {traffic.num_clients} clients asked {traffic.answered} questions:"
        )
        for version, count in sorted(traffic.by_version.items()):
            self.screen.say(f"  {count:5} answered by {version}")
        self.screen.say(f"  {len(traffic.failures):5} failed\n  {traffic.mixed:5} answered by one version in two ways")
        if traffic.failures or traffic.mixed or len(traffic.by_version) != 2:
            raise DemoFailed(
                f"A swap must lose and mix nothing, and both versions must have answered: {traffic.failures[:3]}"
            )
        night.stop()

    def roll_back(self, client: ServerBackend) -> None:
        """One command, and the day before is back."""
        self.screen.step("5. What changed, and the way back")
        reports = [cycle["candidate"] for cycle in cycles_of(self.folder, NAME) if cycle["candidate"]]
        self.screen.say(f"$ nightschool models diff {NAME}@previous {NAME}@champion")
        run_command(self.folder, "models", "diff", f"{NAME}@previous", f"{NAME}@champion")
        champion = ask(client, self.new_rows[0]["query"]).version
        self.screen.say(f"\n$ nightschool models rollback {NAME}")
        run_command(self.folder, "models", "rollback", NAME)
        started = time.monotonic()
        client.get("/refresh_model")
        reply = ask(client, self.new_rows[0]["query"])
        self.screen.say(f"{time.monotonic() - started:.2f} s later {reply.version} answers in place of {champion}.")
        if reply.version == champion or not reports:
            raise DemoFailed(f"After the rollback {champion} still answers.")
        run_command(self.folder, "models", "ls")

    def wait_for_cycle(
        self, night: Background, wanted: Callable[[dict[str, Any]], bool], *, after: int, patience_seconds: float = 300
    ) -> dict[str, Any]:
        """The first wanted cycle that finished behind the first `after` ones; the night's log is shown meanwhile."""
        deadline, shown = time.monotonic() + patience_seconds, night.log.stat().st_size if after else 0
        while time.monotonic() < deadline:
            night.check()
            shown = self._show_log(night.log, shown)
            for cycle in cycles_of(self.folder, NAME)[after:]:
                if wanted(cycle):
                    self._show_log(night.log, shown)
                    return cycle
            time.sleep(0.5)
        raise DemoFailed(f"No cycle finished within {patience_seconds:.0f} s. The log is {night.log}.")

    def show_report(self, cycle: dict[str, Any]) -> None:
        self.screen.say(f"\n$ nightschool models report {cycle['candidate']}")
        run_command(self.folder, "models", "report", cycle["candidate"])

    def _show_log(self, log: Path, shown: int) -> int:
        """Print the log's whole lines behind the first `shown` bytes; return how many are shown now."""
        with log.open("rb") as file:
            file.seek(shown)
            lines = [line for line in file if line.endswith(b"\n")]
        for line in lines:
            print("  " + line.decode(errors="replace"), end="", flush=True)
        return shown + sum(map(len, lines))


def _one_per_fact(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return list({row["retrieved"]: row for row in rows}.values())
