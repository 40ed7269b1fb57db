"""Is a damaged checkpoint found before a tensor of it is used, and is the newest whole one taken in its place?

Two checkpoints of several files each. Again and again the newer one is damaged in one place: a flipped bit, a page of
zeros, a cut file, a file of the other checkpoint in its place, a missing file. Then it is asked for: it must be refused
before any tensor is read, and a resume must take the older one and say why. The same damage is done to what `torch.save`,
`safetensors` and `torch.distributed.checkpoint` wrote, and counted is how often those load it without a word.
"""

from __future__ import annotations

import logging
import random
import shutil
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from harness import Benchmark
from safetensors.torch import load_file, save_file
from torch import Tensor

from nightschool.checkpoint_writer.commit import write_folder
from nightschool.errors import Damaged, NotFound
from nightschool.store import checkpoints
from nightschool.store.home import Home
from nightschool.store.runs import Run, RunStore
from nightschool.training.checkpoint import contents
from nightschool.training.checkpoint.contents import CheckpointContents, sources_of
from nightschool.training.checkpoint.full_state import load_weights

PAGE_BYTES = 4096
KINDS = ("flipped bit", "zeroed page", "truncated", "swapped", "missing")


def tensors_at(step: int) -> dict[str, dict[str, Tensor]]:
    """Weights and a moment, other ones at every step."""
    generator = torch.Generator().manual_seed(step)
    layers = {f"layers.{i}.weight": torch.randn(64, 256, generator=generator) for i in range(8)}
    return {"model": layers, "optimizer": {f"first_moment.{name}": t * 0.1 for name, t in layers.items()}}


def hurt(path: Path, kind: str, other: Path, chance: random.Random) -> None:
    """Damage one file; `other` is its sibling of another step."""
    content = bytearray(path.read_bytes())
    if kind == "flipped bit":
        content[chance.randrange(len(content))] ^= 1 << chance.randrange(8)
    elif kind == "zeroed page":
        if len(content) <= PAGE_BYTES:
            content[:] = bytes(len(content))
        else:
            start = chance.randrange(1, 1 + (len(content) - 1) // PAGE_BYTES) * PAGE_BYTES
            content[start : start + PAGE_BYTES] = bytes(len(content[start : start + PAGE_BYTES]))
    elif kind == "truncated":
        del content[chance.randrange(len(content)) :]
    elif kind == "swapped":
        content = bytearray(other.read_bytes())
    if kind == "missing":
        path.unlink()
    else:
        path.write_bytes(content)


class Untouchable:
    """A task that nobody may look at before the checkpoint was proven whole."""

    def __getattr__(self, name: str) -> Any:
        raise AssertionError(f"{name} was used before the damage was found")


def write_ours(run: Run, step: int) -> Path:
    target = checkpoints.checkpoint_path(run, 0, step, 1)
    groups = {group: sources_of(tensors) for group, tensors in tensors_at(step).items()}
    whole = CheckpointContents(groups, {"state.json": f'{{"step": {step}}}'}, {"step": step})
    write_folder(target, whole.facts, whole.stream)
    return target


def ours_finds(run: Run, older: Path, newer: Path) -> bool:
    """Whether it is refused by name, before use, and the older one is taken."""
    try:
        load_weights(newer, Untouchable())
    except (Damaged, NotFound):
        refused = True
    else:
        refused = False
    newest = checkpoints.newest_whole(run)
    passed_over = not (newer / "manifest.json").exists() or [s.checkpoint.path for s in newest.skipped] == [newer]
    return refused and passed_over and newest.checkpoint is not None and newest.checkpoint.path == older


def _torch_write(folder: Path, step: int) -> None:
    torch.save(tensors_at(step), folder / "state.pt")


def _torch_read(folder: Path) -> dict[str, dict[str, Tensor]]:
    return torch.load(folder / "state.pt", weights_only=True)


def _safetensors_write(folder: Path, step: int) -> None:
    for group, tensors in tensors_at(step).items():
        save_file(tensors, folder / f"{group}.safetensors")


def _safetensors_read(folder: Path) -> dict[str, dict[str, Tensor]]:
    return {group: load_file(folder / f"{group}.safetensors") for group in ("model", "optimizer")}


def _dcp_write(folder: Path, step: int) -> None:
    dcp.save(tensors_at(step), checkpoint_id=str(folder), no_dist=True)


def _dcp_read(folder: Path) -> dict[str, dict[str, Tensor]]:
    found = {group: {name: torch.empty_like(t) for name, t in g.items()} for group, g in tensors_at(0).items()}
    dcp.load(found, checkpoint_id=str(folder), no_dist=True)
    return found


PEERS: dict[str, tuple[Callable[[Path, int], None], Callable[[Path], dict[str, dict[str, Tensor]]]]] = {
    "torch.save": (_torch_write, _torch_read),
    "safetensors": (_safetensors_write, _safetensors_read),
    "DCP": (_dcp_write, _dcp_read),
}


def peer_finds(read: Callable[[Path], dict[str, dict[str, Tensor]]], folder: Path) -> bool:
    """Whether it says that something is wrong; what it loads unharmed counts as found."""
    try:
        found = read(folder)
    except BaseException as error:  # DCP's CheckpointException is no Exception
        if isinstance(error, KeyboardInterrupt):
            raise
        return True
    truth = tensors_at(2)
    return all(torch.equal(found[group][name], t) for group, tensors in truth.items() for name, t in tensors.items())


def main() -> None:
    bench = Benchmark(
        "damage",
        "Damaged checkpoints that are found before a tensor is used, and replaced by the newest whole one",
        {"found_share": {"min": 1.0}},
    )
    warnings.filterwarnings("ignore")
    logging.disable()  # DCP tells at length what it misses
    torch.set_num_threads(1)
    chance = random.Random(0)
    plan = contents.plan_files
    contents.plan_files = lambda stem, facts: plan(stem, facts, limit_bytes=200_000)  # several files in a group
    rounds = 1 if bench.quick else 10
    found: dict[str, list[bool]] = {kind: [] for kind in KINDS}
    peers: dict[str, list[bool]] = {peer: [] for peer in PEERS}
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        run = RunStore(Home(root / "home").ensure()).create({"a": 1}, name="damage")
        older, newer = write_ours(run, 1), write_ours(run, 2)
        good = shutil.copytree(newer, root / "good")
        assert checkpoints.newest_whole(run).checkpoint.path == newer, "undamaged, it is taken"
        files = sorted(path.name for path in newer.iterdir())
        for _ in range(rounds):
            for kind in KINDS:
                for file in files:
                    if kind == "swapped" and (newer / file).read_bytes() == (older / file).read_bytes():
                        continue  # the index is the same at every step
                    hurt(newer / file, kind, older / file, chance)
                    found[kind].append(ours_finds(run, older, newer))
                    shutil.rmtree(newer)
                    shutil.copytree(good, newer)
        for peer, (write, read) in PEERS.items():
            folders = {step: root / f"{peer}{step}" for step in (1, 2)}
            for step, folder in folders.items():
                folder.mkdir()
                write(folder, step)
            good_peer = shutil.copytree(folders[2], root / f"{peer}-good")
            for _ in range(rounds):
                for kind in KINDS:
                    for path in sorted(path for path in folders[2].iterdir() if path.is_file()):
                        hurt(path, kind, folders[1] / path.name, chance)
                        peers[peer].append(peer_finds(read, folders[2]))
                        shutil.rmtree(folders[2])
                        shutil.copytree(good_peer, folders[2])
    bench.table(
        [(kind, f"{sum(hits)} of {len(hits)} found, the older one taken") for kind, hits in found.items()]
        + [(peer, f"{sum(hits)} of {len(hits)} found or harmless") for peer, hits in peers.items()]
    )
    everything = [hit for hits in found.values() for hit in hits]
    bench.finish(
        {
            "found_share": sum(everything) / len(everything),
            "damages": len(everything),
            **{f"{peer.lower().replace('.', '_')}_found_share": sum(hits) / len(hits) for peer, hits in peers.items()},
        }
    )


if __name__ == "__main__":
    main()
