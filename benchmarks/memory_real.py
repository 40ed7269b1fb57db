"""Does a real model that was never taught to read a memory read one, of facts that its weights cannot know?

SmolLM2-135M-Instruct, frozen. Facts and patterns are those of ParaRel's T-REx, subjects split between training and test; every value of
the test is counterfactual: drawn from the others of its relation. The memory holds all facts, and entries are found as a server
finds them. Patterns that are held out were never trained, for no subject. Answers are generated freely, greedily, by the engine
that serves. Peers: the base alone; the base with what was found, or with the right entry alone, in its prompt; and LoRA,
trained for as long as the memory, on the statements of the questions alone, which spares it all other facts.

What is to stay is asked of facts that the memory had and no longer has, beside what the base says alone: as a server finds and reads
(`locality`); made to read the eight nearest of all entries, the score of the nearest set to 1 (`locality_gate_sure_and_wrong`); and
the same with the fit of that entry set to 1, too, so that only the states themselves can tell (`locality_states_alone`). Of those whose
subject the memory knows nothing else of, the same under `…_absent_subject`: others may have an entry that means nearly the same.

What is done is kept (see `kept`): a run that was cut off goes on.
"""

from __future__ import annotations

import gc
import math
import os
import random
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import real_model
import torch
from harness import DATA, Benchmark
from kept import Kept
from memory_answers import Answering, half_interval, is_right, newest_version, seconds_per_step, share
from memory_pararel import PLACE, Facts, kinds_of_data, plain_rows, training_rows
from memory_reading import Entries, Memorised

import nightschool
from nightschool.layers.memory_gate import text_for_gate
from nightschool.layers.memory_reading import Address, Candidate, MemoryReading

CANDIDATES = 8
# As many as a server puts into a prompt.
IN_PROMPT = 4
MEMORY = {
    "knowledge_length": 64,
    "num_candidates": CANDIDATES,
    "knowledge_dim": 1152,
    "gate_rank": 128,
    "fusion_rank": 128,
    # Chosen on questions of seed 1.
    "relation_closed_below": 0.3,
}
THREADS = 2
ROWS, PLAIN_ROWS = 12_000, 1_200
# A hundred times the default: at that so few steps learn nothing by heart.
LORA_RATE = 2e-3
# Settings were chosen on 0 and 1.
SEEDS = (2, 3, 4)
COLUMNS = ("efficacy", "paraphrase_seen_patterns", "paraphrase_unseen_patterns")
SOURCES = ("layers/memory_*.py", "models/memory_*.py", "data/memory_*.py", "training/methods/memory.py",
           "training/nearest_facts.py", "config/memory.py")  # fmt: skip


class Sizes:
    """Of one run of the benchmark."""

    def __init__(self, *, quick: bool) -> None:
        self.router_steps, self.steps, self.questions, self.windows = (60, 24, 16, 8) if quick else (150, 110, 300, 60)


def main() -> None:
    bench = Benchmark(
        "memory_real",
        "Does a frozen SmolLM2-135M read a memory of facts that its weights cannot know?",
        {
            "efficacy": {"min": 0.90},
            "paraphrase_unseen_patterns": {"min": 0.80},
            "locality": {"min": 0.98},
            "locality_gate_sure_and_wrong": {"min": 0.90},
            "perplexity_ratio": {"max": 1.001},
            "training_cpu_minutes": {"max": 90},
        },
        choices={"seeds": ("1", "2", "3")},
    )
    if real_model.find() is None or not PLACE.exists():
        sys.exit("This benchmark needs SmolLM2 (make real-model-file) and shared/data/memory.")
    torch.set_num_threads(THREADS)
    per_seed = [of_seed(seed, Sizes(quick=bench.quick)) for seed in SEEDS[: int(bench.chosen["seeds"])]]
    figures = {name: fmean(one[name] for one in per_seed) for name in per_seed[0]}
    figures |= {f"{name}_worst_seed": min(one[name] for one in per_seed) for name in COLUMNS if len(per_seed) > 1}
    bench.finish(figures)


def of_seed(seed: int, sizes: Sizes) -> dict[str, float]:
    """All figures of one seed: of questions and values, of training, and of weights."""
    kept = kept_of(seed, sizes)
    print(f"  seed {seed}: what is done is kept in {kept.folder}", flush=True)
    kinds = kinds_of_data()
    facts = Facts(kinds, sizes.questions, seed)
    trained = trained_memory(kept, sizes, seed)
    say(
        f"trained in {trained['cpu_minutes']:.1f} CPU minutes, {trained['wall_minutes']:.1f} on the wall, load {trained['load']:.0f}"
    )
    memory = InMemory(kept, trained["version"], facts)
    figures = memory.figures(sizes)
    memory.close()
    figures |= {"training_cpu_minutes": trained["cpu_minutes"], "training_wall_minutes": trained["wall_minutes"]}
    return figures | by_lora(kept, facts, trained)


def kept_of(seed: int, sizes: Sizes) -> Kept:
    """Where the parts of a seed are kept."""
    package = Path(nightschool.__file__).parent
    settings = {
        "seed": seed,
        "memory": MEMORY,
        "rows": [ROWS, PLAIN_ROWS],
        "lora": LORA_RATE,
        "base": real_model.SHA256,
    } | vars(sizes)
    return Kept("memory_real", settings, [path for pattern in SOURCES for path in package.glob(pattern)])


def say(text: str) -> None:
    print(f"    {text}", flush=True)


# --- training ---------------------------------------------------------------------------------------------------------


def train(folder: Path, recipe: dict[str, Any], rows: Sequence[dict[str, Any]]) -> Any:
    """A run, as `nightschool train` runs it."""
    import json

    from nightschool.config.recipe import Recipe
    from nightschool.store.home import Home
    from nightschool.store.runs import RunStore
    from nightschool.training.run import execute
    from nightschool.work.stop import Stop

    home = Home(folder / ".nightschool").ensure()
    file = folder / f"{recipe['name']}.jsonl"
    file.write_text("\n".join(json.dumps(row) for row in rows) + "\n")
    shared = {
        "data": [{"path": file.name}],
        "held_out": {"share": 0.0},
        "serve": {"promote": "never"},
        "checkpoints": {"background": False},
    }
    whole = Recipe.model_validate(recipe | shared)
    run = RunStore(home).create(whole.as_plain(), name=whole.name)
    execute(home, run, resume=None, root=folder, stop=Stop())
    return run


def settings_of(seed: int, **settings: Any) -> dict[str, Any]:
    return {"dtype": "auto", "num_threads": THREADS, "accumulation_steps": 1, "warmup_steps": 10, "seed": seed,
            "max_seq_len": 128, "epochs": 100, "log_every": 10} | settings  # fmt: skip


def trained_memory(kept: Kept, sizes: Sizes, seed: int) -> dict[str, Any]:
    """Gate, then gate and reader: the version, and what both took."""
    from nightschool.store.home import Home

    base, home = str(real_model.load().path), Home(kept.folder / ".nightschool")
    rows = training_rows(kinds_of_data(), ROWS, seed) + plain_rows(PLAIN_ROWS)
    random.Random(seed).shuffle(rows)

    def stage(name: str, base: str, **settings: Any) -> dict[str, Any]:
        recipe = {"name": name, "base": base, "method": "memory", "memory": MEMORY | {"stage": name}}
        return timed(home, lambda: train(kept.folder, recipe | {"train": settings_of(seed, **settings)}, rows))

    router = kept.once("router", lambda: stage("router", base, max_steps=sizes.router_steps, batch_size=48))
    joint = kept.once("joint", lambda: stage("joint", router["version"], max_steps=sizes.steps, batch_size=24))
    return joint | {name: router[name] + joint[name] for name in ("cpu_minutes", "wall_minutes")}


def timed(home: Any, run: Callable[[], Any]) -> dict[str, Any]:
    """The version that a run publishes, and what it took."""
    began, wall = time.process_time(), time.monotonic()
    version = newest_version(home, run())
    return {
        "version": version,
        "cpu_minutes": (time.process_time() - began) / 60,
        "wall_minutes": (time.monotonic() - wall) / 60,
        "load": os.getloadavg()[0],
    }


# --- reading ----------------------------------------------------------------------------------------------------------


class InMemory:
    """All facts in a memory, and a version that reads it, in an engine."""

    def __init__(self, kept: Kept, version: str, facts: Facts) -> None:
        from nightschool.models.load import load_base
        from nightschool.models.memory_model import MemoryModel
        from nightschool.store.home import Home

        self.kept, self.facts = kept, facts
        home = Home(kept.folder / ".nightschool")
        loaded = load_base(version, home)
        self.tokenizer = loaded.tokenizer
        self.model = MemoryModel(loaded.model, loaded.memory).eval()
        self.answering = Answering(version, home)
        self.entries = Memorised(self.model, self.tokenizer, facts.all, fresh(kept.folder / "memory"))
        absent = [question.number for question in facts.absent]
        self.entries.remove(absent)
        self.near = Entries(self.model, self.tokenizer, facts.all)
        self.near.hide(absent)

    def close(self) -> None:
        self.answering.close()
        self.model.attachment.remove()
        gc.collect()

    def figures(self, sizes: Sizes) -> dict[str, float]:
        figures: dict[str, float] = {"entries": len(self.facts.all), "questions": sizes.questions}
        figures |= self.stays() | self.kept.once("perplexity", lambda: self.perplexities(sizes.windows))
        say(f"perplexity {figures['perplexity_ratio']:.5f} times that without a memory")
        for column in COLUMNS:
            figures |= self.column(column)
        return figures

    def answers(
        self, part: str, prompts: Sequence[str], readings: Callable[[], Sequence[Any]] | None = None
    ) -> list[str]:
        return self.kept.once(part, lambda: self.answering(prompts, readings() if readings else None))

    def column(self, column: str) -> dict[str, float]:
        """How many questions get the value of their entry, read in each way."""
        asked = self.facts.asked
        prompts = [question.prompts[column] for question in asked]
        found = self.entries.find(prompts, CANDIDATES)
        texts = {
            "": prompts,
            "_base_alone": prompts,
            "_prompt": ["\n".join([*(f.entry.text for f in reversed(one[:IN_PROMPT])), p]) for one, p in zip(found, prompts, strict=True)],
            "_prompt_oracle": [f"{self.facts.all[q.number].text}\n{p}" for q, p in zip(asked, prompts, strict=True)],
        }  # fmt: skip
        figures = {}
        for way, own in texts.items():
            readings = None if way else lambda: [self.entries.reading(one) for one in found]
            said = self.answers(column + way, own, readings)
            figures[column + way] = share([is_right(text, q.value) for text, q in zip(said, asked, strict=True)])
        figures[f"{column}_interval"] = half_interval(figures[column], len(asked))
        of_right = [
            [n for n, f in enumerate(one) if f.entry.source == str(q.number)]
            for one, q in zip(found, asked, strict=True)
        ]
        figures[f"{column}_found"] = share([bool(places) for places in of_right])
        figures[f"{column}_found_first"] = share([places[:1] == [0] for places in of_right])
        say(f"{column} {figures[column]:.3f} ± {figures[f'{column}_interval']:.3f}; base alone {figures[f'{column}_base_alone']:.3f}, "
            f"in the prompt {figures[f'{column}_prompt']:.3f}, the right one alone {figures[f'{column}_prompt_oracle']:.3f}; "
            f"found {figures[f'{column}_found']:.3f}, first {figures[f'{column}_found_first']:.3f}")  # fmt: skip
        return figures

    def stays(self) -> dict[str, float]:
        """How many questions of what the memory no longer has get the base's own words."""
        absent = self.facts.absent
        prompts = [question.prompts["efficacy"] for question in absent]
        alone = self.answers("absent_base_alone", prompts)
        found = self.entries.find(prompts, CANDIDATES)
        ways: dict[str, Callable[[], Sequence[MemoryReading]]] = {
            "locality": lambda: [self.entries.reading(one) for one in found],
            "locality_gate_sure_and_wrong": lambda: [self.sure_and_wrong(p, fits=False) for p in prompts],
            "locality_states_alone": lambda: [self.sure_and_wrong(p, fits=True) for p in prompts],
        }
        gone = {question.number for question in absent}
        known = {fact.subject for number, fact in enumerate(self.facts.all) if number not in gone}
        is_known = [self.facts.all[question.number].subject in known for question in absent]
        figures = {"absent_subjects": float(is_known.count(False))}
        for way, readings in ways.items():
            said = self.answers(way, prompts, readings)
            same = [a == b for a, b in zip(said, alone, strict=True)]
            figures[way] = share(same)
            figures[f"{way}_absent_subject"] = share([one for one, k in zip(same, is_known, strict=True) if not k])
            if way == "locality":
                figures["deletion_leak"] = share(
                    [is_right(text, q.value) for text, q in zip(said, absent, strict=True)]
                )
        figures["abstained_without_entry"] = share([not one for one in found])
        say(", ".join(f"{name} {value:.3f}" for name, value in figures.items()))
        return figures

    def sure_and_wrong(self, prompt: str, *, fits: bool) -> MemoryReading:
        """The nearest entries of all, though none answers, the first with a score of 1; with `fits`, as if it fitted, too."""
        [found] = self.near.find([prompt], CANDIDATES)
        candidates = []
        for place, (number, score) in enumerate(found):
            fact = self.facts.all[number]
            address = Address(
                *(self.gate_ids(text) for text in (fact.subject, fact.relation)),
                len(self.gate_ids(fact.statement)),
                (self.gate_ids(prompt),),
            )
            # Without an address nobody judges whether it fits.
            known = None if fits and place == 0 else address
            candidates.append(
                Candidate(f"m{number}", number, self.gate_ids(fact.text), 1.0 if place == 0 else score, known)
            )
        return MemoryReading.of(candidates)

    def gate_ids(self, text: str) -> tuple[int, ...]:
        return tuple(self.tokenizer(text_for_gate(text), add_special_tokens=False)["input_ids"])

    def perplexities(self, windows: int) -> dict[str, float]:
        """Of plain English, whose first half is the question of what is read in the second."""
        text = (DATA / "text" / "news-from-nowhere.txt").read_text("utf-8")[20_000:]
        ids = self.tokenizer(text)["input_ids"]
        losses = {"on": 0.0, "never_abstaining": 0.0, "off": 0.0}
        read = {"on": 0, "never_abstaining": 0}
        for number in range(windows):
            window = ids[number * 997 : number * 997 + 96]
            question = self.tokenizer.decode(window[:48])
            readings = {
                "on": self.entries.reading(self.entries.find([question], CANDIDATES)[0]),
                "never_abstaining": self.sure_and_wrong(question, fits=False),
            }
            off = self.loss(window, None)
            losses["off"] += off
            for way, reading in readings.items():
                self.model.encoder.encode([reading])
                # What is closed is the base to the bit.
                losses[way] += off if reading.is_closed else self.loss(window, reading)
                read[way] += not reading.is_closed
        per_word = {way: math.exp(loss / windows) for way, loss in losses.items()}
        figures = {f"perplexity_{way}": value for way, value in per_word.items()}
        figures |= {f"windows_read_{way}": count / windows for way, count in read.items()}
        figures["perplexity_ratio"] = per_word["on"] / per_word["off"]
        figures["perplexity_ratio_never_abstaining"] = per_word["never_abstaining"] / per_word["off"]
        return figures

    @torch.no_grad()
    def loss(self, window: Sequence[int], reading: MemoryReading | None) -> float:
        spans = [] if reading is None else [(slice(47, 96), reading)]
        with self.model.reading(spans):
            logits = self.model(input_ids=torch.tensor([list(window)]), use_cache=False).logits[0]
        return float(torch.nn.functional.cross_entropy(logits[47:-1].float(), torch.tensor(window[48:])))


def fresh(folder: Path) -> Path:
    """A name for a folder that is not there yet."""
    number = sum(1 for _ in folder.parent.glob(f"{folder.name}-*"))
    return folder.with_name(f"{folder.name}-{number}")


# --- the peer that learns the facts by heart --------------------------------------------------------------------------


def by_lora(kept: Kept, facts: Facts, memory: dict[str, Any]) -> dict[str, float]:
    """LoRA for as long as the memory was trained, on the statements of the questions."""
    from nightschool.store.home import Home

    home = Home(kept.folder / ".nightschool")

    def trained() -> dict[str, Any]:
        rows = [{"text": facts.all[question.number].text} for question in facts.asked]
        recipe = {"base": str(real_model.load().path), "method": "lora"}
        settings = settings_of(0, batch_size=16, learning_rate=LORA_RATE)
        began, wall = time.process_time(), time.monotonic()
        pilot = train(
            kept.folder,
            recipe | {"name": "lora-pilot", "train": settings | {"max_steps": 6, "log_every": 3}},
            rows,
        )
        busy = (time.process_time() - began) / (time.monotonic() - wall)
        steps = max(10, round(memory["cpu_minutes"] * 60 / (seconds_per_step(pilot) * busy)))
        whole = recipe | {"name": "lora-whole", "train": settings | {"max_steps": steps}}
        return timed(home, lambda: train(kept.folder, whole, rows))

    known = kept.once("lora", trained)
    say(f"LoRA: {known['cpu_minutes']:.1f} CPU minutes")
    figures = {"lora_cpu_minutes": known["cpu_minutes"], "lora_wall_minutes": known["wall_minutes"]}
    answering = Answering(known["version"], home)
    try:
        for column in COLUMNS:
            said = kept.once(
                f"{column}_lora", lambda column=column: answering([q.prompts[column] for q in facts.asked])
            )
            figures[f"{column}_lora"] = share([is_right(t, q.value) for t, q in zip(said, facts.asked, strict=True)])
        prompts = [question.prompts["efficacy"] for question in facts.absent]
        said, alone = kept.once("locality_lora", lambda: answering(prompts)), kept.once("absent_base_alone", list)
        figures["locality_lora"] = share([a == b for a, b in zip(said, alone, strict=True)])
    finally:
        answering.close()
    say(", ".join(f"{name} {value:.3f}" for name, value in figures.items() if name.endswith("_lora")))
    return figures


if __name__ == "__main__":
    main()
