"""Versions that read a memory, trained once for each of their settings and kept: one of SmolLM2, and one of a tiny model."""

from __future__ import annotations

import json
import random
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import memory_real
from kept import Kept
from memory_pararel import Facts, kinds_of_data

import nightschool
from nightschool.data.example import NeededFact

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


def real_reader(*, quick: bool, seed: int = 0) -> Reader:
    """SmolLM2 with the reader that memory_real.py trains, and its facts, those of test subjects counterfactual."""
    sizes = memory_real.Sizes(quick=quick)
    trained = memory_real.trained_memory(memory_real.kept_of(seed, sizes), sizes, seed)
    facts = Facts(kinds_of_data(), sizes.questions, seed)
    return Reader(Path(trained["version"]), trained["cpu_minutes"], facts.all, [one.number for one in facts.asked])


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

    settings = {
        "steps": [spoken, steps],
        "seed": seed,
        "train": _TRAIN | {"memory": _MEMORY},
        "said": [known, RELATIONS],
    }
    package = Path(nightschool.__file__).parent
    kept = Kept("memory_readers", settings, [path for pattern in memory_real.SOURCES for path in package.glob(pattern)])

    def made() -> dict[str, Any]:
        began = time.process_time()
        return {"version": train(kept.folder), "cpu_minutes": (time.process_time() - began) / 60}

    trained = kept.once("reader", made)
    drawn = random.Random(99)
    told = []
    for who in people:
        for relation, values in RELATIONS.items():
            value = drawn.choice(values)
            told.append((who in new, NeededFact(f"{who} {relation} {value}.", who, relation, value)))
    asked = [number for number, (is_test, _) in enumerate(told) if is_test]
    return Reader(Path(trained["version"]), trained["cpu_minutes"], [fact for _, fact in told], asked)


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
