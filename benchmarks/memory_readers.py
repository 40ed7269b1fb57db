"""Versions that read a memory, trained once for each of their settings and kept beside the real model: what reads SmolLM2's and a tiny one.

A reader that was trained before is taken as it is, if neither its settings, nor its data, nor the code that trains it changed since.
"""

from __future__ import annotations

import getpass
import hashlib
import json
import random
import shutil
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import memory_real
import real_model
import torch

import nightschool
from nightschool.data.example import NeededFact

_CODE = ("layers/memory_*.py", "models/memory_model.py", "data/memory_*.py", "training/methods/memory.py")
# A world that a tiny model can learn to speak of: names of two parts, three relations.
_FIRST, _LAST = (
    ("Ada", "Bo", "Cy", "Dee", "Eli", "Fay", "Gus", "Hal", "Ivy", "Jo"),
    ("berg", "dal", "fors", "gren", "holm", "lund", "mark", "nes"),
)
_ONSETS, _ENDS = ("Ka", "Lo", "Mi", "Ra", "Su", "Te", "Vo", "Zu"), ("do", "lin", "mar", "nia", "ral", "sto")
_PLACES = [a + b for a in _ONSETS for b in _ENDS]
_MEMORY = {"knowledge_length": 32, "num_candidates": 8, "knowledge_dim": 128, "gate_rank": 16, "fusion_rank": 32}
_TRAIN = {"learning_rate": 3e-3, "epochs": 100, "batch_size": 16, "accumulation_steps": 1, "max_seq_len": 64, "warmup_steps": 10,
          "dtype": "fp32", "num_threads": 1, "log_every": 50}  # fmt: skip
RELATIONS = {"lives in": _PLACES[:24], "works in": _PLACES[12:36], "was born in": _PLACES[24:]}


@dataclass(frozen=True)
class Reader:
    """A trained version, what it cost, and facts that it never saw with the prompts that ask for them."""

    folder: Path
    training_cpu_minutes: float
    facts: list[NeededFact]
    asked: list[int]

    def prompt(self, number: int) -> str:
        """A fact of the memory without its value and its full stop."""
        fact = self.facts[number]
        return fact.text[: fact.text.rindex(fact.value)].strip()


def real_reader(*, router_steps: int = 150, steps: int = 110, seed: int = 0) -> Reader:
    """SmolLM2 with a reader that was trained as memory_real.py trains it; the memory has all facts, those of test subjects counterfactual."""
    kinds = memory_real.kinds_of_data()
    base = real_model.load().path

    def train(folder: Path) -> str:
        rows = memory_real.training_rows(kinds, 6000, seed)
        router = memory_real.train(folder, str(base), rows, "router", seed, max_steps=router_steps, batch_size=48)
        return memory_real.train(folder, router, rows, "joint", seed, max_steps=steps, batch_size=24)

    key = ["real", router_steps, steps, seed, memory_real.MEMORY]
    version, minutes = _kept(key, real_model.folder() / "readers", train)
    chance = random.Random(99)
    told: dict[tuple[str, str], tuple[bool, NeededFact]] = {}
    for kind in kinds.values():
        for subject, value in kind.facts:
            is_test = memory_real.is_test(subject)
            new = chance.choice([other for other in kind.values if other != value]) if is_test else value
            fact = memory_real.fact_of(kind, subject, new)
            told.setdefault((subject, fact.relation), (is_test, fact))
    return _reader(version, minutes, list(told.values()))


def small_reader(*, spoken: int = 200, steps: int = 200, seed: int = 0) -> Reader:
    """A model of a million parameters that learned to speak of a generated world, and then to read a memory of it."""
    chance = random.Random(seed)
    people = [f"{a} {b.capitalize()}" for a in _FIRST for b in _LAST]
    chance.shuffle(people)
    known, new = people[:60], people[60:]

    def train(folder: Path) -> str:
        rows = [_row(who, relation, chance) for who in known for relation in RELATIONS for _ in range(10)]
        chance.shuffle(rows)
        texts = [{"text": row["text"]} for row in rows]
        speaker = _trained(folder, "speaker", "new:tiny", texts, {"method": "full"}, spoken, seed)
        memory = {"method": "memory", "memory": _MEMORY | {"stage": "joint"}}
        return _trained(folder, "reader", speaker, rows, memory, steps, seed)

    root = Path(tempfile.gettempdir()) / f"nightschool-readers-{getpass.getuser()}"
    version, minutes = _kept(["small", spoken, steps, seed, _MEMORY, _TRAIN, known, RELATIONS], root, train)
    drawn = random.Random(99)
    told = []
    for who in people:
        for relation, values in RELATIONS.items():
            value = drawn.choice(values)
            told.append((who in new, NeededFact(f"{who} {relation} {value}.", who, relation, value)))
    return _reader(version, minutes, told)


def _reader(version: Path, minutes: float, told: list[tuple[bool, NeededFact]]) -> Reader:
    return Reader(version, minutes, [fact for _, fact in told], [n for n, (is_test, _) in enumerate(told) if is_test])


def _row(who: str, relation: str, chance: random.Random) -> dict[str, Any]:
    value = chance.choice(RELATIONS[relation])
    text = f"{who} {relation} {value}."
    return {"text": text, "fact": {"text": text, "subject": who, "relation": relation, "value": value}}


def _trained(
    folder: Path, name: str, base: str, rows: list[dict[str, Any]], method: dict[str, Any], steps: int, seed: int
) -> str:
    """Train a tiny model, as `nightschool train` does; returns the version's folder."""
    from nightschool.config.recipe import Recipe
    from nightschool.store.home import Home
    from nightschool.store.runs import RunStore
    from nightschool.training.run import execute
    from nightschool.work.stop import Stop

    home = Home(folder / ".nightschool").ensure()
    (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    recipe = Recipe.model_validate(
        {
            "name": name, "base": base, "data": [{"path": f"{name}.jsonl"}], "held_out": {"share": 0.0}, **method,
            "train": _TRAIN | {"max_steps": steps, "seed": seed},
            "serve": {"promote": "never"}, "checkpoints": {"background": False},
        }
    )  # fmt: skip
    run = RunStore(home).create(recipe.as_plain(), name=recipe.name)
    execute(home, run, resume=None, root=folder, stop=Stop())
    assert run.status.candidate is not None
    return str(home.models / run.status.candidate.replace("@", "/"))


def _kept(key: list[Any], root: Path, train: Callable[[Path], str]) -> tuple[Path, float]:
    """The folder of a version that `train` makes, or made before under this key, and the minutes of the processor that it took."""
    whole = hashlib.sha256(json.dumps([key, torch.__version__]).encode())
    package = Path(nightschool.__file__).parent
    for path in sorted(path for pattern in _CODE for path in package.glob(pattern)):
        whole.update(path.read_bytes())
    place = root / f"{key[0]}-{whole.hexdigest()[:16]}"
    if not place.exists():
        root.mkdir(mode=0o700, parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=root) as scratch:
            began = time.process_time()
            version = train(Path(scratch) / "training")
            minutes = (time.process_time() - began) / 60
            made = Path(scratch) / "made"
            shutil.copytree(version, made / "version")
            _with_its_base(made, place)
            (made / "minutes").write_text(f"{minutes}")
            made.rename(place)
    return place / "version", float((place / "minutes").read_text())


def _with_its_base(made: Path, place: Path) -> None:
    """Keep a base beside its reader, which will lie at `place`, where it would go with the folder of the training."""
    from nightschool.models.folder import MEMORY_CONFIG

    path = made / "version" / MEMORY_CONFIG
    config = json.loads(path.read_text())
    base = Path(config["base"])
    if made.parent in base.parents:
        shutil.copytree(base, made / "base")
        config["base"] = str(place / "base")
        path.write_text(json.dumps(config))
