"""Does a real model that was never taught to read a memory read one, of facts that its weights cannot know?

SmolLM2-135M-Instruct, frozen. Facts and patterns are those of ParaRel's T-REx, subjects split between training and test; every value of
the test is counterfactual: drawn from the others of its relation. The memory holds all facts, and the gate that was trained finds the
entries. Patterns that are held out were never trained, for no subject. Peers: the base alone, and the base with the same entries, or
with the right one alone, in its prompt.
"""

from __future__ import annotations

import hashlib
import json
import math
import random
import re
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import real_model
import torch
from harness import DATA, Benchmark
from memory_reading import Asked, Entries, Memorised, continuations, said, stays

from nightschool.data.example import NeededFact
from nightschool.layers.forward import prepare

PLACE = DATA / "memory" / "pararel_trex"
CANDIDATES = 8
MEMORY = {
    "knowledge_length": 64,
    "num_candidates": CANDIDATES,
    "knowledge_dim": 1152,
    "gate_rank": 128,
    "fusion_rank": 128,
}
CONTINUED_TOKENS = 8
THREADS = 2
TEST_SHARE = 77  # of 256


@dataclass(frozen=True)
class Kind:
    """A relation: its patterns, of which the first is how entries are written, and its facts as subject and value."""

    patterns: tuple[str, ...]
    held_out: tuple[str, ...]
    facts: tuple[tuple[str, str], ...]

    @property
    def values(self) -> list[str]:
        return sorted({value for _, value in self.facts})


def kinds_of_data() -> dict[str, Kind]:
    """Relations with three patterns or more that end in the value; about a third of these are held out."""
    kinds = {}
    for path in sorted((PLACE / "patterns").iterdir()):
        patterns: list[str] = []
        for line in path.read_text().splitlines():
            pattern = re.sub(r"\s+", " ", re.sub(r"\s*\.$", "", json.loads(line)["pattern"].strip())).replace(" ,", ",")
            if pattern.endswith("[Y]") and pattern.count("[X]") == 1 and pattern[:-3].strip() not in patterns:
                patterns.append(pattern[:-3].strip())
        rows = (
            [json.loads(line) for line in (PLACE / "trex" / path.name).read_text().splitlines()]
            if (PLACE / "trex" / path.name).exists()
            else []
        )
        facts = {}
        for row in rows:
            if 2 < len(row["sub_label"]) < 40 and 1 < len(row["obj_label"]) < 30:
                facts.setdefault(row["sub_label"], row["obj_label"])
        if len(patterns) >= 3 and facts:
            rest = patterns[1:]
            random.Random(path.stem).shuffle(rest)
            held = max(1, round(len(patterns) / 3))
            kinds[path.stem] = Kind((patterns[0], *rest[held:]), tuple(rest[:held]), tuple(sorted(facts.items())))
    return kinds


def is_test(subject: str) -> bool:
    return hashlib.sha256(subject.encode()).digest()[0] < TEST_SHARE


def fact_of(kind: Kind, subject: str, value: str) -> NeededFact:
    pattern = kind.patterns[0]
    return NeededFact(f"{pattern.replace('[X]', subject)} {value}.", subject, pattern.replace("[X]", "").strip(), value)


def training_rows(kinds: dict[str, Kind], count: int, seed: int) -> list[dict[str, Any]]:
    """Facts of training subjects in all training patterns, as texts with the fact that they need."""
    chance, rows = random.Random(seed), []
    everything = [(kind, s, v) for kind in kinds.values() for s, v in kind.facts if not is_test(s)]
    for kind, subject, value in chance.sample(everything, min(count, len(everything))):
        prompt = chance.choice(kind.patterns).replace("[X]", subject)
        rows.append({"text": f"{prompt} {value}.", "fact": fact_of(kind, subject, value)._asdict()})
    return rows


def train(folder: Path, base: str, rows: list[dict[str, Any]], stage: str, seed: int, **settings: Any) -> str:
    """One stage, as `nightschool train` runs it; returns the version."""
    from nightschool.config.recipe import Recipe
    from nightschool.store.home import Home
    from nightschool.store.runs import RunStore
    from nightschool.training.run import execute
    from nightschool.work.stop import Stop

    home = Home(folder / ".nightschool").ensure()
    (folder / "rows.jsonl").write_text("\n".join(json.dumps(row) for row in rows) + "\n")
    recipe = Recipe.model_validate(
        {
            "name": f"memory-{stage}", "base": base, "method": "memory", "memory": MEMORY | {"stage": stage},
            "data": [{"path": "rows.jsonl"}], "held_out": {"share": 0.0},
            "train": {"dtype": "auto", "num_threads": THREADS, "accumulation_steps": 1, "warmup_steps": 10, "seed": seed, "max_seq_len": 128,
                      "epochs": 100, "log_every": 10} | settings,
            "serve": {"promote": "never"}, "checkpoints": {"background": False},
        }
    )  # fmt: skip
    run = RunStore(home).create(recipe.as_plain(), name=recipe.name)
    execute(home, run, resume=None, root=folder, stop=Stop())
    candidate = run.status.candidate
    assert candidate is not None
    return str(home.models / candidate.replace("@", "/"))


def perplexities(model: Any, tokenizer: Any, finder: Any, windows: int) -> tuple[float, float]:
    """Of plain English, with whatever is found for its first half read in the second, and without a memory."""
    text = (DATA / "text" / "news-from-nowhere.txt").read_text("utf-8")[20_000:]
    ids = tokenizer(text)["input_ids"]
    losses = [0.0, 0.0]
    with torch.no_grad():
        for number in range(windows):
            window = ids[number * 997 : number * 997 + 96]
            question = tokenizer.decode(window[24:48])
            reading = finder.reading(finder.find([question], CANDIDATES)[0])
            for way, spans in enumerate(([(slice(47, 96), reading)], [])):
                with model.reading(spans):
                    logits = model(input_ids=torch.tensor([window]), use_cache=False).logits[0]
                losses[way] += float(
                    torch.nn.functional.cross_entropy(logits[47:-1].float(), torch.tensor(window[48:]))
                )
    return math.exp(losses[0] / windows), math.exp(losses[1] / windows)


def share(flags: Sequence[bool]) -> float:
    return sum(flags) / max(1, len(flags))


def main() -> None:
    bench = Benchmark(
        "memory_real",
        "Does a frozen SmolLM2-135M read a memory of facts that its weights cannot know?",
        {
            "efficacy": {"min": 0.90},
            "paraphrase_unseen_patterns": {"min": 0.80},
            "locality": {"min": 0.98},
            "perplexity_ratio": {"max": 1.001},
            "training_cpu_minutes": {"max": 90},
        },
    )
    if real_model.find() is None or not PLACE.exists():
        sys.exit("This benchmark needs SmolLM2 (make real-model-file) and shared/data/memory.")
    torch.set_num_threads(THREADS)
    from nightschool.models.dtype import resolve_dtype
    from nightschool.models.load import load_base
    from nightschool.models.memory_model import MemoryModel
    from nightschool.store.home import Home

    steps, router_steps, questions = (40, 150, 48) if bench.quick else (110, 150, 100)
    plain = real_model.load()
    kinds, seed = kinds_of_data(), 0
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        rows = training_rows(kinds, 6000, seed)
        began = time.process_time()
        router = train(folder, str(plain.path), rows, "router", seed, max_steps=router_steps, batch_size=48)
        router_minutes = (time.process_time() - began) / 60
        version = train(folder, router, rows, "joint", seed, max_steps=steps, batch_size=24)
        minutes = (time.process_time() - began) / 60
        print(f"  trained: {minutes:.1f} CPU minutes, of them {router_minutes:.1f} on the gate", flush=True)
        loaded = load_base(version, Home(folder / ".nightschool"))
        model = MemoryModel(loaded.model, loaded.memory).eval()
        assert prepare(model).packed, "packed rows keep questions apart"
        compute = resolve_dtype("auto", torch.device("cpu"), hidden_size=plain.model.config.hidden_size).compute
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=compute == torch.bfloat16):
            figures = evaluate(model, loaded.tokenizer, kinds, questions, bench.quick)
    print(f"  computed in {compute}", flush=True)
    bench.finish(figures | {"training_cpu_minutes": minutes})


def evaluate(model: Any, tokenizer: Any, kinds: dict[str, Kind], count: int, quick: bool) -> dict[str, float]:
    """All columns, over `count` facts of test subjects."""
    chance = random.Random(99)
    # Patterns of different relations can be the same words; of a subject the first such fact is kept.
    told: dict[tuple[str, str], tuple[Kind, str, str]] = {}
    for kind in kinds.values():
        for subject, value in kind.facts:
            told.setdefault((subject, fact_of(kind, subject, value).relation), (kind, subject, value))
    new = {
        key: chance.choice([other for other in kind.values if other != value]) if is_test(subject) else value
        for key, (kind, subject, value) in told.items()
    }
    everything = [fact_of(kind, subject, new[key]) for key, (kind, subject, _) in told.items()]
    keys = list(told)
    own = chance.sample([n for n, (subject, _) in enumerate(keys) if is_test(subject)], count)
    chosen = [told[keys[n]] for n in own]
    entries = Memorised(model, tokenizer, everything, Path(tempfile.mkdtemp()) / "memory")
    figures: dict[str, float] = {"entries": len(everything), "questions": count}
    answers = [f" {new[keys[n]]}" for n in own]
    columns = {
        "efficacy": [k.patterns[0] for k, _, _ in chosen],
        "paraphrase_seen_patterns": [chance.choice(k.patterns[1:] or k.patterns) for k, _, _ in chosen],
        "paraphrase_unseen_patterns": [chance.choice(k.held_out) for k, _, _ in chosen],
    }
    for column, patterns in columns.items():
        prompts = [pattern.replace("[X]", s) for pattern, (_, s, _) in zip(patterns, chosen, strict=True)]
        asked = [Asked(p, a) for p, a in zip(prompts, answers, strict=True)]
        found = entries.find(prompts, CANDIDATES)
        readings = [entries.reading(one) for one in found]
        results = said(model, tokenizer, asked, readings)
        figures[column] = share([right for right, _ in results])
        figures[f"{column}_found"] = share(
            [str(n) in [f.entry.source for f in one] for n, one in zip(own, found, strict=True)]
        )
        figures[f"{column}_found_first"] = share(
            [bool(one) and one[0].entry.source == str(n) for n, one in zip(own, found, strict=True)]
        )
        named = [
            entry in [f.entry.id for f in one if f.entry.source == str(n)]
            for (right, entry), n, one in zip(results, own, found, strict=True)
            if right
        ]
        figures[f"{column}_named_right"] = share(named)
        figures[f"{column}_base_alone"] = share([r for r, _ in said(model, tokenizer, asked, [None] * count)])
        for name, texts in (
            ("prompt", [" ".join(f.entry.text for f in reversed(one)) for one in found]),
            ("prompt_oracle", [everything[n].text for n in own]),
        ):
            with_text = [Asked(f"{t}\n{a.prompt}", a.answer) for t, a in zip(texts, asked, strict=True)]
            figures[f"{column}_{name}"] = share([r for r, _ in said(model, tokenizer, with_text, [None] * count)])
        bench_row(figures, column)
    # One token at a time, so in fp32: autocast would cast all weights for each.
    with torch.autocast("cpu", enabled=False):
        prompts = [pattern.replace("[X]", s) for pattern, (_, s, _) in zip(columns["efficacy"], chosen, strict=True)]
        figures |= unread(model, tokenizer, everything, own, entries, prompts[: 24 if quick else 60], answers)
    return figures


def unread(
    model: Any,
    tokenizer: Any,
    everything: list[NeededFact],
    own: list[int],
    entries: Memorised,
    prompts: list[str],
    answers: list[str],
) -> dict[str, float]:
    """What is to stay: answers of the base where a question has no entry, and its perplexity of plain English."""
    figures: dict[str, float] = {}
    # Without its entry a question is to be answered as by the base: what is found is then of others, or says something else.
    entries.remove(own)
    alone = continuations(model, tokenizer, prompts, CONTINUED_TOKENS)
    found = entries.find(prompts, CANDIDATES)
    figures["locality"] = share(stays(model, tokenizer, prompts, alone, [entries.reading(one) for one in found]))
    # A finder that never abstains, and is sure of what is nearest.
    near = Entries(model, tokenizer, everything)
    near.hide(own)
    figures["locality_never_abstaining"] = share(
        stays(model, tokenizer, prompts, alone, [near.reading(one) for one in near.find(prompts, CANDIDATES)])
    )
    sure = [
        [(n, 1.0 if place == 0 else score) for place, (n, score) in enumerate(one)]
        for one in near.find(prompts, CANDIDATES)
    ]
    figures["locality_gate_sure_and_wrong"] = share(
        stays(model, tokenizer, prompts, alone, [near.reading(one) for one in sure])
    )
    deleted = [Asked(p, a) for p, a in zip(prompts, answers, strict=False)]
    figures["abstained_without_entry"] = share([not one for one in found])
    figures["deletion_leak"] = share(
        [r for r, _ in said(model, tokenizer, deleted, [entries.reading(o) for o in found])]
    )
    on, off = perplexities(model, tokenizer, entries, 24)
    figures |= {"perplexity_on": on, "perplexity_off": off, "perplexity_ratio": on / off}
    figures["perplexity_ratio_never_abstaining"] = perplexities(model, tokenizer, near, 24)[0] / off
    print(
        f"  locality {figures['locality']:.3f}, sure and wrong {figures['locality_gate_sure_and_wrong']:.3f}",
        flush=True,
    )
    return figures


def bench_row(figures: dict[str, float], column: str) -> None:
    print(
        f"  {column}: {figures[column]:.3f}; base alone {figures[column + '_base_alone']:.3f}, in the prompt "
        f"{figures[column + '_prompt']:.3f}, the right one alone {figures[column + '_prompt_oracle']:.3f}; found "
        f"{figures[column + '_found']:.3f}, first {figures[column + '_found_first']:.3f}",
        flush=True,
    )


if __name__ == "__main__":
    main()
