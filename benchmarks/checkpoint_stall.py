"""How long does the loop stand still for a checkpoint, and is it there if the trainer is killed the moment after?

About a gigabyte of state (weights and the two moments of Adam in fp32), saved again and again, each contestant in turn:
ours, `torch.save` with fsync, `accelerate.save_state`, and `torch.distributed.checkpoint.async_save` with a stager that is
used again. What counts is the time until the call returns while nothing else is being written. Then a trainer is killed
by SIGKILL right after its call returned, ours and DCP's, and the newest checkpoint is read.
"""

from __future__ import annotations

import logging
import multiprocessing
import os
import shutil
import signal
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from accelerate import Accelerator
from harness import Benchmark
from torch import Tensor, nn
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions

from nightschool.checkpoint_writer.client import writing_lock
from nightschool.config.recipe import Checkpoints, Keep
from nightschool.store import checkpoints
from nightschool.store.home import Home
from nightschool.store.manifest import read_manifest
from nightschool.store.runs import Run, RunStore
from nightschool.training.checkpoint.contents import CheckpointContents, sources_of
from nightschool.training.checkpoint.saver import Saver, open_saver


class Trained(nn.Module):
    """Sixteen layers of one matrix: the sizes of a model, without its arithmetic."""

    def __init__(self, num_parameters: int) -> None:
        super().__init__()
        width = int((num_parameters / 16) ** 0.5)
        self.layers = nn.ModuleList(nn.Linear(width, width, bias=False) for _ in range(16))


def new_state(num_parameters: int) -> tuple[nn.Module, torch.optim.Optimizer]:
    """A model and its AdamW after one step."""
    model = Trained(num_parameters)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return model, optimizer


def tensors_of(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, dict[str, Tensor]]:
    """The same state by names, as our checkpoints hold it."""
    named = dict(model.named_parameters())
    moments = {
        f"{key}.{name}": optimizer.state[parameter][key]
        for name, parameter in named.items()
        for key in ("exp_avg", "exp_avg_sq", "step")
    }
    return {"model": {name: p.detach() for name, p in named.items()}, "optimizer": moments}


class Ours:
    """A save as a run does it."""

    def __init__(self, folder: Path, state: dict[str, dict[str, Tensor]]) -> None:
        self.run: Run = RunStore(Home(folder).ensure()).create({"a": 1}, name="stall")
        self.state, self.step = state, 0

    def save(self, saver: Saver) -> float:
        self.step += 1
        target = checkpoints.checkpoint_path(self.run, 0, self.step, 1)
        started = time.perf_counter()
        groups = {group: sources_of(tensors) for group, tensors in self.state.items()}
        saver.save(target, CheckpointContents(groups, {}, {"step": self.step}))
        return time.perf_counter() - started


class TorchSave:
    """One file, and an fsync, without which it is not there after a power cut."""

    def __init__(self, folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        self.folder, self.model, self.optimizer = folder, model, optimizer

    def __call__(self) -> float:
        path = self.folder / "state.pt"
        path.unlink(missing_ok=True)
        started = time.perf_counter()
        with path.open("wb") as file:
            torch.save({"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()}, file)
            file.flush()
            os.fsync(file.fileno())
        return time.perf_counter() - started


class AccelerateSave:
    """`accelerate.save_state`: no fsync."""

    def __init__(self, folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        self.folder = folder / "accelerate"
        self.accelerator = Accelerator(cpu=True)
        self.accelerator.prepare(model, optimizer)

    def __call__(self) -> float:
        shutil.rmtree(self.folder, ignore_errors=True)
        started = time.perf_counter()
        self.accelerator.save_state(str(self.folder))
        return time.perf_counter() - started


class Dcp:
    """`async_save`, its staging memory used again."""

    def __init__(self, folder: Path, state: dict[str, dict[str, Tensor]]) -> None:
        self.folder, self.state = folder, state
        self.stager = DefaultStager(
            StagingOptions(
                use_pinned_memory=False,
                use_shared_memory=False,
                use_async_staging=False,
                use_non_blocking_copy=False,
            )
        )
        self.pending: Future[Any] | None = None

    def settle(self) -> None:
        if self.pending is not None:
            self.pending.result()

    def __call__(self) -> float:
        self.settle()
        path = self.folder / "dcp"
        shutil.rmtree(path, ignore_errors=True)
        started = time.perf_counter()
        self.pending = dcp.async_save(self.state, checkpoint_id=str(path), async_stager=self.stager, no_dist=True)
        seconds = time.perf_counter() - started
        self.settle()
        return seconds


def killed_after(save: Callable[[Path], None], folder: Path) -> None:
    """Run `save` in a process that ends by SIGKILL as soon as it has returned."""

    def body() -> None:
        torch.set_num_threads(1)
        save(folder)
        os.kill(os.getpid(), signal.SIGKILL)

    process = multiprocessing.get_context("fork").Process(target=body)
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL, f"the trainer ended with {process.exitcode} before it was killed"


def survives_ours(folder: Path, state: dict[str, dict[str, Tensor]]) -> bool:
    """Whether the second checkpoint, of which `save` has returned, is there and whole."""
    ours = Ours(folder, state)

    def save(_: Path) -> None:
        keep = Checkpoints(keep=Keep(last=1, best=0))
        with open_saver(ours.run, keep, lambda _: None) as saver:
            ours.save(saver)
            ours.save(saver)
            os.kill(os.getpid(), signal.SIGKILL)

    killed_after(save, folder)
    with writing_lock(ours.run, lambda _: None):
        newest = checkpoints.newest_whole(ours.run)
    return newest.checkpoint is not None and newest.checkpoint.step == 2


def survives_dcp(folder: Path, state: dict[str, dict[str, Tensor]]) -> bool:
    """Whether its checkpoint, of which `async_save` has returned, can be read."""

    def save(_: Path) -> None:
        contestant = Dcp(folder, state)
        dcp.async_save(state, checkpoint_id=str(folder / "dcp"), async_stager=contestant.stager, no_dist=True)

    killed_after(save, folder)
    time.sleep(0.5)
    found = {group: {name: torch.empty_like(t) for name, t in tensors.items()} for group, tensors in state.items()}
    try:
        dcp.load(found, checkpoint_id=str(folder / "dcp"), no_dist=True)
    except BaseException as error:  # its CheckpointException is no Exception
        if isinstance(error, KeyboardInterrupt):
            raise
        return False
    return True


def main() -> None:
    bench = Benchmark(
        "checkpoint_stall",
        "Seconds that training stands still per checkpoint, and whether it survives the trainer",
        {
            "stall_vs_torch_save": {"max": 0.15},
            "stall_vs_dcp": {"max": 1.0},
            "survived_share": {"min": 1.0},
        },
    )
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    num_parameters, rounds, kills = (20_000_000, 3, 3) if bench.quick else (83_000_000, 7, 10)
    model, optimizer = new_state(num_parameters)
    state = tensors_of(model, optimizer)
    state_bytes = sum(t.numel() * t.element_size() for group in state.values() for t in group.values())
    print(f"  state of {state_bytes / 1e9:.2f} GB, {rounds} rounds after one to warm up", flush=True)
    seconds: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        ours = Ours(folder / "home", state)
        with open_saver(ours.run, Checkpoints(keep=Keep(last=1, best=0)), lambda _: None) as saver:
            contestants: dict[str, Callable[[], float]] = {
                "ours": lambda: ours.save(saver),
                "torch.save + fsync": TorchSave(folder, model, optimizer),
                "DCP async, stager used again": Dcp(folder, state),
                "accelerate.save_state": AccelerateSave(folder, model, optimizer),
            }
            persisted = []
            for place in range(rounds + 1):
                for contestant, call in contestants.items():
                    taken = call()
                    saver.settle()
                    os.sync()
                    if place > 0:  # the first one makes the memory ready
                        seconds.setdefault(contestant, []).append(taken)
        newest = checkpoints.ls(ours.run)[-1]
        assert read_manifest(newest.path).size_bytes >= state_bytes
        persisted = [row["seconds"] for row in _saves(ours.run)][1:]
        small = {group: dict(list(tensors.items())[:4]) for group, tensors in state.items()}
        survived = sum(survives_ours(folder / f"ours{i}", small) for i in range(kills))
        dcp_survived = sum(survives_dcp(folder / f"dcp{i}", small) for i in range(kills))
    median = {contestant: statistics.median(taken) for contestant, taken in seconds.items()}
    bench.table(
        [
            (contestant, f"{value:.3f} s  ({min(seconds[contestant]):.3f} … {max(seconds[contestant]):.3f})")
            for contestant, value in median.items()
        ]
        + [
            ("ours on the disk after", f"{statistics.median(persisted):.2f} s"),
            ("there after SIGKILL", f"ours {survived} of {kills}, DCP {dcp_survived} of {kills}"),
        ]
    )
    own, peer = seconds["ours"], seconds["DCP async, stager used again"]
    bench.finish(
        {
            "stall_vs_torch_save": statistics.median(
                a / b for a, b in zip(own, seconds["torch.save + fsync"], strict=True)
            ),
            "stall_vs_dcp": statistics.median(a / b for a, b in zip(own, peer, strict=True)),
            "stall_vs_accelerate": statistics.median(
                a / b for a, b in zip(own, seconds["accelerate.save_state"], strict=True)
            ),
            "stall_seconds_per_gb": median["ours"] / (state_bytes / 1e9),
            "survived_share": survived / kills,
            "dcp_survived_share": dcp_survived / kills,
        }
    )


def _saves(run: Run) -> list[dict[str, Any]]:
    from nightschool.events import read_events

    return [row for row in read_events(run.events_path) if row["event"] == "checkpoint"]


if __name__ == "__main__":
    main()
