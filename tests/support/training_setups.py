"""Small tasks and runs for the tests of training: a few random documents, every architecture, full and LoRA."""

import json
import os
import random
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from nightschool.config.recipe import Lora, Recipe, Train
from nightschool.data.batches import Batches
from nightschool.data.chat.render import Rendered
from nightschool.errors import Interrupted
from nightschool.events import read_events
from nightschool.models.adapters import attach_lora
from nightschool.models.build import build_model
from nightschool.models.export import save_version_folder
from nightschool.store.home import Home
from nightschool.store.runs import RunStore
from nightschool.training.checkpoint import rng
from nightschool.training.checkpoint.checkpoint_reader import load_group
from nightschool.training.methods.finetune import FinetuneTask
from nightschool.training.run import execute, prepare
from nightschool.training.state import TrainState
from nightschool.work.stop import Stop
from tests.support.tokenizers_for_tests import byte_tokenizer

VOCAB_SIZE = 64
# CI runs the tests that train with one thread and with two.
NUM_THREADS = int(os.environ.get("OMP_NUM_THREADS", "1"))


@contextmanager
def deterministic_threads():
    """What a run sets for its whole process, taken back at the end."""
    threads = torch.get_num_threads()
    torch.set_num_threads(NUM_THREADS)
    rng.require_determinism()
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)
        torch.set_num_threads(threads)


def random_documents(count, *, seed=0, shortest=4, longest=20):
    """Documents of random tokens; the first third of each is context."""
    generator = torch.Generator().manual_seed(seed)
    documents = []
    for _ in range(count):
        length = int(torch.randint(shortest, longest, (1,), generator=generator))
        ids = torch.randint(0, VOCAB_SIZE, (length,), generator=generator).tolist()
        weights = [0.0 if place <= length // 3 else 1.0 for place in range(length)]
        documents.append(Rendered(ids, weights, ["user" if weight == 0 else "assistant" for weight in weights]))
    return documents


def make_task(architecture="tiny-qwen3", *, lora=None, documents=None, batch_size=2, model=None, **train):
    """A task over a fresh model; the same arguments make the same task."""
    settings = Train(**({"learning_rate": 1e-2, "weight_decay": 0.1} | train))
    model = model or build_model(architecture, VOCAB_SIZE, seed=1)
    if lora is not None:
        model = attach_lora(model, lora, seed=2)
    batches = Batches(documents or random_documents(20), batch_size=batch_size, seed=settings.seed)
    return FinetuneTask(model, batches, settings)


LORA = Lora(r=4, alpha=8, dropout=0.2)


def lora_for(architecture):
    """LoRA with dropout where it can be: adapters of experts have none."""
    return LORA.model_copy(update={"dropout": 0.0}) if architecture in ("tiny-qwen3-moe", "tiny-mixtral") else LORA


_bases = TemporaryDirectory()


@cache
def base_folder(architecture):
    """A folder with a base of random weights, made once."""
    folder = Path(_bases.name) / architecture
    tokenizer = byte_tokenizer()
    save_version_folder(build_model(architecture, len(tokenizer), seed=1), tokenizer, folder)
    return folder


def random_rows(count, *, seed=0):
    chance = random.Random(seed)
    letters = [["".join(chance.choices("abcdefgh ", k=chance.randint(2, 9))) for _ in range(2)] for _ in range(count)]
    return [{"query": f"q{number}{ask}", "retrieved": f"r{answer}"} for number, (ask, answer) in enumerate(letters)]


def random_pairs(count, *, seed=0):
    """Preference pairs of random letters."""
    answers = zip(random_rows(count, seed=seed), random_rows(count, seed=seed + 1), strict=True)
    return [{"prompt": a["query"], "chosen": a["retrieved"], "rejected": f"{b['retrieved']} no"} for a, b in answers]


class MiniRun:
    """One interruptible run of a home in a folder: 2 epochs of 5 steps, as a process of `nightschool train` executes it."""

    def __init__(
        self,
        folder,
        architecture="tiny-qwen3",
        *,
        lora=None,
        home=None,
        base=None,
        rows=None,
        held_out=None,
        steps_total=10,
        recipe=None,
        **train,
    ):
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self.home = home or Home(folder / "home").ensure()
        (folder / "data.json").write_text(json.dumps(rows or random_rows(20)))
        (folder / "held_out.json").write_text(json.dumps(held_out or random_rows(6, seed=9)))
        settings = {
            "learning_rate": 1e-2,
            "weight_decay": 0.1,
            "warmup_steps": 2,
            "epochs": 2,
            "max_steps": steps_total,
        }
        settings |= {"batch_size": 2, "accumulation_steps": 2, "dtype": "fp32", "num_threads": NUM_THREADS}
        plain = {
            "name": folder.name.strip("_"),
            "base": base or str(base_folder(architecture)),
            "method": "full" if lora is None else "lora",
            "data": [{"path": "data.json"}],
            "held_out": {"path": "held_out.json"},
            "train": settings | train,
            "checkpoints": {"background": False, "keep": {"last": 9}},
        }
        plain |= ({} if lora is None else {"lora": lora.model_dump()}) | (recipe or {})
        recipe = Recipe.model_validate(plain)
        known = folder / "run"
        if not known.exists():
            known.write_text(RunStore(self.home).create(recipe.as_plain(), name=recipe.name).id)
        self.run = RunStore(self.home).get(known.read_text())
        self.saved = []

    def prepared(self):
        """The run before its first step."""
        return prepare(self.home, self.run, root=self.folder, point=None)

    def go(self, *, stop_after=None, resume=None):
        """Train to the end, or for `stop_after` steps; `saved` are then the checkpoints that it wrote."""
        before = len(list(read_events(self.run.events.path)))
        name = None if resume is None else resume.name
        try:
            execute(self.home, self.run, resume=name, root=self.folder, stop=Stop(), steps=stop_after)
        except Interrupted:
            assert stop_after is not None
        finally:
            written = list(read_events(self.run.events.path))[before:]
            names = [event["name"] for event in written if event["event"] == "saving"]
            self.saved = [path for name in names if (path := self.run.checkpoints_path / name).is_dir()]
        return self

    @property
    def state(self):
        """Where the run was when it saved last."""
        return TrainState.from_json(json.loads((self.saved[-1] / "state.json").read_text())["train"])

    @property
    def weights(self):
        """What it saved last."""
        return load_group(self.saved[-1], "model")


def differing(a, b):
    """Names whose tensors are not equal bit by bit."""
    assert a.keys() == b.keys()
    return [name for name in a if not torch.equal(a[name], b[name])]
