"""Several processes that train one model: who they are, and the few things that they tell each other.

Every process holds the whole model and takes its portion of each global micro-batch. A part of the loss is divided by the
tokens trained of all processes, so summed gradients are the gradient of the whole window, as if one process had computed
it. Process 0 writes the log, the metrics and the checkpoints, but for the parts of tensors that they share (`sharding`).

The processes are started by `torchrun`, `accelerate launch` or by a run with `train.num_processes`; all of them set the
same variables: RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, MASTER_PORT.
"""

from __future__ import annotations

import os
import socket
import subprocess
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.rendezvous import rendezvous

from nightschool.data.shards.token_batches import Portion
from nightschool.errors import Interrupted, NightschoolError, UsageError
from nightschool.store.home import Home
from nightschool.store.runs import Run
from nightschool.training.distributed.last_words import Board, LastWords
from nightschool.work.processes import command

Value = TypeVar("Value")


class OthersGone(RuntimeError):
    """Something that all processes do together found one missing. Nothing was changed by it."""


# Gradients are summed in pieces of this size: one message for each tensor would cost its delay thousands of times.
_BUCKET_BYTES = 64 << 20
# Process 0 reads, tokenizes and plans first, while the others wait for it.
_LONGEST_WAIT = timedelta(hours=2)
# One that ended before it met the others is not waited for that long.
_LONGEST_START = timedelta(minutes=5)
_FAREWELL_SECONDS = 30.0


@dataclass(frozen=True)
class World:
    """One of `size` processes. Alone, everything here returns at once."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1
    board: Board | None = None

    @property
    def is_first(self) -> bool:
        """Whether this process writes for all."""
        return self.rank == 0

    @property
    def portion(self) -> Portion:
        """Which part of a global micro-batch this process takes."""
        return Portion(self.rank, self.size)

    def sums(self, *numbers: int) -> tuple[int, ...]:
        """Each number, summed over all processes."""
        if self.size == 1:
            return numbers
        return tuple(int(value) for value in self._reduced(numbers, dist.ReduceOp.SUM))

    def any(self, *flags: bool) -> tuple[bool, ...]:
        """For each flag, whether it is set in one of the processes."""
        if self.size == 1:
            return flags
        return tuple(bool(value) for value in self._reduced([int(flag) for flag in flags], dist.ReduceOp.MAX))

    def float_sums(self, *numbers: float) -> tuple[float, ...]:
        """Each number, summed over all processes in fp64."""
        if self.size == 1:
            return numbers
        tensor = torch.tensor(numbers, dtype=torch.float64)
        with _together():
            dist.all_reduce(tensor)
        return tuple(tensor.tolist())

    def from_first(self, value: Value) -> Value:
        """What process 0 has, in all of them. A plain value, not a tensor."""
        if self.size == 1:
            return value
        box: list[Any] = [value]
        with _together():
            dist.broadcast_object_list(box, src=0)
        chosen: Value = box[0]
        return chosen

    def gathered(self, value: Value) -> list[Value]:
        """What each process has, in the order of ranks; an empty list in all but process 0."""
        if self.size == 1:
            return [value]
        boxes: list[Any] | None = [None] * self.size if self.is_first else None
        with _together():
            dist.gather_object(value, boxes, dst=0)
        return boxes or []

    def add_up(self, tensors: Sequence[Tensor]) -> None:
        """Sum each tensor over all processes, in place."""
        if self.size == 1:
            return
        for bucket in _buckets(tensors):
            flat = torch.cat([tensor.reshape(-1) for tensor in bucket])
            with _together():
                dist.all_reduce(flat)
            pieces = torch.split(flat, [tensor.numel() for tensor in bucket])
            torch._foreach_copy_(
                list(bucket), [piece.view_as(tensor) for piece, tensor in zip(pieces, bucket, strict=True)]
            )

    @contextmanager
    def first_goes_first(self) -> Iterator[None]:
        """A block that process 0 goes through before the others: what it leaves on disk they find."""
        if not self.is_first:
            self.wait()
        yield
        if self.is_first:
            self.wait()

    def wait(self) -> None:
        """Wait until all processes are here."""
        if self.size > 1:
            self.sums(0)

    @contextmanager
    def telling(self) -> Iterator[None]:
        """A block whose error ends this process: the others are told which."""
        try:
            yield
        except Interrupted:  # which all agreed upon
            raise
        except Exception as error:
            self.leave(LastWords(self.rank, said_of(error)))
            raise

    def leave(self, words: LastWords) -> None:
        """Say what ends this process, unless it was said, and wake the others, who wait for it. Nothing is done together afterwards."""
        if self.board is None or self.board.has_spoken:
            return
        self.board.write(words)
        dist.destroy_process_group()

    def _reduced(self, numbers: Sequence[int], operation: Any) -> list[int]:
        tensor = torch.tensor(numbers, dtype=torch.int64)
        with _together():
            dist.all_reduce(tensor, op=operation)
        values: list[int] = tensor.tolist()
        return values


ALONE = World()


@contextmanager
def joined_world(environment: Mapping[str, str] | None = None) -> Iterator[World]:
    """Join the others that the environment names; alone if it names none.

    Raises:
        UsageError: If the variables contradict each other.
        NightschoolError: If one of the others did not begin.
    """
    environment = os.environ if environment is None else environment
    size = int(environment.get("WORLD_SIZE", "1"))
    if size == 1:
        yield ALONE
        return
    missing = [name for name in ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT") if name not in environment]
    if missing:
        raise UsageError(
            f"WORLD_SIZE is {size}, but {', '.join(missing)} is not set. Start the processes with torchrun, or leave "
            "WORLD_SIZE out."
        )
    world = World(
        int(environment["RANK"]),
        size,
        int(environment["LOCAL_RANK"]),
        int(environment.get("LOCAL_WORLD_SIZE", "1")),
    )
    backend = "gloo"
    # Processes that train on the CPU may be more than there are GPUs.
    if torch.cuda.is_available() and world.local_size <= torch.cuda.device_count():
        torch.cuda.set_device(world.local_rank)
        backend = "cpu:gloo,cuda:nccl"
    try:
        store, rank, size = next(rendezvous("env://", timeout=_LONGEST_START))
    except dist.DistStoreError as error:
        raise NightschoolError(
            f"Not all of the {size} processes began within {_LONGEST_START.total_seconds():.0f} seconds ({error}). "
            "See log-rank1.txt and so on in the run's folder, or what torchrun printed, and start them again."
        ) from None
    store.set_timeout(_LONGEST_WAIT)
    world = replace(world, board=Board(store, rank, size))
    dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=_LONGEST_WAIT)
    try:
        yield world
    finally:
        if dist.is_initialized():  # nobody has left it before
            dist.destroy_process_group()


def log_of(run: Run, rank: int) -> Path:
    """Where a process other than the first one writes what it has to say."""
    return run.path / f"log-rank{rank}.txt"


@contextmanager
def started_ranks(home: Home, run: Run, root: Path, count: int) -> Iterator[Mapping[str, str]]:
    """Start the processes 1 … `count` - 1 of the run on this machine; yields the variables that make this one process 0.

    They end by themselves when process 0 is done or gone; what is left of them at the end is killed.
    """
    if count == 1:
        yield os.environ
        return
    shared = {
        "WORLD_SIZE": str(count),
        "LOCAL_WORLD_SIZE": str(count),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(_free_port()),
    }
    with ExitStack() as stack:
        for rank in range(1, count):
            log = stack.enter_context(log_of(run, rank).open("ab"))
            process = subprocess.Popen(
                command("train", "--home", str(home.path), "--root", str(root)),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env={**os.environ, **shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            )
            stack.callback(_say_farewell, process)
        # torch reads them from the environment of the process.
        os.environ.update(shared | {"RANK": "0", "LOCAL_RANK": "0"})
        try:
            yield os.environ
        finally:
            for name in (*shared, "RANK", "LOCAL_RANK"):
                os.environ.pop(name, None)


def is_about_others(error: RuntimeError) -> bool:
    """Whether another process is gone: then what torch raises comes out of the operation that all of them share."""
    if isinstance(error, dist.DistError | OthersGone):
        return True
    # gloo raises plain RuntimeErrors; where they were raised tells them apart, their words differ from release to release.
    modules = [frame.f_globals.get("__name__", "") for frame, _ in traceback.walk_tb(error.__traceback__)]
    return bool(modules) and modules[-1].startswith("torch.distributed")


def said_of(error: Exception) -> str:
    """What a process says of the error that ends it; nothing where that is about another one."""
    if isinstance(error, RuntimeError) and is_about_others(error):
        return ""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else ''}".rstrip(": ")


@contextmanager
def _together() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        if is_about_others(error):
            raise OthersGone(str(error).splitlines()[0]) from error
        raise


def _buckets(tensors: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """The tensors in runs of one dtype and at most `_BUCKET_BYTES`; a larger one is alone."""
    bucket: list[Tensor] = []
    size = 0
    for tensor in tensors:
        bytes_here = tensor.numel() * tensor.element_size()
        if bucket and (size + bytes_here > _BUCKET_BYTES or tensor.dtype != bucket[0].dtype):
            yield bucket
            bucket, size = [], 0
        bucket.append(tensor)
        size += bytes_here
    if bucket:
        yield bucket


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
    return port


def _say_farewell(process: subprocess.Popen[bytes]) -> None:
    try:
        process.wait(_FAREWELL_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
