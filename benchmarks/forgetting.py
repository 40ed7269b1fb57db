"""What does a night cost of what was known, and what does replay buy?

A tiny model learns a made-up world; then it studies six new facts for one night, with replay and without. Old
facts are asked as they were trained, new ones in wordings that were not. Ours against ours: the same night without replay is the peer.
"""

from __future__ import annotations

import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from harness import Benchmark

BASE_TRAIN = {
    "learning_rate": 3e-3,
    "epochs": 25,
    "batch_size": 16,
    "accumulation_steps": 1,
    "max_seq_len": 64,
    "warmup_steps": 20,
}
NIGHT_TRAIN = BASE_TRAIN | {"learning_rate": 1e-3, "epochs": 14}
REPLAY = 8


@dataclass(frozen=True)
class Night:
    """Shares of the questions: old ones still answered (of those that were before), new ones answered."""

    kept: float
    learned: float


def cycle(folder: Path, recipe: dict[str, Any]) -> Any:
    """One cycle in the home of the folder."""
    from nightschool.config.recipe import Recipe
    from nightschool.jobs.cycle import run_cycle
    from nightschool.store.home import Home

    result = run_cycle(Home(folder / ".nightschool"), Recipe.model_validate(recipe), trigger="manual", root=folder)
    assert result.report is not None, f"the cycle {result.outcome}: {result.detail}"
    return result


def night(taught: Path, folder: Path, recipe: dict[str, Any], ratio: float) -> Night:
    """A night in a copy of the home in which the world was learned."""
    shutil.copytree(taught, folder)
    result = cycle(
        folder, recipe | {"train": NIGHT_TRAIN, "replay": {"ratio": ratio}, "data": [{"path": "new_facts.json"}]}
    )
    figures = {rule["rule"]: rule["candidate"] for rule in result.report["rules"]}
    return Night(kept=1 - figures["forgetting"], learned=figures["new_facts"])


def main() -> None:
    bench = Benchmark(
        "forgetting",
        "Old facts kept and new facts learned after a night, with and without replay",
        {"kept_with_replay": {"min": 0.97}, "learned_with_replay": {"min": 0.95}},
    )
    from nightschool.data.synthetic import make_world, write_world

    seeds = (0,) if bench.quick else (0, 1, 2)
    nights: dict[str, list[Night]] = {"with replay": [], "without replay": []}
    for seed in seeds:
        with tempfile.TemporaryDirectory() as scratch:
            taught = Path(scratch) / "taught"
            write_world(make_world(seed, num_people=10 if bench.quick else 24), taught)
            recipe: dict[str, Any] = {
                "name": "tutor",
                "base": "new:tiny",
                "data": [{"path": "old_facts.json"}],
                "train": BASE_TRAIN | {"seed": seed},
                "gate": {"sample": 400},
                "checkpoints": {"every": "10 epochs"},
            }
            assert cycle(taught, recipe).outcome == "promoted"
            for name, ratio in (("with replay", REPLAY), ("without replay", 0)):
                nights[name].append(night(taught, Path(scratch) / name.split()[0], recipe, ratio))
                print(
                    f"  seed {seed} {name}: kept {nights[name][-1].kept:.1%}, learned {nights[name][-1].learned:.1%}",
                    flush=True,
                )
    figures = {
        f"{what}_{name.replace(' ', '_')}": round(min(getattr(one, what) for one in nights[name]), 4)
        for name in nights
        for what in ("kept", "learned")
    }
    bench.table([(name, f"worst of {len(seeds)} seeds") for name in nights])
    bench.finish(figures)


if __name__ == "__main__":
    main()
