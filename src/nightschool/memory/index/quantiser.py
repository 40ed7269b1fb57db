"""What turns an address into small numbers: codebooks of the two halves, codes for ranking, and bits for the last resort.

An address is a pair of unit vectors, `subject` and `relation`, of `half` numbers each. It is fitted once, on a sample, and then
stays: an entry that is added later gets its place by what it says, and is found like any other.

The codebooks are product keys (Lample et al. 2019, arXiv 1907.05242), the bits are SimHash (Charikar 2002).
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from math import isqrt
from typing import Self

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float32]

CODE_BYTES = 64
HASH_BITS = 256
# Vectors of a sample for each centroid, rounds of k-means, and addresses that the directions of the codes are taken from.
_SAMPLE = 48
_ROUNDS = 8
_DIRECTIONS_SAMPLE = 16_384
# Of the widest component of a sample: int8 holds so much more before it is cut.
_MARGIN = 1.25


@dataclass(frozen=True)
class Quantiser:
    """Fitted arrays: `codebooks` [2, K, half], `mean` [2·half], `directions` [64, 2·half], `scales` [64], `planes` [256, 2·half]."""

    codebooks: Floats
    mean: Floats
    directions: Floats
    scales: Floats
    planes: Floats

    @classmethod
    def fit(cls, subjects: Floats, relations: Floats, knowledge_num: int, *, seed: int = 0) -> Self:
        """Fit to a sample of addresses, [n, half] each; √knowledge_num centroids for each half.

        With fewer different vectors than centroids, each is a centroid, and the rest repeat the first, which takes nothing.

        Raises:
            ValueError: If the sample is empty.
        """
        if len(subjects) == 0:
            raise ValueError("no addresses to fit a quantiser to")
        rng = np.random.default_rng(seed)
        size = isqrt(knowledge_num)
        codebooks = np.stack([_centroids(half, size, rng) for half in (subjects, relations)])
        keys = np.concatenate([subjects, relations], axis=1)[:_DIRECTIONS_SAMPLE]
        mean = keys.mean(axis=0, dtype=np.float32)
        directions = _directions(keys - mean, rng)
        widest = np.abs((keys - mean) @ directions.T).max(axis=0)
        scales = np.maximum(widest * _MARGIN, 1e-6).astype(np.float32) / 127
        planes = rng.standard_normal((HASH_BITS, keys.shape[1])).astype(np.float32)
        return cls(codebooks, mean, directions, scales, planes)

    @property
    def half(self) -> int:
        """Numbers of one half of an address."""
        return int(self.codebooks.shape[2])

    @property
    def size(self) -> int:
        """Centroids of each half; there are as many cells as its square."""
        return int(self.codebooks.shape[1])

    def cells(self, subjects: Floats, relations: Floats) -> npt.NDArray[np.int32]:
        """The cell of each address, [n]: number of the subject's centroid · size + that of the relation's."""
        rows = np.argmax(subjects @ self.codebooks[0].T, axis=1)
        columns = np.argmax(relations @ self.codebooks[1].T, axis=1)
        numbers: npt.NDArray[np.int32] = (rows * self.size + columns).astype(np.int32)
        return numbers

    def codes(self, subjects: Floats, relations: Floats) -> npt.NDArray[np.int8]:
        """The main components of each address in steps of `scales`, [n, 64]."""
        parts = np.concatenate([subjects, relations], axis=1) - self.mean
        steps = np.rint(parts @ self.directions.T / self.scales)
        codes: npt.NDArray[np.int8] = np.clip(steps, -127, 127).astype(np.int8)
        return codes

    def code_queries(self, subjects: Floats, relations: Floats) -> Floats:
        """What a code is multiplied with: the product is the score of its address, less a constant of the query. [b, 64]."""
        scaled: Floats = np.concatenate([subjects, relations], axis=1) @ self.directions.T * self.scales
        return scaled

    def hashes(self, subjects: Floats, relations: Floats) -> npt.NDArray[np.uint64]:
        """On which side of each plane an address lies, [4, n]; addresses that are alike differ in few bits."""
        parts = np.concatenate([subjects, relations], axis=1) - self.mean
        packed = np.packbits(parts @ self.planes.T > 0, axis=1)
        return np.ascontiguousarray(packed.view(np.uint64).T)

    def arrays(self) -> dict[str, Floats]:
        return {field.name: getattr(self, field.name) for field in fields(self)}


def _centroids(vectors: Floats, size: int, rng: np.random.Generator) -> Floats:
    """Spherical k-means of [n, half] → [size, half]."""
    # Equal vectors have equal projections; sorting these is far quicker than sorting vectors.
    shadows = vectors.astype(np.float64) @ rng.standard_normal(vectors.shape[1])
    different = vectors[np.sort(np.unique(shadows.round(9), return_index=True)[1])]
    if len(different) <= size:
        return np.concatenate([different, np.repeat(different[:1], size - len(different), axis=0)])
    sample = different[rng.permutation(len(different))[: _SAMPLE * size]]
    centroids: Floats = sample[:size].copy()
    for _ in range(_ROUNDS):
        nearest = np.argmax(sample @ centroids.T, axis=1)
        order = np.argsort(nearest, kind="stable")
        starts = np.searchsorted(nearest[order], np.arange(size))
        counts = np.diff(np.append(starts, len(sample)))
        filled = counts > 0
        centroids[filled] = np.add.reduceat(sample[order], starts[filled], axis=0)
        centroids[~filled] = sample[rng.integers(0, len(sample), int((~filled).sum()))]
        centroids /= np.maximum(np.linalg.norm(centroids, axis=1, keepdims=True), 1e-12)
    return centroids


def _directions(centred: Floats, rng: np.random.Generator) -> Floats:
    """Orthonormal directions in which [n, d] differ most, [64, d], by a randomised range (Halko et al. 2011)."""
    width = centred.shape[1]
    wanted = min(CODE_BYTES, width)
    basis = rng.standard_normal((width, min(width, wanted + 16))).astype(np.float32)
    for _ in range(3):
        basis, _ = np.linalg.qr(centred.T @ (centred @ basis))
    _, vectors = np.linalg.eigh((centred @ basis).T @ (centred @ basis))
    found = (basis @ vectors[:, ::-1][:, :wanted]).T
    return np.pad(found, ((0, CODE_BYTES - wanted), (0, 0))).astype(np.float32)
