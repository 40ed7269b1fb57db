"""Fictional biographies, and a tiny base that is pre-trained on them, after Physics of Language Models (Allen-Zhu and Li, arXiv 2309.14316).

People have names of three words and six facts each. The base learns the facts of a few people in many wordings, and to read
what a text said before. All other people are known by their names' words alone, as any name is to a model.
Wordings: those that entries are written in and memories are trained with; others that only the base has seen; and some of words that
nobody has seen, not even the base.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from nightschool.data.example import NeededFact

ONSETS, VOWELS, CODAS = (
    ["b", "d", "f", "g", "h", "k", "l", "m", "n", "p", "r", "s", "t", "v", "z"],
    ["a", "e", "i", "o", "u"],
    ["", "n", "l", "r", "s"],
)
FIRST, MIDDLE, LAST = 60, 40, 160
VALUES = 48
START, UNKNOWN = "<s>", "<unk>"


@dataclass(frozen=True)
class Relation:
    """What entries are written with, and how it is asked for: `[X]` is the subject, and the value comes at the end.

    `trained` are asked in the training of memories, `known` only of the base, `strange` in no training at all.
    """

    name: str
    trained: tuple[str, ...]
    known: tuple[str, ...]
    strange: tuple[str, ...]

    @property
    def wordings(self) -> tuple[str, ...]:
        """Those that the base has seen."""
        return self.trained + self.known


RELATIONS = (
    Relation(
        "was born in",
        ("[X] was born in", "Where was [X] born ?", "The birth place of [X] is", "Which town is [X] from ?"),
        ("[X] came into the world in", "Name the native town of [X] ."),
        ("[X] first saw daylight at", "Cradle location for [X] :"),
    ),
    Relation(
        "works for",
        ("[X] works for", "Who employs [X] ?", "The employer of [X] is", "Which firm pays [X] ?"),
        ("[X] has a job at", "Name the company of [X] ."),
        ("[X] earns wages under", "Payroll entry for [X] :"),
    ),
    Relation(
        "studied",
        ("[X] studied", "What did [X] study ?", "The field of [X] is", "Which subject did [X] learn ?"),
        ("[X] has a degree in", "Name the science of [X] ."),
        ("[X] graduated within", "Academic discipline for [X] :"),
    ),
    Relation(
        "plays",
        (
            "[X] plays",
            "Which instrument does [X] play ?",
            "The instrument of [X] is",
            "What does [X] make music with ?",
        ),
        ("[X] is heard on the", "Name the sound maker of [X] ."),
        ("[X] performs upon", "Orchestra seat for [X] :"),
    ),
    Relation(
        "owns",
        ("[X] owns", "Which animal does [X] own ?", "The pet of [X] is", "What does [X] feed at home ?"),
        ("[X] goes for walks with a", "Name the beast of [X] ."),
        ("[X] cares daily about", "Veterinary card for [X] :"),
    ),
    Relation(
        "is taught by",
        ("[X] is taught by", "Who teaches [X] ?", "The teacher of [X] is", "Which master does [X] follow ?"),
        ("[X] takes lessons from", "Name the mentor of [X] ."),
        ("[X] receives guidance through", "Tutor assigned for [X] :"),
    ),
)
TEACHER = RELATIONS[-1]


class Fact(tuple[str, Relation, str]):
    """Subject, relation, value."""

    __slots__ = ()

    @property
    def subject(self) -> str:
        return self[0]

    @property
    def relation(self) -> Relation:
        return self[1]

    @property
    def value(self) -> str:
        return self[2]

    @property
    def needed(self) -> NeededFact:
        """As training knows it."""
        name = self.relation.name
        return NeededFact(f"{self.subject} {name} {self.value} .", self.subject, name, self.value)

    def ask(self, wording: str) -> str:
        """The prompt of a wording."""
        return wording.replace("[X]", self.subject)


def said(value: str) -> str:
    """How an answer goes on after its prompt."""
    return f" {value} ."


class World:
    """The same for the same seed. `known` are the facts that the base learns; `names` draws people that nobody knows."""

    def __init__(self, known_people: int, seed: int = 0) -> None:
        chance = random.Random(seed)
        words: set[str] = set()
        while len(words) < FIRST + MIDDLE + LAST + 5 * 2 * VALUES:
            syllables = [chance.choice(ONSETS) + chance.choice(VOWELS) for _ in range(chance.choice((2, 2, 3)))]
            words.add("".join(syllables) + chance.choice(CODAS))
        drawn = sorted(words)
        chance.shuffle(drawn)
        names = [word.title() for word in drawn[: FIRST + MIDDLE + LAST]]
        self.first, self.middle, self.last = (
            names[:FIRST],
            names[FIRST : FIRST + MIDDLE],
            names[FIRST + MIDDLE :],
        )
        rest = drawn[FIRST + MIDDLE + LAST :]
        # Values of one word, and of two; of teachers, of three.
        self.value_words = [rest[number * 2 * VALUES : (number + 1) * 2 * VALUES] for number in range(5)]
        self.values: dict[str, list[str]] = {}
        for number, relation in enumerate(RELATIONS[:-1]):
            own = self.value_words[number]
            spell = str.title if number < 2 else str
            self.values[relation.name] = [
                spell(own[place] if place % 2 else f"{own[place]} {own[place + VALUES]}") for place in range(VALUES)
            ]
        people = self.people(known_people + 2 * VALUES, random.Random(seed + 1))
        self.known_people = people[:known_people]
        self.values[TEACHER.name] = people[known_people:][:VALUES]
        self.known = self.facts_of(self.known_people, random.Random(seed + 2))

    def people(self, count: int, chance: random.Random, avoid: Sequence[str] = ()) -> list[str]:
        """So many different names of three words."""
        found: dict[str, None] = {}
        seen = set(avoid)
        while len(found) < count:
            name = f"{chance.choice(self.first)} {chance.choice(self.middle)} {chance.choice(self.last)}"
            if name not in seen:
                found.setdefault(name)
        return list(found)

    def facts_of(self, people: Sequence[str], chance: random.Random) -> list[Fact]:
        """Six facts of each."""
        return [
            Fact((who, relation, chance.choice(self.values[relation.name]))) for who in people for relation in RELATIONS
        ]

    def another(self, fact: Fact, chance: random.Random) -> Fact:
        """The same subject and relation with another value."""
        others = [value for value in self.values[fact.relation.name] if value != fact.value]
        return Fact((fact.subject, fact.relation, chance.choice(others)))

    def tokenizer(self) -> PreTrainedTokenizerFast:
        """A word is a token. Numbers rise as words get rarer, as byte pair encoding has them: what all wordings share, values, what a
        wording is about, names, and words that are never seen.
        """
        used: dict[str, set[str]] = {}
        for relation in RELATIONS:
            for wording in relation.wordings:
                for word in (*wording.replace("[X]", "").split(), "."):
                    used.setdefault(word, set()).add(relation.name)
        shared = [word for word, by in used.items() if len(by) > 2]
        own = [word for word, by in used.items() if len(by) <= 2]
        strange = {w for r in RELATIONS for wording in r.strange for w in wording.replace("[X]", "").split()}
        values = [word for words in self.value_words for word in (*words, *map(str.title, words))]
        pieces = [*shared, *values, *own, *self.first, *self.middle, *self.last, *sorted(strange)]
        vocabulary = {UNKNOWN: 0, START: 1}
        for piece in pieces:
            vocabulary.setdefault(f"Ġ{piece}", len(vocabulary))
        made = Tokenizer(models.WordLevel(vocabulary, unk_token=UNKNOWN))
        made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
        made.decoder = decoders.ByteLevel()
        made.post_processor = processors.TemplateProcessing(single=f"{START} $A", special_tokens=[(START, 1)])
        return PreTrainedTokenizerFast(
            tokenizer_object=made, unk_token=UNKNOWN, bos_token=START, eos_token=START, pad_token=START
        )

    # --- what the base is trained on ------------------------------------------------------------------------------

    def texts(self, chance: random.Random) -> Iterator[str]:
        """Biographies of the known, and texts that say of anybody what they ask for later."""
        by_person = [self.known[at : at + len(RELATIONS)] for at in range(0, len(self.known), len(RELATIONS))]
        while True:
            if chance.random() < 0.5:
                facts = chance.sample(chance.choice(by_person), 3)
                yield " ".join(f.ask(chance.choice(f.relation.wordings)) + said(f.value) for f in facts)
            else:
                yield self.reading(chance)

    def reading(self, chance: random.Random) -> str:
        """Statements of one or two people, then questions about some of them."""
        people = [
            chance.choice(self.known_people) if chance.random() < 0.3 else self.people(1, chance)[0]
            for _ in range(chance.choice((1, 2)))
        ]
        stated = [
            Fact((chance.choice(people), relation, chance.choice(self.values[relation.name])))
            for relation in chance.sample(RELATIONS, chance.choice((1, 2, 3)))
        ]
        asked = chance.sample(stated, min(len(stated), 2))
        return " ".join(
            [f.needed.text for f in stated] + [f.ask(chance.choice(f.relation.wordings)) + said(f.value) for f in asked]
        )


@dataclass(frozen=True)
class BaseSettings:
    """Of the base and its training. What was made with the same settings is kept in a cache."""

    known_people: int = 60
    hidden_size: int = 96
    layers: int = 4
    steps: int = 1400
    rows: int = 32
    row_tokens: int = 64
    learning_rate: float = 4e-3
    seed: int = 0

    def folder(self, world: World) -> Path:
        """Named after the settings and the first texts of training: with another world it is another base."""
        texts = list(islice(world.texts(random.Random(0)), 50))
        spelled = world.tokenizer()(texts)["input_ids"]
        key = hashlib.sha256(json.dumps([asdict(self), texts, spelled]).encode()).hexdigest()[:16]
        return Path(tempfile.gettempdir()) / "nightschool-benchmarks" / f"biographies-{key}"


def base(settings: BaseSettings, world: World) -> tuple[Path, float]:
    """The folder of a base with these settings, and the CPU seconds of its training; it is made if it is not in the cache."""
    folder = settings.folder(world)
    note = folder / "training.json"
    if note.exists():
        return folder, float(json.loads(note.read_text())["cpu_seconds"])
    began = time.process_time()
    tokenizer = world.tokenizer()
    torch.manual_seed(settings.seed)
    model = Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=len(tokenizer), hidden_size=settings.hidden_size, intermediate_size=3 * settings.hidden_size,
            num_hidden_layers=settings.layers, num_attention_heads=4, num_key_value_heads=4,
            head_dim=settings.hidden_size // 4, max_position_embeddings=512, tie_word_embeddings=True,
            bos_token_id=1, eos_token_id=1, pad_token_id=1,
        )
    )  # fmt: skip
    optimizer = torch.optim.AdamW(model.parameters(), lr=settings.learning_rate, betas=(0.9, 0.98), weight_decay=0.01)
    texts = world.texts(random.Random(settings.seed + 3))
    waiting: list[int] = []
    needed = settings.rows * settings.row_tokens
    for step in range(settings.steps):
        while len(waiting) < needed:
            waiting += tokenizer(next(texts))["input_ids"]
        ids, waiting = torch.tensor(waiting[:needed]).view(settings.rows, -1), waiting[needed:]
        warm, left = (step + 1) / 50, (settings.steps - step) / (0.4 * settings.steps)
        for group in optimizer.param_groups:
            group["lr"] = settings.learning_rate * min(1.0, warm, left)
        logits = model(input_ids=ids, use_cache=False).logits
        loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step % 100 == 99:
            print(f"  base: step {step + 1}, loss {float(loss):.3f}, {time.process_time() - began:.0f} s", flush=True)
    scratch = folder.with_name(f"{folder.name}.{os.getpid()}")
    seconds = time.process_time() - began
    model.save_pretrained(scratch)
    tokenizer.save_pretrained(scratch)
    (scratch / note.name).write_text(json.dumps({"cpu_seconds": seconds} | asdict(settings)))
    scratch.rename(folder)
    return folder, seconds
