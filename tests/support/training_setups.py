"""Small tasks and runs for the tests of training: a few random documents, every architecture, full and LoRA."""

import itertools
import os
from contextlib import contextmanager

import torch

from nightschool.config.recipe import Lora, Train
from nightschool.data.batches import Batches
from nightschool.data.chat.render import Rendered
from nightschool.errors import Interrupted
from nightschool.models.adapters import attach_lora
from nightschool.models.build import build_model
from nightschool.training.checkpoint import full_state, rng
from nightschool.training.loop import Budget, fit
from nightschool.training.methods.finetune import FinetuneTask
from nightschool.training.metrics import MetricsLog
from nightschool.training.optimizer import Schedule
from nightschool.training.state import TrainState
from nightschool.work.stop import Stop

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


class MiniRun:
    """One interruptible run in a folder: 2 epochs of 5 steps, checkpoints where they are wanted."""

    def __init__(self, folder, architecture="tiny-qwen3", *, lora=None, accumulation_steps=2, steps_total=10, **train):
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self.architecture, self.lora, self.train = architecture, lora, train
        self.budget = Budget(steps_total, accumulation_steps=accumulation_steps)
        self.schedule = Schedule(1e-2, steps_total, warmup_steps=2)
        self.task = self.state = None
        self.saved = []

    def new_task(self):
        rng.seed_everything(3)
        self.task = make_task(self.architecture, lora=self.lora, **self.train)
        return self.task

    def context(self, **changes):
        fingerprint = full_state.frozen_fingerprint(self.task.model) if self.lora else None
        plain = {
            "recipe_yaml": "base: x\n",
            "base": "x",
            "base_fingerprint": fingerprint,
            "dtype": "fp32",
            "num_threads": 1,
            "epochs_total": 2,
            "files_processed": 1,
            "model_config": {},
            "numerics": {"train.accumulation_steps": self.budget.accumulation_steps},
        }
        return full_state.CheckpointContext(**(plain | changes))

    def save(self, state):
        target = self.folder / f"checkpoint-{state.step}"
        full_state.save(target, self.task, state, self.context(), self.schedule)
        self.saved.append(target)

    def go(self, *, stop_after=None, resume=None):
        """Train to the end, or until a stop is asked for during the step after `stop_after` steps."""
        self.new_task()
        self.state = TrainState(self.task.fingerprint)
        if resume is not None:
            self.state = full_state.load(resume, self.task, self.context(), self.schedule)
        held_out = Batches(random_documents(6, seed=9), batch_size=3, seed=0)
        metrics = MetricsLog(self.folder / "metrics.jsonl", resumed_step=self.state.step)
        try:
            fit(
                self.task,
                self.state,
                self.budget,
                schedule=self.schedule,
                metrics=metrics,
                evaluate=lambda: self.task.heldout_loss(held_out)[0],
                save=self.save,
                stop=StopAfter(self.task, stop_after),
            )
        except Interrupted:
            assert stop_after is not None
        finally:
            metrics.close()
        return self


class StopAfter(Stop):
    """Asks for a stop while the step after `steps` finished ones is computed."""

    def __init__(self, task, steps):
        super().__init__()
        if steps is not None:
            counter, update = itertools.count(1), task.update

            def counted(*arguments):
                if next(counter) == steps:
                    self.reason = "SIGTERM"
                return update(*arguments)

            task.update = counted


def differing(a, b):
    """Names whose tensors are not equal bit by bit."""
    assert a.keys() == b.keys()
    return [name for name in a if not torch.equal(a[name], b[name])]
