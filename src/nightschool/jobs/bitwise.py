"""Two checkpoints compared bit by bit: every tensor, and every plain value except the times of the clock.

Tensors are compared as bytes, so that -0.0 and 0.0, and two kinds of NaN, are different; nothing is computed with them.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from nightschool.checkpoint_writer.tensorfile_places import tensor_places
from nightschool.errors import Damaged
from nightschool.store.atomic import read_json
from nightschool.store.manifest import MANIFEST

# Names of files that only describe for people, or that list the others.
_NOT_STATE = frozenset({MANIFEST, "metadata.json", "training_metrics.json", "training_config.json"})
# Seconds of training, and when it was so far, differ between any two executions.
_CLOCK = frozenset({"seconds", "saved_at", "evaluated_at", "checked_at", "timestamp"})
_PART = re.compile(r"-\d{5}-of-\d{5}$")
_CHUNK_BYTES = 1 << 24


@dataclass(frozen=True)
class Comparison:
    """What was compared, and each thing that differs, in words."""

    num_tensors: int
    tensor_bytes: int
    num_values: int
    differences: tuple[str, ...]


@dataclass(frozen=True)
class _Tensor:
    path: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


def compare_checkpoints(first: Path, second: Path) -> Comparison:
    """Compare two checkpoint folders.

    Raises:
        Damaged: If a file of tensors is none.
    """
    left, right = _tensors(first), _tensors(second)
    differences = []
    for name in sorted(left.keys() | right.keys()):
        if name not in left or name not in right:
            differences.append(f"{name} is only in the {'second' if name not in left else 'first'}")
        elif (found := _difference(left[name], right[name])) is not None:
            differences.append(f"{name}: {found}")
    values, other = _values(first), _values(second)
    for key in sorted(values.keys() | other.keys()):
        one, two = values.get(key, "nothing"), other.get(key, "nothing")
        # As text, so that -0.0 is not 0.0, and 1 is not 1.0.
        if json.dumps(one) != json.dumps(two):
            differences.append(f"{key}: {_short(one)} and {_short(two)}")
    return Comparison(
        num_tensors=len(left),
        tensor_bytes=sum(tensor.end - tensor.start for tensor in left.values()),
        num_values=len(values),
        differences=tuple(differences),
    )


def _tensors(folder: Path) -> dict[str, _Tensor]:
    """Every tensor of a checkpoint by `file: name`, whatever part of the file it lies in.

    Of tensors that processes share, each one's rows are a tensor here: other numbers of processes are not compared.
    """
    found = {}
    for path in sorted(folder.glob("*.safetensors")):
        family = _PART.sub("", path.stem)
        for name, tensor in _header(path).items():
            found[f"{family}: {name}"] = tensor
    return found


def _header(path: Path) -> dict[str, _Tensor]:
    try:
        places = tensor_places(path)
    except (OSError, ValueError) as error:
        raise Damaged(f"{path} cannot be read as safetensors ({error}). Compare with another checkpoint.") from error
    return {name: _Tensor(path, place.dtype, place.shape, place.begin, place.end) for name, place in places.items()}


def _difference(one: _Tensor, two: _Tensor) -> str | None:
    if (one.dtype, one.shape) != (two.dtype, two.shape):
        return f"{one.dtype} {list(one.shape)} and {two.dtype} {list(two.shape)}"
    size, differing = one.end - one.start, 0
    with one.path.open("rb") as left, two.path.open("rb") as right:
        left.seek(one.start)
        right.seek(two.start)
        for offset in range(0, size, _CHUNK_BYTES):
            count = min(_CHUNK_BYTES, size - offset)
            a, b = left.read(count), right.read(count)
            if len(a) != count or len(b) != count:
                return f"ends after {offset + min(len(a), len(b))} of {size} bytes"
            if a != b:
                differing += int(np.count_nonzero(np.frombuffer(a, np.uint8) != np.frombuffer(b, np.uint8)))
    return f"{differing} of {size} bytes differ" if differing else None


def _values(folder: Path) -> dict[str, Any]:
    """Every plain value of the JSON files that belong to the state, by `file: dotted key`."""
    found: dict[str, Any] = {}
    for path in sorted(folder.glob("*.json")):
        if path.name not in _NOT_STATE and not path.name.endswith(".index.json"):
            _flatten(read_json(path), f"{path.stem}: ", found)
    return found


def _flatten(value: Any, prefix: str, into: dict[str, Any]) -> None:
    if isinstance(value, dict):
        for key, inner in value.items():
            if key not in _CLOCK:
                _flatten(inner, f"{prefix}{key}" if prefix.endswith(" ") else f"{prefix}.{key}", into)
    else:
        into[prefix] = value


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "…"
