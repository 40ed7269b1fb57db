"""Which data a run studies: what is new, what is replayed, what is held out.

Selected once, by whoever begins the run, and written into its folder: training, its resume, the gate and later nights
read it from there. So what is trained is what was fingerprinted, whatever happens to the sources meanwhile.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from operator import attrgetter
from pathlib import Path

from nightschool.config.recipe import Recipe
from nightschool.data.example import CONVERSATIONS, Example
from nightschool.data.shards.shard_sources import shards_state
from nightschool.data.sources.load import Loaded, split_held_out, without_duplicates
from nightschool.data.sources.problems import Problems
from nightschool.data.study.forms import Form, make_forms, trained_forms
from nightschool.errors import DataError
from nightschool.feedback.adopted_facts import HELD_NOWHERE, InMemories
from nightschool.feedback.contradictions import Contradiction, without_contradictions
from nightschool.feedback.novelty import novelty_for
from nightschool.feedback.pins import Pins
from nightschool.feedback.rejected_forms import RejectedForms
from nightschool.feedback.replay import replayed_and_general
from nightschool.feedback.replay_pool import AcceptedExamples
from nightschool.feedback.tonight import for_tonight, studied_in_forms
from nightschool.feedback.training_data import load_sources
from nightschool.store.home import Home

SHOWN_FIRST = 3


@dataclass(frozen=True)
class Selection:
    """The data of a run: examples, or token shards, of which only the state is known here.

    `num_all` examples stand in the sources, and `num_new` of those to be trained are new to the base. Where none is,
    `new` holds all of them all the same, to be studied again. `num_left_out` were left out of `new`: the base has learned
    them, or they were corrected. `num_waiting` new facts are for later nights. `contradictions` are what was new and is answered in different ways, of which `new` holds what is
    trained. `num_held` were left out of `new` because memories hold them. `forms` are what is new in other forms, which are trained with it. `general` is studied besides, and is neither asked
    about nor accepted. `shards` changes when the shards do.
    """

    new: list[Example] = field(default_factory=list)
    replayed: list[Example] = field(default_factory=list)
    held_out: list[Example] = field(default_factory=list)
    num_all: int = 0
    num_new: int = 0
    num_left_out: int = 0
    num_duplicates: int = 0
    formats: dict[str, list[str]] = field(default_factory=dict)
    shards: str | None = None
    general: list[Example] = field(default_factory=list)
    forms: list[Form] = field(default_factory=list)
    contradictions: list[Contradiction] = field(default_factory=list)
    num_waiting: int = 0
    num_held: int = 0

    @property
    def train(self) -> list[Example]:
        """What one epoch is made of: new examples and their forms as often as their source says, all others once."""
        new = [example for example in self.new for _ in range(example.repeat)]
        return [*new, *trained_forms(self.forms), *self.replayed, *self.general]

    @property
    def num_files(self) -> int:
        """How many files the new examples came from."""
        return len({example.source for example in self.new})

    @property
    def fingerprint(self) -> str:
        """A digest of all that is trained, in whatever order it stands in the sources."""
        again = sorted(one.digest for one in [*self.replayed, *self.general])
        trained = [sorted([one.digest, one.repeat] for one in self.new), again]
        if self.forms:
            trained.append(sorted([form.example.digest, form.of, str(form.kept_aside)] for form in self.forms))
        return digest_of([*trained, self.shards])


def select(recipe: Recipe, home: Home, root: Path, memories: InMemories = HELD_NOWHERE) -> Selection:
    """Select what a run of this recipe studies; its `base` is what the run starts from, and `memories` what need not be learned.

    Raises:
        DataError: If a source cannot be read.
        NotFound: If a source is not there.
    """
    return DATA_PLANS[recipe.method].select(recipe, home, root, memories)


def select_shards(recipe: Recipe, _home: Home, root: Path, _memories: InMemories = HELD_NOWHERE) -> Selection:
    """The token shards of a recipe, by their state; they are read when they are trained.

    Raises:
        DataError: If the recipe names none.
        NotFound: If they are not there.
    """
    place = recipe.data[0].path
    if place is None:
        raise DataError("method: pretrain learns from token shards. Write data: [{path: shards/}].")
    return Selection(shards=shards_state(place, root=root, max_files=recipe.pretrain.max_files))


def select_examples(recipe: Recipe, home: Home, root: Path, memories: InMemories = HELD_NOWHERE) -> Selection:
    """Read the sources, hold some examples out, drop what the base has learned, and add replay.

    What accepted versions have learned is new to a base that is none of them. If nothing is new, everything is studied
    again: whoever started the run wanted one.

    Raises:
        DataError: If a source cannot be read.
    """
    loaded = load_sources(recipe.data, root=root, home=home, name=recipe.name, base=recipe.base)
    return select_loaded(loaded, recipe, home, root, memories)


def select_loaded(
    loaded: Loaded, recipe: Recipe, home: Home, root: Path, memories: InMemories = HELD_NOWHERE
) -> Selection:
    """As `select_examples`, from sources that were read already."""
    accepted, plan = AcceptedExamples(home.database), DATA_PLANS[recipe.method]
    examples, num_alike = plan.read(loaded.examples)
    split = split_held_out(
        examples,
        recipe.held_out,
        root=root,
        trained={*accepted.trained(recipe.name), *loaded.parted},
        read=lambda kept: plan.read(kept)[0],
    )
    held_out = split.held_out
    if recipe.held_out.path is None:
        held_out = without_duplicates([*held_out, *plan.read(loaded.held_out)[0]])[0]
    memories = memories if plan.studies else HELD_NOWHERE
    trained = memories.without_held(split.train)
    novelty = novelty_for(accepted, home, recipe.name, recipe.base, trained, unlearned=memories.taken_back)
    new, contradictions = _chosen(recipe, home, novelty.new or novelty.all)
    if recipe.study.write in ("auto", "off"):
        num_waiting = 0
    else:
        new, num_waiting = for_tonight(new, recipe.study.facts_per_night)
    out = [*held_out, *loaded.held_out]
    forms = _forms(recipe, home, new, [*new, *out])
    num_forms = sum(not form.kept_aside for form in forms)
    replayed, general = replayed_and_general(
        recipe,
        plan,
        accepted,
        root,
        new=new,
        num_trained=len(new) + num_forms,
        held_out=out,
        held=memories.held,
        forms_of=lambda examples: _forms(recipe, home, examples, [*new, *out]),
    )
    return Selection(
        new=new,
        replayed=replayed,
        held_out=held_out,
        num_all=len(examples),
        num_new=len(new) if novelty.new else 0,
        num_left_out=len(trained) - len(new) - num_waiting - sum(one.num_untrained for one in contradictions),
        num_duplicates=loaded.duplicates + num_alike,
        formats={report.source: sorted(report.formats) for report in loaded.sources},
        general=general,
        forms=forms,
        contradictions=contradictions,
        num_waiting=num_waiting,
        num_held=len(split.train) - len(trained),
    )


def _chosen(recipe: Recipe, home: Home, new: list[Example]) -> tuple[list[Example], list[Contradiction]]:
    """What of new examples is trained, as none contradicts another or a pin of which the gate would ask."""
    if not DATA_PLANS[recipe.method].studies:
        return new, []
    pins = Pins(home.database).ls(recipe.name) if recipe.gate.pins == "all" else []
    return without_contradictions(new, recipe.study.contradictions, pins)


def _forms(recipe: Recipe, home: Home, examples: Sequence[Example], never: Sequence[Example]) -> list[Form]:
    """Examples in other forms, as the recipe wants it, and none in the wording of those in `never`."""
    studied = studied_in_forms(recipe, examples) if DATA_PLANS[recipe.method].studies else []
    if not studied:
        return []
    rejected = RejectedForms(home.database).wordings(recipe.name)
    return make_forms(studied, recipe.study.forms, recipe.train.seed, never=never, rejected=rejected)


@dataclass(frozen=True)
class DataPlan:
    """What a method does with data, as far as it needs no tensors. The other half of a method is in `training.methods`.

    `select` finds the data of a run. `continues` says whether the next night starts from the champion, and `adapter`
    whether what is trained is one. `studies` says whether questions and answers are learned as facts. `learns` says what is learned of an example, or that this method cannot learn it, and
    `refusal` why.
    """

    select: Callable[[Recipe, Home, Path, InMemories], Selection]
    continues: bool = True
    adapter: bool = False
    studies: bool = True
    learns: Callable[[Example], Example | None] = attrgetter("answered")
    refusal: str = (
        "this row says which facts a question means, and has no answer to learn. Only method: memory with memory.stage: router learns "
        "from such labels."
    )

    def read(self, examples: Iterable[Example]) -> tuple[list[Example], int]:
        """What is learned of the examples of a source, without duplicates, and how many were alike.

        A kept conversation of which nothing can be learned is left out.

        Raises:
            DataError: If a row of a file is not what the method learns from: the first twenty, together.
        """
        problems, found = Problems(), []
        for example in examples:
            learned = self.learns(example)
            if learned is not None:
                found.append(learned)
            elif example.source != CONVERSATIONS:
                problems.add(f"{example.source}:{example.line}: {self.refusal}")
        problems.check()
        return without_duplicates(found)


DATA_PLANS: Mapping[str, DataPlan] = {
    "full": DataPlan(select_examples),
    "lora": DataPlan(select_examples, adapter=True),
    "qlora": DataPlan(select_examples, adapter=True),
    "dpo": DataPlan(
        select_examples,
        adapter=True,
        studies=False,
        learns=Example.as_pair,
        refusal="this is no preference pair, and method: dpo learns from pairs. Write prompt, chosen and rejected, or take another "
        "method.",
    ),
    "memory": DataPlan(select_examples, continues=False, studies=False, learns=attrgetter("chosen")),
    "pretrain": DataPlan(select_shards, continues=False, studies=False),
}


def sample_of(whole: Selection, num_examples: int, *, seed: int) -> Selection:
    """About `num_examples` of what is trained, and as large a share of what is held out; all of it where it is less.

    Each list keeps its order and its first examples, and the same seed chooses the same ones.
    """
    share = num_examples / max(1, len(whole.train))
    if share >= 1:
        return whole
    chooser = random.Random(seed)

    def sampled(examples: list[Example]) -> list[Example]:
        wanted = round(share * len(examples))
        first = min(SHOWN_FIRST, wanted)
        chosen = sorted(chooser.sample(range(first, len(examples)), wanted - first))
        return [examples[index] for index in (*range(first), *chosen)]

    new = sampled(whole.new)
    digests = {example.digest for example in new}
    return replace(
        whole,
        new=new,
        forms=[form for form in whole.forms if form.of in digests],
        replayed=sampled(whole.replayed),
        general=sampled(whole.general),
        held_out=sampled(whole.held_out),
    )


def digest_of(facts: object) -> str:
    """A short digest of plain values."""
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:32]
