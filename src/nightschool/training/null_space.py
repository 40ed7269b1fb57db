"""Adapters that learn only in directions which the model's own general answers hardly use.

The first factor A [r, in] of each adapted linear layer is drawn from the span of those eigenvectors of the layer's inputs that carry the least
of their energy, over prompts and answers that are rehearsed, and is frozen; B [out, r] alone learns. What is added, B·A·x, is then small
for whatever resembles these inputs, and as large as it needs to be elsewhere. The null space of kept knowledge is AlphaEdit's (Fang et
al. 2024, arXiv 2410.02355), of adapters LoRA-Null's (Tang et al. 2025, arXiv 2503.02659); the frozen first factor is LoRA-FA's (Zhang et al.
2023, arXiv 2308.03303).
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor, nn

from nightschool.data.batches import Batches
from nightschool.data.chat.render import Rendered
from nightschool.errors import Damaged
from nightschool.evaluation.heldout import as_found, on_device
from nightschool.layers.forward import ForwardPath, document_logits
from nightschool.models.quiet import quiet_libraries
from nightschool.store.atomic import write_bytes

# In the folder of a run.
FILE = "null_space.safetensors"

# Of a gram whose eigenvectors are found for a measurement; it takes the third power of its size.
_TRIED_SIZE = 384

ENERGY = 0.02
"""The share of the energy of a layer's inputs that the directions may carry together."""


def first_factors(model: nn.Module) -> dict[str, nn.Parameter]:
    """A of each adapted linear layer, by the layer's name; adapters of experts have none."""
    return {
        name: cast(nn.Parameter, cast(Any, module).lora_A["default"].weight)
        for name, module in model.named_modules()
        if "default" in getattr(module, "lora_A", ()) and isinstance(cast(Any, module).get_base_layer(), nn.Linear)
    }


def freeze(model: nn.Module) -> int:
    """Have first factors learn nothing; how many there are."""
    factors = first_factors(model)
    for factor in factors.values():
        factor.requires_grad_(False)  # noqa: FBT003 - its only argument
    return len(factors)


def draw(model: nn.Module, path: ForwardPath, documents: Sequence[Rendered], seed: int) -> dict[str, Tensor]:
    """A first factor for each adapted linear layer, [r, in], rows of length 1 on average.

    Args:
        model: With the adapter.
        path: How it is run.
        seed: Of the draw.
        documents: What the directions are to be idle for; at least one. Where their inputs leave fewer than r directions with less than
            `ENERGY`, the r with the least are taken.
    """
    factors = first_factors(model)
    chance = torch.Generator().manual_seed(seed)
    drawn: dict[str, Tensor] = {}
    grams = _grams(model, path, documents, factors)
    last, basis_ki = None, torch.empty(0)
    for name in list(grams):  # layers with the same inputs follow each other, and what was used is let go
        gram_ii, r = grams.pop(name), factors[name].shape[0]
        if gram_ii is not last:
            last, basis_ki = gram_ii, _idle(gram_ii, r)
        mixed_rk = torch.randn(r, basis_ki.shape[0], generator=chance) / basis_ki.shape[0] ** 0.5
        drawn[name] = mixed_rk @ basis_ki
    return drawn


def seconds_to_draw(model: nn.Module, path: ForwardPath, document: Rendered, count: int) -> float:
    """About how long `draw` takes with so many documents: by one of them, and by a small part of what each layer's inputs become."""
    started = time.perf_counter()
    grams = _grams(model, path, [document], first_factors(model))
    looking = time.perf_counter() - started
    whole = {id(gram): gram for gram in grams.values()}.values()
    small = max(whole, key=len)[:_TRIED_SIZE, :_TRIED_SIZE]
    started = time.perf_counter()
    torch.linalg.eigh(small)
    tried = time.perf_counter() - started
    return count * looking + tried * sum((len(gram) / len(small)) ** 3 for gram in whole)


def bytes_to_draw(model: nn.Module) -> int:
    """Bytes of what `draw` holds at most: the grams of all layers, as if none shared another's, and three more while one is taken apart."""
    sizes = [4 * factor.shape[1] ** 2 for factor in first_factors(model).values()]
    return sum(sizes) + 3 * max(sizes, default=0)


def _idle(gram_ii: Tensor, r: int) -> Tensor:
    """The directions [k, in] that carry least energy: those with `ENERGY` of it together, and at least r."""
    energies, vectors = torch.linalg.eigh(gram_ii)
    shares = energies.clamp_min(0).double().cumsum(0)
    idle = max(r, int((shares < ENERGY * shares[-1]).sum()))
    basis_ki: Tensor = vectors[:, :idle].T.cpu()
    return basis_ki


def _grams(model: nn.Module, path: ForwardPath, documents: Sequence[Rendered], layers: Any) -> dict[str, Tensor]:
    """XᵀX [in, in] in fp32 of each layer's inputs; layers with the same inputs share theirs."""
    grams: dict[str, Tensor] = {}
    device = next(model.parameters()).device
    with quiet_libraries(), as_found(model), torch.no_grad(), _watched(model, layers, grams):
        for document in documents:
            document_logits(model, path, on_device(Batches([document], batch_size=1, seed=0).get(0, 0), device))
    return grams


@contextmanager
def _watched(model: nn.Module, layers: Any, grams: dict[str, Tensor]) -> Iterator[None]:
    last: list[Any] = [None, None]  # the input that was seen last, and its gram
    owners: dict[str, str] = {}  # whose gram a layer shares

    def see(name: str, x: Tensor) -> None:
        if last[0] is x:
            owners.setdefault(name, last[1])
        else:
            last[0], last[1] = x, name
            owners.setdefault(name, name)
        if owners[name] == name:
            rows = x.reshape(-1, x.shape[-1]).float()
            grams[name] = grams[name].addmm_(rows.T, rows) if name in grams else rows.T @ rows
        else:
            grams[name] = grams[owners[name]]

    def hook(name: str) -> Any:
        return lambda _, inputs: see(name, inputs[0])

    hooks = [model.get_submodule(name).register_forward_pre_hook(hook(name)) for name in layers]
    try:
        yield
    finally:
        for one in hooks:
            one.remove()


def place(model: nn.Module, drawn: dict[str, Tensor]) -> None:
    """Write drawn first factors into the model.

    Raises:
        Damaged: If they are not those of its layers.
    """
    factors = first_factors(model)
    if {n: tuple(f.shape) for n, f in factors.items()} != {n: tuple(f.shape) for n, f in drawn.items()}:
        raise Damaged(f"The directions in {FILE} are not those of this run's adapter. Start a new run.")
    with torch.no_grad():
        for name, factor in factors.items():
            factor.copy_(drawn[name])


def write(path: Path, drawn: dict[str, Tensor]) -> None:
    """Keep drawn factors, so that a run which is resumed has the same ones on any machine."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_bytes(path, save({name: factor.contiguous() for name, factor in drawn.items()}))


def read(path: Path) -> dict[str, Tensor] | None:
    """Factors that were kept; None if none were.

    Raises:
        Damaged: If the file is broken.
    """
    if not path.is_file():
        return None
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise Damaged(f"{path} cannot be read ({error}). Start a new run.") from None
