"""A method needs two verbs: here is one whose gradients and moments never lie where the model does."""

import numpy as np
import pytest
import torch

from nightschool.checkpoint_writer.commit import write_folder
from nightschool.data.batches import Batches
from nightschool.errors import StateMismatch
from nightschool.training.checkpoint import full_state
from nightschool.training.checkpoint.checkpoint_reader import check_tensors
from nightschool.training.checkpoint.contents import CheckpointContents, TensorSource
from nightschool.training.distributed.world import ALONE
from nightschool.training.loop import fit
from nightschool.training.optimizer import Schedule
from nightschool.training.state import Budget, TrainState
from tests.support.training_setups import VOCAB_SIZE, deterministic_threads, make_task, random_documents

CONTEXT = full_state.CheckpointContext("base: x\n", "x", None, "fp32", 1, 1, 1, {}, {})
SCHEDULE = Schedule(0.05, 6, "constant")


@pytest.fixture(autouse=True)
def _deterministic():
    with deterministic_threads():
        yield


class StreamedTask:
    """SGD with momentum over bigrams: a table of logits in a file, of which one row at a time is in memory.

    Each row sees the whole window at once, its gradient goes to a file as well, and the factor of clipping is applied
    only when `update` comes to the row.
    """

    is_sharded = False
    device = torch.device("cpu")

    def __init__(self, folder, batches):
        folder.mkdir(parents=True, exist_ok=True)
        self.model = torch.nn.Module()
        self.batches = batches
        shape = (VOCAB_SIZE, VOCAB_SIZE)
        self.table, self.gradient, self.moment = (
            np.memmap(folder / f"{name}.bin", np.float32, "w+", shape=shape) for name in ("table", "gradient", "moment")
        )
        self.reads = []

    fingerprint = property(lambda self: self.batches.fingerprint)
    stride = 1

    def epoch_length(self, epoch):
        return self.batches.num_batches(epoch)

    def batch(self, epoch, place):
        return self.batches.get(epoch, place)

    def where(self, epoch, place):
        return f"{epoch}, {place}"

    def figures(self):
        return {}

    def accumulate(self, window, tokens, scaler=None):
        assert scaler is None
        ids = torch.cat([batch.input_ids[0] for batch in window])
        labels = torch.cat([batch.labels[0] for batch in window])
        loss = torch.zeros(())
        for row in range(VOCAB_SIZE):
            mine = labels[(ids == row) & (labels >= 0)]
            logits = torch.from_numpy(self.table[row].copy()).requires_grad_()
            part = torch.nn.functional.cross_entropy(logits.expand(len(mine), -1), mine, reduction="sum") / tokens
            part.backward()
            self.gradient[row] = logits.grad.numpy()
            loss += part.detach()
        return loss

    def update(self, rate, clip, scaler, world):
        norm = float(np.sqrt(sum(float((row.astype(np.float64) ** 2).sum()) for row in self.gradient)))
        factor = min(1.0, clip / norm) if clip else 1.0
        for row in range(VOCAB_SIZE):
            self.moment[row] = 0.9 * self.moment[row] + factor * self.gradient[row]
            self.table[row] -= rate * self.moment[row]
        self.gradient[:] = 0
        return torch.tensor(norm)

    def _source(self, name, array):
        def read():
            self.reads.append(name)
            return torch.from_numpy(np.array(array))

        return TensorSource(name, array.shape, torch.float32, read)

    def weights(self):
        return [self._source("table", self.table)]

    def optimizer_state(self):
        return [self._source("moment", self.moment)]

    def optimizer_facts(self):
        return {"hyper_parameters": {"algorithm": "momentum"}}

    def expected_bytes(self):
        return self.table.nbytes + self.moment.nbytes

    def load_state(self, weights, optimizer, facts, where):
        expected = torch.empty(self.table.shape, device="meta")
        check_tensors(optimizer, {"moment": expected}, what=f"moments of {where}")
        self.load_weights(weights, where)
        self.moment[:] = optimizer["moment"].numpy()

    def load_weights(self, weights, where):
        check_tensors(weights, {"table": torch.empty(self.table.shape, device="meta")}, what=f"weights of {where}")
        self.table[:] = weights["table"].numpy()


def train(task, steps, folder, *, state=None):
    def save(now, reason):
        contents = full_state.state_to_save(task, now, CONTEXT, SCHEDULE, reason=reason)
        write_folder(folder / f"checkpoint-{now.step}", contents.facts, contents.stream)

    return fit(
        task,
        state or TrainState(task.fingerprint),
        Budget(steps, accumulation_steps=2, max_grad_norm=0.1),
        schedule=SCHEDULE,
        metrics=None,
        save=save,
    )


def new_task(folder):
    return StreamedTask(folder, Batches(random_documents(40), batch_size=4, seed=1))


def test_a_task_of_two_verbs_whose_state_lies_on_disk_trains_saves_and_resumes(tmp_path):
    straight = new_task(tmp_path / "straight")
    state = train(straight, 6, tmp_path / "straight")
    assert state.loss_history[-1] < state.loss_history[0]

    first = new_task(tmp_path / "first")
    train(first, 3, tmp_path / "parts")
    assert sorted(first.reads) == ["moment", "table"]  # once each, when the file had come to them
    second = new_task(tmp_path / "second")
    resumed = full_state.load(tmp_path / "parts" / "checkpoint-3", second, CONTEXT, SCHEDULE)
    assert resumed.step == 3
    train(second, 6, tmp_path / "second", state=resumed)
    assert np.array_equal(straight.table, second.table)
    assert np.array_equal(straight.moment, second.moment)
    assert state.loss_history == resumed.loss_history


def test_a_checkpoint_of_another_optimizer_is_refused(tmp_path):
    train(new_task(tmp_path / "one"), 3, tmp_path)
    other = new_task(tmp_path / "other")
    other.optimizer_facts = lambda: {"hyper_parameters": {"algorithm": "sgd"}}
    with pytest.raises(StateMismatch, match=r"optimizer algorithm .checkpoint: momentum, run: sgd"):
        full_state.load(tmp_path / "checkpoint-3", other, CONTEXT, SCHEDULE)


def test_a_window_in_one_call_is_the_sum_of_its_micro_batches():
    whole, parts = make_task(), make_task()
    window = [whole.batch(0, place) for place in range(3)]
    tokens = sum(batch.tokens_trained for batch in window)
    loss = whole.accumulate(window, tokens)
    assert float(loss) == pytest.approx(sum(float(parts.accumulate([batch], tokens)) for batch in window), rel=1e-6)
    norms = [task.update(1e-2, 1.0, None, ALONE) for task in (whole, parts)]
    assert torch.equal(*norms)
    assert all(torch.equal(p, parts.trainable()[name]) for name, p in whole.trainable().items())
    assert all(p.grad is None for p in whole.trainable().values())


def test_gradients_that_were_only_looked_at_can_be_dropped():
    task = make_task()
    task.accumulate([task.batch(0, 0)], 1)
    assert any(p.grad is not None for p in task.trainable().values())
    task.discard_gradients()
    assert all(p.grad is None for p in task.trainable().values())


def test_a_source_that_is_another_tensor_by_now_is_never_written():
    source = TensorSource("a", (2, 3), torch.float32, lambda: torch.zeros(3, 2))
    contents = CheckpointContents({"model": [source]}, {}, {"step": 1})
    with pytest.raises(AssertionError, match="a is another tensor now"):
        [list(pieces) for _, pieces in contents.stream()]
