"""Is a run of streamed experts that was killed again and again the run that was never interrupted, bit for bit?

Each attempt is a process that dies by SIGKILL: at a random moment, with half of an expert written, in the middle of an update, while a
checkpoint is written or synced, or while the one is written that an error leaves. The next one goes on with `--resume latest`, on a tier that
is drawn as well: experts in a file, in the host's memory, or resident. In the end all tensors, moments, counters and random states
of the last checkpoint are compared with those of a run with resident experts that nobody killed. Everything is drawn with one seed.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import multiprocessing
import os
import random
import signal
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import kill_points
import torch
from harness import Benchmark

STEPS, SAVE_EVERY = 18, 3
SHAPE = {"hidden_size": 32, "num_hidden_layers": 2, "head_dim": 8, "num_experts": 6, "expert_size": 32}
# How often each is drawn. With resident experts nothing is written back.
TIERS = {"disk": 4, "host": 2, "device": 1}
KINDS = {"any moment": 3, "write-back": 3, "update": 2, "save": 3, "emergency save": 3}
FILES = ("model.safetensors", "optimizer.safetensors", "optimizer.json", "rng.safetensors")
# So many kills at most hit one run; then it comes to its end.
KILLS_OF_A_RUN = 9


def attempt(home: str, run_id: str, root: str, resume: bool, place: str, left: int, fails_at: int) -> None:
    """The body of a process; writes how many moments of the place there were."""
    torch.set_num_threads(1)
    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        from nightschool.training.run import main as run_main

        count = kill_points.arm(place, left, fails_at=fails_at) if place != "any moment" else kill_points.Countdown(0)
        code = run_main(["--home", home, "--run", run_id, "--root", root, *(["--resume", "latest"] if resume else [])])
    Path(root, "moments").write_text(str(count.count))
    if code and "The device is gone" not in said.getvalue() and place != "emergency save":
        Path(root, "said").write_text(said.getvalue())
    os._exit(code)


@dataclass
class Tally:
    """Kills by kind, attempts that came to something else, and what went wrong."""

    kills: Counter[str] = field(default_factory=Counter)
    errors_saved: int = 0
    errors: int = 0
    older: int = 0
    differing: int = 0
    compared: int = 0
    runs: int = 0


class Trial:
    """The data and the recipe, and how runs of it are made."""

    def __init__(self, folder: Path) -> None:
        from nightschool.data.shards.tokenize import tokenize
        from nightschool.data.synthetic import make_world
        from nightschool.data.tokenizer import train_bpe
        from nightschool.store.home import Home

        self.folder, self.home = folder, Home(folder / "home").ensure()
        texts = make_world(seed=0, num_people=2).texts()
        (folder / "text.txt").write_text("\n".join(texts * 4), encoding="utf-8")
        tokenize(
            [folder / "text.txt"], folder / "shards", train_bpe(texts, vocab_size=300), row_tokens=32, shard_tokens=2048
        )

    def recipe(self, tier: str) -> dict[str, Any]:
        return {
            "name": "trial",
            "base": "new:moe-tiny",
            "method": "pretrain",
            "shape": SHAPE,
            "experts": {"tier": tier, "resident": 3},
            "data": [{"path": "./shards"}],
            "pretrain": {"sample_tokens": 0, "held_out_tokens": 256},
            "checkpoints": {"every": f"{SAVE_EVERY} steps", "keep": {"last": 2, "best": 1}},
            "train": {
                "max_steps": STEPS,
                "max_seq_len": 32,
                "batch_size": 2,
                "accumulation_steps": 2,
                "learning_rate": 1e-2,
                "max_grad_norm": 0.5,
                "dtype": "fp32",
                "num_threads": 1,
            },
            "serve": {"promote": "never"},
        }

    def begin(self, tier: str) -> Any:
        from nightschool.store.runs import RunStore

        return RunStore(self.home).create(self.recipe(tier), name="trial")

    def start(self, run: Any, *, resume: bool, place: str = "any moment", left: int = 0, fails_at: int = 0) -> Any:
        arguments = (str(self.home.path), run.id, str(self.folder), resume, place, left, fails_at)
        process = multiprocessing.get_context("fork").Process(target=attempt, args=arguments)
        process.start()
        return process

    def moments(self, place: str) -> tuple[Any, int, float]:
        """A run that nobody kills, how many moments of a place it has, and its seconds."""
        run, started = self.begin("disk"), time.monotonic()
        process = self.start(run, resume=False, place=place)
        process.join()
        assert process.exitcode == 0, (self.folder / "said").read_text()
        return run, int((self.folder / "moments").read_text()), time.monotonic() - started

    def on_tier(self, run: Any, tier: str) -> Any:
        """The run, to go on on a tier."""
        from nightschool.config.recipe import Recipe
        from nightschool.store.runs import RunStore

        run.recipe_path.write_text(json.dumps(Recipe.model_validate(self.recipe(tier)).as_plain()), encoding="utf-8")
        return RunStore(self.home).get(run.id)

    def killed_run(self, most: int, limits: dict[str, int], seconds: float, chance: random.Random, tally: Tally) -> Any:
        """A run that is killed up to so many times and then comes to its end."""
        run, done, tries, announced = self.begin("disk"), 0, 0, 0
        while True:
            kind = chance.choices(list(KINDS), list(KINDS.values()))[0]
            tier = chance.choices(list(TIERS), list(TIERS.values()))[0]
            if kind == "write-back" or (kind == "update" and tier == "device"):
                tier = "disk"
            free = done >= most
            left, fails_at = (0, 0) if free else (chance.randint(1, limits.get(kind, 1)), chance.randint(1, STEPS // 2))
            wait = None if free or kind != "any moment" else chance.uniform(0.1, 1.0) * seconds
            starts = len(events(run, "training"))
            process = self.start(
                self.on_tier(run, tier),
                resume=tries > 0,
                place="any moment" if free else kind,
                left=left,
                fails_at=fails_at,
            )
            process.join(wait)
            if process.exitcode is None:
                os.kill(process.pid, signal.SIGKILL)
                process.join()
            tries += 1
            begun = events(run, "training")[starts:]
            tally.older += bool(begun) and begun[0]["step"] < announced
            announced = max([row["step"] for row in events(run, "checkpoint")], default=0)
            if process.exitcode == -signal.SIGKILL:
                done += 1
                tally.kills[kind] += 1
                if run.status.candidate is None:
                    continue
            if process.exitcode in (0, -signal.SIGKILL):
                return run
            if kind == "emergency save" and not free:  # the error came, and its checkpoint was written before the kill
                tally.errors_saved += 1
                continue
            tally.errors += 1
            print((self.folder / "said").read_text(), flush=True)
            return run


def events(run: Any, kind: str) -> list[dict[str, Any]]:
    from nightschool.events import read_events

    return [row for row in read_events(run.events_path) if row["event"] == kind] if run.events_path.exists() else []


def digests(run: Any) -> dict[str, str]:
    """Of the files of the last checkpoint, and how far it is."""
    from nightschool.store import checkpoints

    path = checkpoints.newest_whole(run).checkpoint.path
    state = json.loads((path / "state.json").read_text())["train"]
    exact = {key: str(state[key]) for key in ("step", "epoch", "batch_index", "tokens_trained", "heldout_history")}
    return exact | {name: hashlib.sha256((path / name).read_bytes()).hexdigest() for name in FILES}


def main() -> None:
    bench = Benchmark(
        "expert_kills",
        "Streamed experts, killed by SIGKILL at random moments and resumed: what differs in the end?",
        {
            "values_different": {"max": 0},
            "resumed_from_older_than_announced": {"max": 0},
            "errors": {"max": 0},
            "kills": {"min": 30},
        },
    )
    torch.set_num_threads(1)
    import nightschool.training.run  # noqa: F401  imported once here, inherited by every process

    wanted, chance, tally = 10 if bench.quick else 120, random.Random(0), Tally()
    with tempfile.TemporaryDirectory() as folder:
        trial = Trial(Path(folder))
        reference = trial.begin("device")
        process = trial.start(reference, resume=False)
        process.join()
        assert process.exitcode == 0, (Path(folder) / "said").read_text()
        expected, limits, seconds = digests(reference), {}, 0.0
        for place in ("write-back", "update", "save"):
            run, limits[place], seconds = trial.moments(place)
            assert digests(run) == expected, f"a run on the disk tier that nobody killed differs ({place})"
        limits["emergency save"] = limits["save"] // (STEPS // SAVE_EVERY)
        print(f"  ({seconds:.1f} s without interruption; moments {limits})", flush=True)
        while tally.kills.total() < wanted and not tally.errors:
            run = trial.killed_run(min(KILLS_OF_A_RUN, wanted - tally.kills.total()), limits, seconds, chance, tally)
            found = digests(run)
            tally.differing += sum(found[key] != expected[key] for key in expected)
            tally.compared += len(expected)
            tally.runs += 1
            print(
                f"  run {tally.runs}: {tally.kills.total()} kills so far; {tally.differing} values differ", flush=True
            )
    bench.table([(kind, f"{count} kills") for kind, count in sorted(tally.kills.items())])
    bench.finish(
        {
            "values_different": tally.differing,
            "values_compared": tally.compared,
            "resumed_from_older_than_announced": tally.older,
            "errors": tally.errors,
            "emergency_saves_that_came_first": tally.errors_saved,
            "runs": tally.runs,
        }
        | ({} if bench.quick else {"kills": tally.kills.total()})
        | {f"kills_in_{kind.replace(' ', '_').replace('-', '_')}": count for kind, count in sorted(tally.kills.items())}
    )


if __name__ == "__main__":
    main()
