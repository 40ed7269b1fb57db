"""Who studies in `nights.py`: nightschool by its own command, with and without study and rehearsal."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from nights_exam import Fact

STUDIED: dict[str, Any] = {
    "study": {"write": "rules", "forms": 6},
    "rehearse": {"prompts": "default"},
}


class Nightschool:
    """One series of nights by `nightschool train`, each from the champion of the night before.

    Args:
        folder: New; its home, its recipe and its data lie there.
        base: Where the base lies.
        settings: Of the recipe, beside the base, the method and the data.
    """

    def __init__(self, folder: Path, base: Path, seed: int, settings: Mapping[str, Any]) -> None:
        self.folder, self.ref = folder, str(base)
        (folder / "data").mkdir(parents=True)
        recipe: dict[str, Any] = {
            "name": "night",
            "base": str(base),
            "method": "lora",
            "data": [{"path": "data/*.jsonl"}],
        }
        recipe |= {"held_out": {"share": 0}, "checkpoints": {"every": "1000 steps"}, "serve": {"promote": "always"}}
        recipe |= settings
        recipe["train"] = {"seed": seed, **recipe.get("train", {})}
        (folder / "night.json").write_text(json.dumps(recipe), encoding="utf-8")

    def study(self, night: int, new: Sequence[Fact]) -> float:
        """Study what is new, one wording each; the minutes that it took, exam and publishing among them."""
        rows = [{"question": fact.question, "answer": fact.answer} for fact in new]
        path = self.folder / "data" / f"night-{night}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        started = time.monotonic()
        command = [sys.executable, "-m", "nightschool", "-C", str(self.folder), "train", "night.json"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        with (self.folder / "night.log").open("a", encoding="utf-8") as log:
            log.write(done.stdout + done.stderr)
        if done.returncode:
            sys.exit(f"night {night} failed:\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}")
        self.ref = "night@latest"
        return (time.monotonic() - started) / 60
