"""The two heads that read what a text is about and what it says of that, over frozen token embeddings.

Of tokens t with features h_t, `h_t = (E_t - mean) / |E_t - mean|`, a head with attention `a` [H] and projection `W` [half, H] gives

    e = normalise(W · Σ_t softmax_t(a·h_t + log prior_t) h_t),      W = fixed + b·a_low

`fixed` is the identity where half = H, else rows that are orthonormal; `b` [half, rank] · `a_low` [rank, H] is what training adds.
Untrained, `a` = 0 and `b` = 0, and both heads are the same mean, weighted by how rare tokens are. `prior_t` needs no corpus: byte
pair encoding numbers tokens by how common they are.

The same numbers, in safetensors, come from training: `subject.attention` [H], `subject.projection.a` [rank, H],
`subject.projection.b` [half, rank], the same of `relation`, and in the metadata `encoder`, `knowledge_dim`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError, safe_open

from nightschool.errors import ModelError, NotFound

Floats = npt.NDArray[np.float32]

HEADS = ("subject", "relation")
# Tokens below this number are as common as any; see `token_priors`.
_COMMON = 100.0
_SMALLEST = 1e-12


def token_priors(vocab_size: int) -> Floats:
    """How much each token counts before training, [V]: log(1 + number / 100)², and never nothing."""
    priors: Floats = (np.log1p(np.arange(vocab_size) / _COMMON) ** 2 + 1e-4).astype(np.float32)
    return priors


def fixed_projection(hidden_size: int, half: int) -> Floats:
    """What both heads project with before training, [half, H]: the identity, or orthonormal rows from a fixed seed.

    Raises:
        ValueError: If `half` is more than H.
    """
    if half > hidden_size:
        raise ValueError(f"half an address has {half} numbers, more than an embedding's {hidden_size}")
    if half == hidden_size:
        return np.eye(half, dtype=np.float32)
    square, _ = np.linalg.qr(np.random.default_rng(0).standard_normal((hidden_size, half)))
    return np.ascontiguousarray(square.T, dtype=np.float32)


@dataclass(frozen=True)
class Head:
    """`attention` [H]; `projection` [half, H], or None for the identity."""

    attention: Floats
    projection: Floats | None

    def pooled(self, features: Floats, priors: Floats, lengths: npt.NDArray[np.integer]) -> Floats:
        """Texts of [n, T, H] features, of which the first `lengths` [n] count → unit vectors [n, half]."""
        places = np.arange(features.shape[1]) < lengths[:, None]
        logits = np.where(places, features @ self.attention + np.log(priors), -np.inf)
        top = np.max(logits, axis=1, keepdims=True, initial=-1e30)
        weights = np.exp(logits - top)
        weights /= np.maximum(weights.sum(axis=1, keepdims=True), _SMALLEST)
        means = np.einsum("nt,nth->nh", weights, np.where(places[..., None], features, 0))
        return normalised(means if self.projection is None else means @ self.projection.T)


def normalised(vectors: Floats) -> Floats:
    """Unit vectors; nothing stays nothing."""
    unit: Floats = vectors / np.maximum(np.linalg.norm(vectors, axis=-1, keepdims=True), _SMALLEST)
    return unit.astype(np.float32, copy=False)


@dataclass(frozen=True)
class Heads:
    """Both heads. `trained` says whether training has touched them."""

    subject: Head
    relation: Head
    trained: bool

    @classmethod
    def untrained(cls, hidden_size: int, half: int) -> Self:
        """Both the same mean."""
        projection = None if half == hidden_size else fixed_projection(hidden_size, half)
        head = Head(np.zeros(hidden_size, np.float32), projection)
        return cls(head, head, trained=False)

    @classmethod
    def read(cls, path: Path, hidden_size: int) -> Self:
        """Trained heads.

        Raises:
            NotFound: If there is no such file.
            ModelError: If it holds something else, or was trained on embeddings of another size.
        """
        if not path.is_file():
            raise NotFound(f"There are no trained heads at {path}.")
        try:
            with safe_open(path, framework="numpy") as file:
                arrays: dict[str, Any] = {name: file.get_tensor(name).astype(np.float32) for name in file.keys()}  # noqa: SIM118
        except (SafetensorError, TypeError) as error:
            raise ModelError(f"{path} cannot be read as safetensors of plain numbers ({error}).") from error
        return cls.of(arrays, hidden_size, str(path))

    @classmethod
    def of(cls, arrays: Mapping[str, Any], hidden_size: int, source: str) -> Self:
        """Heads of the tensors that training writes; `source` is where they come from, for messages.

        Raises:
            ModelError: If they are something else, or were trained on embeddings of another size.
        """
        subject, relation = (_head(arrays, name, source, hidden_size) for name in HEADS)
        return cls(subject, relation, trained=any(arrays[f"{name}.projection.b"].any() for name in HEADS))


def _head(arrays: Mapping[str, Any], name: str, path: str, hidden_size: int) -> Head:
    wanted = [f"{name}.attention", f"{name}.projection.a", f"{name}.projection.b"]
    missing = [one for one in wanted if one not in arrays]
    if missing:
        raise ModelError(f"{path} lacks {', '.join(missing)}: these are no heads of a memory gate.")
    attention, low, high = (arrays[one] for one in wanted)
    fits = attention.shape == (hidden_size,) and low.ndim == high.ndim == 2 and low.shape[1] == hidden_size
    if not fits or high.shape[1] != low.shape[0] or high.shape[0] > hidden_size:
        shapes = ", ".join(f"{one} {list(arrays[one].shape)}" for one in wanted)
        raise ModelError(f"{path} does not fit a base whose embeddings have {hidden_size} numbers: {shapes}.")
    return Head(attention, fixed_projection(hidden_size, int(high.shape[0])) + high @ low)
