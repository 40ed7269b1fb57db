"""What does a model know after its facts were edited? A tiny base of a generated world, by free generation, memory beside its peers.

The base (Qwen3-shaped, trained here, kept in a cache between runs) knows a few people by heart and can read a text. Then it is frozen.
Edits come one after the other: first of facts that it knows, then of facts of people that it has never seen. The memory is the product's:
its training (`method: memory`), its store, its index with distractors, its abstention. Peers write edits into weights (full fine-tuning,
LoRA, the rows of the feed-forward layers that say most of the fact), into a codebook of hidden states, or into the prompt.

Of a sample of the edits, everything generated greedily up to the full stop and compared word for word:
  efficacy         asked as the entry is written            paraphrase       in other wordings that memories are trained with
  known_wording    in wordings that only the base has seen  strange_wording  in words that not even the base has seen
  locality         facts that nobody edited are answered as before; beside_edit: of people of whom another fact was edited
  retention        the first tenth of the edits, asked at the end

What is done is kept (see `kept`), of each seed the memory and each peer: a run that was cut off goes on.
"""

from __future__ import annotations

import json
import random
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol, cast

import torch
from harness import Benchmark
from kept import Kept
from memory_biographies import RELATIONS, TEACHER, BaseSettings, Fact, World, base, said
from memory_reading import Entries, Memorised
from torch import nn
from transformers import AutoTokenizer, Qwen3ForCausalLM

import nightschool
from nightschool.layers.attention import lay_out, packed_arguments
from nightschool.layers.forward import prepare
from nightschool.layers.memory_reading import Address, Candidate, MemoryReading
from nightschool.memory.entry import NewEntry
from nightschool.models.memory_model import MemoryModel

CANDIDATES = 8
MEMORY = {"knowledge_length": 16, "num_candidates": CANDIDATES, "gate_rank": 0, "fusion_rank": 0}
ANSWER_TOKENS = 5
AT_ONCE = 64
# The facts of every sixth known person are never edited, nor those of one relation of the others.
KEPT_PEOPLE = 6
RETENTION = 0.1
COLUMNS = ("efficacy", "paraphrase", "known_wording", "strange_wording", "locality", "beside_edit", "retention")
PEERS = ("codebook", "lora", "full", "sparse")
OWN_SOURCES = ("memory_editing.py", "memory_biographies.py", "memory_reading.py")
PRODUCT_SOURCES = ("layers/memory_*.py", "models/memory_*.py", "data/memory_*.py", "training/methods/memory.py",
                   "training/nearest_facts.py", "config/memory.py", "memory/**/*.py", "engine/memory_lookup.py")  # fmt: skip


@dataclass(frozen=True)
class Size:
    """How much is asked and edited. `peers_until`: weights that many edits have ruined are not edited further."""

    checkpoints: tuple[int, ...]
    peers_until: int
    distractors: int
    sample: int
    router_steps: int
    steps: int


QUICK = Size((10, 100, 1000), 100, 2000, 60, 100, 300)
FULL = Size((10, 100, 1000, 10_000, 100_000), 1000, 110_000, 300, 100, 500)


# --- asking -----------------------------------------------------------------------------------------------------------


class Speaker:
    """Free greedy generation with a model, many prompts at once, in packed passes; no token of an answer is given."""

    def __init__(self, model: MemoryModel, tokenizer: Any) -> None:
        self.model, self.tokenizer = model, tokenizer
        self._stop = tokenizer.convert_tokens_to_ids("Ġ.")

    def answers(self, prompts: Sequence[str], readings: Sequence[MemoryReading | None] | None = None) -> list[str]:
        """What is said after each prompt, up to the full stop."""
        readings = [None] * len(prompts) if readings is None else readings
        ids = [self.tokenizer(prompt)["input_ids"] for prompt in prompts]
        out: list[str] = []
        for start in range(0, len(prompts), AT_ONCE):
            part = slice(start, start + AT_ONCE)
            out += self._generated(ids[part], readings[part])
        return out

    @torch.no_grad()
    def _generated(self, ids: list[list[int]], readings: Sequence[MemoryReading | None]) -> list[str]:
        answers: list[list[int]] = [[] for _ in ids]
        for _ in range(ANSWER_TOKENS):
            going = [n for n, answer in enumerate(answers) if self._stop not in answer]
            if not going:
                break
            rows = [ids[n] + answers[n] for n in going]
            last = self._predicted(rows, [len(ids[n]) - 1 for n in going], [readings[n] for n in going])
            for n, token in zip(going, last, strict=True):
                answers[n].append(token)
        return [str(self.tokenizer.decode(answer)).strip() for answer in answers]

    def _predicted(
        self, rows: list[list[int]], reads_from: list[int], readings: list[MemoryReading | None]
    ) -> list[int]:
        arguments, order, ends = packed(rows)
        wanted = [int(order[end - 1]) for end in ends[1:]]
        spans = [
            (order[ends[n] + reads_from[n] : ends[n + 1]], reading)
            for n, reading in enumerate(readings)
            if reading is not None and len(reading)
        ]
        with self.model.reading(spans, wanted):
            logits = self.model(**arguments, logits_to_keep=torch.tensor(wanted)).logits[0]
        return cast(list[int], logits.argmax(-1).tolist())


def packed(rows: list[list[int]]) -> tuple[dict[str, Any], torch.Tensor, list[int]]:
    """Arguments of a pass over documents end to end, where each token of them stands, and where each document begins."""
    ends = [0, *torch.tensor([len(row) for row in rows]).cumsum(0).tolist()]
    layout = lay_out(torch.tensor(ends))
    order = torch.arange(layout.num_tokens) if layout.restore is None else layout.restore
    ids = torch.tensor([[token for row in rows for token in row]])
    positions = torch.cat([torch.arange(len(row)) for row in rows])[None]
    return packed_arguments(layout, ids, positions), order, ends


# --- who is asked -----------------------------------------------------------------------------------------------------


class Editable(Protocol):
    """A model whose facts can be edited."""

    def edit(self, facts: Sequence[Fact]) -> None:
        """One edit after the other."""

    def answers(self, prompts: Sequence[str]) -> list[str]:
        """What it says."""


class Unedited:
    """The base alone."""

    def __init__(self, speaker: Speaker) -> None:
        self._speaker = speaker

    def edit(self, facts: Sequence[Fact]) -> None:
        """Hears nothing."""

    def answers(self, prompts: Sequence[str]) -> list[str]:
        return self._speaker.answers(prompts)


class Remembering:
    """The memory: in layers, or with what was found as the beginning of the prompt."""

    def __init__(self, speaker: Speaker, memory: Memorised, read: str) -> None:
        self.speaker, self.memory, self._read = speaker, memory, read

    def edit(self, facts: Sequence[Fact]) -> None:
        """The memory is written once, for both ways of reading it."""
        if self._read == "layers":
            write(self.memory, facts)

    def answers(self, prompts: Sequence[str]) -> list[str]:
        found = self.memory.find(prompts, CANDIDATES if self._read == "layers" else 4)
        if self._read == "layers":
            return self.speaker.answers(prompts, [self.memory.reading(one) for one in found])
        texts = [" ".join([*(f.entry.text for f in reversed(one)), p]) for one, p in zip(found, prompts, strict=True)]
        return self.speaker.answers(texts)


class Tuned:
    """Weights of a copy of the base, or of adapters on it, that take steps until the edit is said: eight at most."""

    def __init__(self, model: Any, tokenizer: Any, rate: float, mask: Callable[[Any], None] | None = None) -> None:
        self._model = MemoryModel(model, fresh_modules(model, tokenizer))
        self._speaker = Speaker(self._model, tokenizer)
        assert prepare(self._model).packed
        self._tokenizer, self._mask = tokenizer, mask
        self._rate = rate
        self.learn: list[nn.Parameter] = []

    def edit(self, facts: Sequence[Fact]) -> None:
        for fact in facts:
            prompt = fact.ask(fact.relation.trained[0])
            optimizer = torch.optim.Adam(self.learn, lr=self._rate)
            start = len(self._tokenizer(prompt)["input_ids"])
            ids = self._tokenizer(prompt + said(fact.value))["input_ids"]
            arguments, _, _ = packed([ids])
            labels = torch.tensor(ids[start:])
            for _ in range(8):
                with torch.enable_grad():
                    logits = self._model(**arguments).logits[0, start - 1 : -1]
                    if bool((logits.argmax(-1) == labels).all()):
                        break
                    optimizer.zero_grad()
                    torch.nn.functional.cross_entropy(logits, labels).backward()
                if self._mask is not None:
                    self._mask((start, len(ids)))
                optimizer.step()

    def answers(self, prompts: Sequence[str]) -> list[str]:
        return self._speaker.answers(prompts)


class Codebook:
    """As GRACE (Hartvigsen et al. 2022): hidden states of edits after a layer, each with a radius within which its answer is given.

    Kinder than the original: the answer of a codeword is the edit's own, not what steps make of it. Radii begin at `radius`, and two edits
    that say different things share what lies between them.
    """

    def __init__(self, speaker: Speaker, radius: float) -> None:
        self._speaker, self._radius = speaker, radius
        self._keys: list[torch.Tensor] = []
        self._radii: list[float] = []
        self._said: list[str] = []

    @torch.no_grad()
    def states(self, prompts: Sequence[str]) -> torch.Tensor:
        """Of the last token of each prompt, half-way through the layers. [prompts, H]"""
        out = []
        base_model = self._speaker.model.base
        for prompt in prompts:
            arguments, _, _ = packed([self._speaker.tokenizer(prompt)["input_ids"]])
            hidden = base_model(**arguments, output_hidden_states=True).hidden_states
            out.append(hidden[len(hidden) // 2][0, -1])
        return torch.stack(out)

    def widen(self, prompts: Sequence[str]) -> None:
        """Let radii begin at half the median distance from one of these to the nearest other."""
        states = self.states(prompts)
        distances = torch.cdist(states, states).fill_diagonal_(torch.inf).amin(1)
        self._radius = float(distances.median()) / 2

    def edit(self, facts: Sequence[Fact]) -> None:
        states = self.states([fact.ask(fact.relation.trained[0]) for fact in facts])
        for fact, state in zip(facts, states, strict=True):
            radius, wanted = self._radius, said(fact.value).strip()
            if self._keys:
                distances = torch.linalg.vector_norm(torch.stack(self._keys) - state, dim=1)
                nearest = int(distances.argmin())
                if float(distances[nearest]) < 1e-5:
                    self._said[nearest] = wanted
                    continue
                if self._said[nearest] != wanted and float(distances[nearest]) < radius + self._radii[nearest]:
                    radius = self._radii[nearest] = float(distances[nearest]) / 2
            self._keys.append(state)
            self._radii.append(radius)
            self._said.append(wanted)

    def answers(self, prompts: Sequence[str]) -> list[str]:
        alone = self._speaker.answers(prompts)
        if not self._keys:
            return alone
        distances = torch.cdist(self.states(prompts), torch.stack(self._keys))
        nearest = distances.argmin(1).tolist()
        return [
            self._said[n] if float(distances[row, n]) <= self._radii[n] else alone[row] for row, n in enumerate(nearest)
        ]


def fresh_modules(model: Any, tokenizer: Any) -> Any:
    """Memory modules that nothing is read with."""
    from nightschool.models.memory_modules import MemoryModules, shape_for

    return MemoryModules(shape_for(model, tokenizer, gate_rank=4, fusion_rank=4))


def tuned(way: str, own: Any, tokenizer: Any, background: list[list[int]]) -> Tuned:
    """A peer that writes into the weights of a copy of the base."""
    if way == "lora":
        from peft import LoraConfig, get_peft_model

        adapted = get_peft_model(
            own, LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
        )
        peer = Tuned(own, tokenizer, 3e-3)
        peer.learn = [p for name, p in adapted.named_parameters() if "lora_" in name]
    elif way == "full":
        peer = Tuned(own, tokenizer, 3e-4)
        peer.learn = list(own.parameters())
    else:
        slots = Slots(own, background)
        peer = Tuned(own, tokenizer, 1e-2, slots.keep_few)
        peer.learn = slots.weights
    for parameter in peer.learn:
        parameter.requires_grad_(True)
    return peer


class Slots:
    """As sparse memory fine-tuning (Lin et al. 2025, arXiv 2510.15103), for a base without memory layers: the slots are what the feed-forward
    layers write for each hidden unit. Of an edit those few learn that are more active in it than in other texts (TF-IDF).
    """

    FEW = 16

    def __init__(self, model: Any, background: list[list[int]]) -> None:
        self._layers = [layer.mlp.down_proj for layer in model.model.layers]
        self.weights = [layer.weight for layer in self._layers]
        self._active: list[torch.Tensor] = []
        for layer in self._layers:
            layer.register_forward_pre_hook(lambda _, inputs: self._active.append(inputs[0][0].detach().abs()))
        with torch.no_grad():
            self._usual = []
            for row in background:
                self._active.clear()
                model(input_ids=torch.tensor([row]), use_cache=False)
                self._usual.append([self._used(active).float() for active in self._active])
        self._usual = [torch.stack(of_layer).mean(0) for of_layer in zip(*self._usual, strict=True)]
        self._active.clear()

    def _used(self, active: torch.Tensor) -> torch.Tensor:
        return (active > active.mean(dim=1, keepdim=True) * 2).any(dim=0)

    def keep_few(self, answer: tuple[int, int]) -> None:
        """Leave a gradient only to the slots that are most of this edit's own."""
        active = self._active[-len(self._layers) :]
        self._active.clear()
        for weight, of_layer, usual in zip(self.weights, active, self._usual, strict=True):
            frequency = of_layer[answer[0] - 1 : answer[1] - 1].sum(0)
            chosen = (frequency * -(usual + 1e-2).log()).topk(self.FEW).indices
            mask = torch.zeros(weight.shape[1])
            mask[chosen] = 1
            assert weight.grad is not None
            weight.grad *= mask


# --- the world of a run -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Edits:
    """What is edited, in order, and what it said before; what never is; and who nobody knows.

    `distractors`, and what is known of all `teachers`, stand in the memory from the beginning.
    """

    made: list[Fact]
    originals: dict[tuple[str, str], str]
    teachers: list[Fact]
    kept: list[Fact]
    beside: list[Fact]
    distractors: list[Fact]
    absent: list[Fact]
    trained_people: list[str]

    @classmethod
    def of(cls, world: World, size: Size, seed: int) -> Edits:
        chance = random.Random(1000 + seed)
        kept_people = set(world.known_people[::KEPT_PEOPLE])
        kept = [fact for fact in world.known if fact.subject in kept_people]
        beside, editable = [], []
        for place, who in enumerate(world.known_people):
            if who not in kept_people:
                own = [fact for fact in world.known if fact.subject == who]
                spared = own.pop(place % (len(RELATIONS) - 1))
                beside.append(spared)
                editable += own
        chance.shuffle(editable)
        strangers = world.people(size.distractors // len(RELATIONS) + 900, chance, avoid=world.known_people)
        trained, absent, others = strangers[:400], strangers[400:500], strangers[500:]
        distractors = world.facts_of(others, chance)
        later = distractors[:]
        chance.shuffle(later)
        edited = (editable + later)[: max(size.checkpoints)]
        made = [world.another(fact, chance) for fact in edited]
        originals = {(fact.subject, fact.relation.name): fact.value for fact in edited}
        teachers = world.facts_of(world.values[TEACHER.name], chance)
        return cls(made, originals, teachers, kept, beside, distractors, world.facts_of(absent, chance), trained)


def train_memory(
    folder: Path, base_folder: Path, world: World, edits: Edits, size: Size, seed: int
) -> tuple[str, float]:
    """The gate, then gate and reader; returns the version and its CPU minutes."""
    from nightschool.config.recipe import Recipe
    from nightschool.store.home import Home
    from nightschool.store.runs import RunStore
    from nightschool.training.run import execute
    from nightschool.work.stop import Stop

    chance = random.Random(seed)
    rows = []
    for fact in world.facts_of(edits.trained_people, chance):
        text = fact.ask(chance.choice(fact.relation.trained)) + said(fact.value)
        rows.append({"text": text, "fact": fact.needed._asdict()})
    rows += [
        {"text": fact.ask(chance.choice(fact.relation.wordings)) + said(fact.value)}
        for fact in chance.sample(world.known, min(len(world.known), len(rows) // 6))
    ]
    (folder / "rows.jsonl").write_text("\n".join(json.dumps(row) for row in rows) + "\n")
    home = Home(folder / ".nightschool").ensure()
    began, version = time.process_time(), str(base_folder)
    for stage, steps in (("router", size.router_steps), ("joint", size.steps)):
        recipe = Recipe.model_validate(
            {
                "name": f"memory-{stage}", "base": version, "method": "memory", "memory": MEMORY | {"stage": stage},
                "data": [{"path": "rows.jsonl"}], "held_out": {"share": 0.0},
                "train": {"dtype": "fp32", "num_threads": 1, "accumulation_steps": 1, "warmup_steps": 10, "seed": seed, "max_seq_len": 64,
                          "epochs": 1000, "log_every": 25, "batch_size": 64 if stage == "router" else 32, "max_steps": steps,
                          "learning_rate": 3e-3},
                "serve": {"promote": "never"}, "checkpoints": {"background": False},
            }
        )  # fmt: skip
        run = RunStore(home).create(recipe.as_plain(), name=recipe.name)
        execute(home, run, resume=None, root=folder, stop=Stop())
        assert run.status.candidate is not None
        version = str(home.models / run.status.candidate.replace("@", "/"))
    return version, (time.process_time() - began) / 60


# --- the columns ------------------------------------------------------------------------------------------------------


def share(flags: Sequence[bool]) -> float:
    return sum(flags) / max(1, len(flags))


def right(who: Editable, facts: Sequence[Fact], wordings: Sequence[str]) -> float:
    """How many facts are answered in these wordings."""
    answers = who.answers([fact.ask(wording) for fact, wording in zip(facts, wordings, strict=True)])
    return share([answer == said(fact.value).strip() for answer, fact in zip(answers, facts, strict=True)])


def columns(
    who: Editable, asked: Sequence[Fact], first: Sequence[Fact], edits: Edits, alone: Unedited, count: int
) -> dict[str, float]:
    """All columns that any of them can be asked."""
    chance = random.Random(5)
    figures = {
        "efficacy": right(who, asked, [f.relation.trained[0] for f in asked]),
        "paraphrase": right(who, asked, [chance.choice(f.relation.trained[1:]) for f in asked]),
        "known_wording": right(who, asked, [chance.choice(f.relation.known) for f in asked]),
        "strange_wording": right(who, asked, [chance.choice(f.relation.strange) for f in asked]),
        "retention": right(who, first, [f.relation.trained[0] for f in first]),
    }
    for column, facts in (("locality", edits.kept), ("beside_edit", edits.beside)):
        prompts = [fact.ask(chance.choice(fact.relation.wordings)) for fact in facts[:count]]
        figures[column] = share([a == b for a, b in zip(who.answers(prompts), alone.answers(prompts), strict=True)])
    return figures


def main() -> None:
    bench = Benchmark(
        "memory_editing",
        "What does a model know after its facts were edited, by a memory or by its peers?",
        {
            "efficacy": {"min": 0.98}, "paraphrase": {"min": 0.97}, "known_wording": {"min": 0.80}, "locality": {"min": 0.99},
            "locality_misled": {"min": 0.90}, "retention": {"min": 0.98}, "two_hop": {"min": 0.80}, "deletion_leak": {"max": 0},
            "stale": {"max": 0}, "false_answers": {"max": 0.01}, "training_cpu_minutes": {"max": 15},
        },
        choices={"seeds": ("1", "3")},
    )  # fmt: skip
    torch.set_num_threads(1)
    size = QUICK if bench.quick else FULL
    runs = [one_seed(size, seed) for seed in range(1 if bench.quick else int(bench.chosen["seeds"]))]
    figures = {key: sum(run[key] for run in runs) / len(runs) for key in runs[0]}
    bench.finish(figures | ratios(figures, size))


def one_seed(size: Size, seed: int) -> dict[str, float]:
    """Everything once."""
    settings = BaseSettings()
    world = World(settings.known_people, settings.seed)
    base_folder, base_seconds = base(settings, world)
    edits = Edits.of(world, size, seed)

    def remembered() -> dict[str, float]:
        with tempfile.TemporaryDirectory() as scratch:
            folder = Path(scratch)
            version, minutes = train_memory(folder, base_folder, world, edits, size, seed)
            return evaluate(folder, version, edits, world, size) | {"training_cpu_minutes": minutes}

    here, package = Path(__file__).parent, Path(nightschool.__file__).parent
    own = [here / name for name in OWN_SOURCES]
    made = {"base": base_folder.name, "seed": seed} | asdict(size)
    product = [path for pattern in PRODUCT_SOURCES for path in package.glob(pattern)]
    figures = Kept("memory_editing", made | {"memory": MEMORY}, own + product).once("memory", remembered)
    peers = Kept("memory_editing", made, own)
    print(f"  seed {seed}: what peers do is kept in {peers.folder}", flush=True)
    for name in PEERS:
        figures |= peers.once(name, partial(of_peer, name, base_folder, world, edits, size, seed))
    return figures | {"base_cpu_minutes": base_seconds / 60}


def evaluate(folder: Path, version: str, edits: Edits, world: World, size: Size) -> dict[str, float]:
    """All rows and columns of a memory version, of the base alone, and of reading from the prompt."""
    from nightschool.models.load import load_base
    from nightschool.store.home import Home

    loaded = load_base(version, Home(folder / ".nightschool"))
    model = MemoryModel(loaded.model, loaded.memory).eval()
    assert prepare(model).packed
    speaker = Speaker(model, loaded.tokenizer)
    alone = Unedited(speaker)
    known = [f.ask(f.relation.trained[0]) for f in world.known]
    knows = share([a == said(f.value).strip() for a, f in zip(alone.answers(known), world.known, strict=True)])
    memory = Memorised(
        model, loaded.tokenizer, [fact.needed for fact in edits.distractors + edits.teachers], folder / "memory"
    )
    for relation in RELATIONS:
        # Whoever owns a cat may own a dog: a store keeps both, unless it is told that there is one.
        memory.store.set_relation(relation.name, "single")
    reader, prompt = Remembering(speaker, memory, "layers"), Remembering(speaker, memory, "prompt")
    figures = edited({"no_edit": alone, "memory": reader, "prompt": prompt}, edits, alone, size, size.checkpoints)
    figures |= {column: figures[f"memory_{column}_{max(size.checkpoints)}"] for column in COLUMNS}
    figures |= afterwards(model, loaded.tokenizer, reader, prompt, alone, edits, size)
    return figures | {"base_knows": knows}


def of_peer(name: str, base_folder: Path, world: World, edits: Edits, size: Size, seed: int) -> dict[str, float]:
    """All columns of one that writes edits into weights or codewords."""
    torch.manual_seed(seed)
    tokenizer = AutoTokenizer.from_pretrained(base_folder)
    own = Qwen3ForCausalLM.from_pretrained(base_folder).eval()
    model = MemoryModel(own, fresh_modules(own, tokenizer)).eval()
    assert prepare(model).packed
    speaker = Speaker(model, tokenizer)
    if name == "codebook":
        codebook = Codebook(speaker, 0.0)
        codebook.widen([fact.ask(fact.relation.trained[0]) for fact in world.known])
        peer: Editable = codebook
    else:
        texts = world.texts(random.Random(7))
        background = [tokenizer(next(texts))["input_ids"] for _ in range(50)]
        peer = tuned(name, Qwen3ForCausalLM.from_pretrained(base_folder), tokenizer, background)
    counts = [count for count in size.checkpoints if count <= size.peers_until]
    return edited({name: peer}, edits, Unedited(speaker), size, counts)


def edited(
    rows: dict[str, Editable], edits: Edits, alone: Unedited, size: Size, counts: Sequence[int]
) -> dict[str, float]:
    """All columns of each of these, after so many edits; and the CPU seconds that the edits since the count before took."""
    figures: dict[str, float] = {}
    done = 0
    for count in counts:
        new, done = edits.made[done:count], count
        asked = random.Random(3).sample(edits.made[:count], min(size.sample, count))
        first = edits.made[: max(1, round(RETENTION * count))][: size.sample]
        for name, who in rows.items():
            began = time.process_time()
            who.edit(new)
            figures[f"{name}_edit_seconds_{count}"] = time.process_time() - began
            told = columns(who, asked, first, edits, alone, size.sample)
            print(f"  {count:>6} {name:<9} " + "  ".join(f"{k} {v:.3f}" for k, v in told.items()), flush=True)
            figures |= {f"{name}_{column}_{count}": value for column, value in told.items()}
    return figures


def afterwards(
    model: MemoryModel, tokenizer: Any, reader: Remembering, prompt: Editable, alone: Unedited, edits: Edits, size: Size
) -> dict[str, float]:
    """What is asked of the memory once all edits were made: two hops, absent subjects, a gate that is wrong, edits undone and deleted."""
    chance, figures = random.Random(11), {}
    for name, who in (("two_hop", reader), ("prompt_two_hop", prompt)):
        figures[name] = two_hop(who, edits, size.sample)
    prompts = [f.ask(chance.choice(f.relation.wordings)) for f in chance.sample(edits.absent, size.sample)]
    own = alone.answers(prompts)
    figures["false_answers"] = share([a != b for a, b in zip(reader.answers(prompts), own, strict=True)])
    figures["locality_misled"] = misled(model, tokenizer, edits, alone, size.sample)
    figures["misled_beside_edit"] = misled_beside(reader, edits, alone, size.sample)
    asked = chance.sample(edits.made, min(size.sample, len(edits.made)) // 2)
    first = [Fact((f.subject, f.relation, edits.originals[f.subject, f.relation.name])) for f in asked]
    write(reader.memory, first)
    prompts = [f.ask(f.relation.trained[0]) for f in asked]
    answers = reader.answers(prompts)
    figures["stale"] = share([a == said(f.value).strip() for a, f in zip(answers, asked, strict=True)])
    figures["back_again"] = share([a == said(f.value).strip() for a, f in zip(answers, first, strict=True)])
    store = reader.memory.store
    deleted = [f for f in edits.made if f not in asked][: size.sample]
    store.remove(*(one.id for f in deleted for one in store.about(f.subject, f.relation.name)), author="benchmark")
    prompts = [f.ask(f.relation.trained[0]) for f in deleted]
    answers, own = reader.answers(prompts), alone.answers(prompts)
    wanted = [said(f.value).strip() for f in deleted]
    figures["deletion_leak"] = share([a == w and a != o for a, w, o in zip(answers, wanted, own, strict=True)])
    figures["as_before_after_deletion"] = share([a == o for a, o in zip(answers, own, strict=True)])
    print("  afterwards  " + "  ".join(f"{k} {v:.3f}" for k, v in figures.items()), flush=True)
    return figures


def two_hop(who: Editable, edits: Edits, count: int) -> float:
    """Facts of the teachers that edits gave people: who teaches somebody is asked first, and then about whoever is named."""
    of_teacher = {(f.subject, f.relation.name): f for f in edits.teachers}
    asked = [f for f in edits.made if f.relation is TEACHER][:count]
    named = [a.removesuffix(" .") for a in who.answers([f.ask(TEACHER.trained[1]) for f in asked])]
    last = [RELATIONS[n % (len(RELATIONS) - 1)] for n in range(len(asked))]
    answers = who.answers([r.trained[1].replace("[X]", name) for r, name in zip(last, named, strict=True)])
    rows = zip(answers, asked, last, strict=True)
    return share([a == said(of_teacher[f.value, r.name].value).strip() for a, f, r in rows])


def misled(model: MemoryModel, tokenizer: Any, edits: Edits, alone: Unedited, count: int) -> float:
    """How often facts that nobody edited are answered as before, where the gate finds the nearest of others and is sure of the first."""
    others = [f.needed for f in edits.distractors[:2000]]
    near = Entries(model, tokenizer, others)
    prompts = [f.ask(random.Random(n).choice(f.relation.trained)) for n, f in enumerate(edits.kept[:count])]

    def spelled(text: str) -> tuple[int, ...]:
        return tuple(tokenizer(text, add_special_tokens=False)["input_ids"])

    readings = []
    for prompt, found in zip(prompts, near.find(prompts, CANDIDATES), strict=True):
        candidates = []
        for place, (n, score) in enumerate(found):
            address = Address(
                *map(spelled, (others[n].subject, others[n].relation)),
                len(spelled(others[n].statement)),
                (spelled(prompt),),
            )
            candidates.append(Candidate(f"m{n}", n, near.ids_of(n), score if place else 1.0, address))
        readings.append(MemoryReading.of(candidates))
    answers = Speaker(model, tokenizer).answers(prompts, readings)
    return share([a == b for a, b in zip(answers, alone.answers(prompts), strict=True)])


def misled_beside(reader: Remembering, edits: Edits, alone: Unedited, count: int) -> float:
    """The same for other facts of people of whom one was edited: what is found is theirs, and the gate is sure of the first."""
    prompts = [f.ask(random.Random(n).choice(f.relation.trained)) for n, f in enumerate(edits.beside[:count])]
    readings = [reader.memory.reading(one) for one in reader.memory.find(prompts, CANDIDATES)]
    for reading in readings:
        if len(reading):
            reading.scores[int(reading.scores.argmax())] = 1.0
    answers = reader.speaker.answers(prompts, readings)
    return share([a == b for a, b in zip(answers, alone.answers(prompts), strict=True)])


def ratios(figures: dict[str, float], size: Size) -> dict[str, float]:
    """The memory's figures over its peers', where these are not 0, after as many edits as all of them took."""
    last, most = max(size.checkpoints), size.peers_until
    found = {}
    for column in COLUMNS:
        for peer, count in (("prompt", last), *((peer, most) for peer in PEERS)):
            theirs = figures[f"{peer}_{column}_{count}"]
            if theirs:
                found[f"{column}_over_{peer}"] = figures[f"memory_{column}_{count}"] / theirs
    return found


def write(memory: Memorised, facts: Sequence[Fact]) -> None:
    """Edits, each a revision of its own; from a thousand on, a hundred at a time."""
    entries = [NewEntry(f.needed.text, subject=f.subject, relation=f.relation.name, value=f.value) for f in facts]
    at_once = 1 if len(entries) <= 1000 else 100
    for start in range(0, len(entries), at_once):
        memory.store.add(entries[start : start + at_once], author="benchmark")


if __name__ == "__main__":
    main()
